"""Start a worker under any interpreter: `python -P bootstrap.py CHANNEL_FD PARENT_PID [MODULE]`.

Imports `autotune` from where this file lies and nothing else from there, so the interpreter's own libraries are the
ones measured. First of all the worker ties its life to its parent's.
"""

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIGKILL = 9
DRY_RUN = "autotune.probe.dry_run_worker"


def die_with_parent(parent_pid: int, number: int = SIGKILL) -> None:
    """Have the kernel send this process `number` when its parent ends (Linux); leave at once where it already has."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent_pid:
        leave()


def leave(*_: object) -> None:
    """End at once. A dry run's temporary folder is its own, and a parent that was killed removes none."""
    folder = os.environ.get("TMPDIR", "")
    if os.path.basename(folder).startswith("autotune-dry-run-"):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def load_autotune() -> None:
    package = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        "autotune", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["autotune"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    module = sys.argv[3] if len(sys.argv) > 3 else "autotune.probe.worker"
    if module == DRY_RUN:  # waits for no device, so a signal that Python handles is soon heard
        signal.signal(signal.SIGTERM, leave)
        die_with_parent(int(sys.argv[2]), signal.SIGTERM)
    else:
        die_with_parent(int(sys.argv[2]))
    load_autotune()
    import importlib

    worker = importlib.import_module(module)
    worker.main(int(sys.argv[1]))
    if module == DRY_RUN:  # the channel is closed
        leave()
