"""Run by every Python that starts under `autotune run`: has a training program hear of its plan.

The module that this one shadows is run first. Without a plan in the environment nothing else happens; with one,
a finder waits for `transformers` to be imported and only then loads `autotune`, from where this file lies. Whatever
fails is one line on stderr, and the program goes on without the hook.
"""

from __future__ import annotations

import os
import sys
from typing import Any

WATCHED = ("transformers", "transformers.trainer")
PR_SET_PDEATHSIG, SIGKILL = 1, 9  # linux/prctl.h
_TIED = "AUTOTUNE_RANK_TIED"  # in the environment of what a rank starts: only the rank itself dies with its launcher


def run_shadowed() -> None:
    """Run the `sitecustomize` that would have been found without this folder."""
    import importlib.machinery
    import importlib.util

    here = os.path.dirname(os.path.abspath(__file__))
    rest = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


def give_up(error: Exception) -> None:
    sys.stderr.write(f"autotune: training runs without its hook: {type(error).__name__}: {error}\n")


class Finder:
    """Finds nothing itself: has the modules' own loaders call `loaded` once they have run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    watch(spec.loader, name)
                return spec
        return None


def watch(loader: Any, name: str) -> None:
    run = loader.exec_module

    def exec_module(module: Any) -> None:
        run(module)
        try:
            loaded(name)
        except Exception as error:  # noqa: BLE001 - whatever is wrong here must not end a training program
            give_up(error)

    try:
        loader.exec_module = exec_module  # on this one loader, which keeps its type
    except AttributeError as error:
        give_up(error)


def loaded(name: str) -> None:
    load_autotune()
    import importlib

    importlib.import_module("autotune.recover.trainer.session").module_loaded(name)


def load_autotune() -> None:
    """Import `autotune` from where this file lies, and nothing else from there."""
    import importlib.util

    package = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", ".."))
    present = sys.modules.get("autotune")
    if present is not None:
        if package not in [os.path.realpath(entry) for entry in getattr(present, "__path__", ())]:
            raise ImportError("another package named autotune is in use")
        return
    spec = importlib.util.spec_from_file_location(
        "autotune", os.path.join(package, "__init__.py"), submodule_search_locations=[package]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["autotune"] = module
    spec.loader.exec_module(module)


def tie_to_launcher() -> None:
    """Have the kernel end this rank when the launcher that started it is gone."""
    if sys.platform == "linux" and _TIED not in os.environ:
        os.environ[_TIED] = "1"
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)


def install() -> None:
    if not os.environ.get("AUTOTUNE_PLAN"):
        return
    try:
        if sys.version_info < (3, 11):  # noqa: UP036 - a trainer may run under any interpreter
            raise RuntimeError("it needs Python 3.11 or newer")
        if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
            tie_to_launcher()
        sys.meta_path.insert(0, Finder())
    except Exception as error:  # noqa: BLE001 - as above
        give_up(error)


try:
    run_shadowed()
finally:
    install()
