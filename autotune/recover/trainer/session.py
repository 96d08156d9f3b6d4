"""What one training process tells of itself, from the import of transformers to its end."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import platform
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from autotune.recover.facts import Phase
from autotune.recover.trainer.death import describe, is_launchers
from autotune.recover.trainer.events import Events, rank_of
from autotune.recover.trainer.plan import Plan, read_plan
from autotune.recover.trainer.run import TrainRun

_LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "bitsandbytes",
    "datasets",
    "axolotl",
    "llamafactory",
)

P = ParamSpec("P")
R = TypeVar("R")


class Session:
    """This process's plan and events, and the phase that it is in."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.events = Events(plan.events, rank_of())
        self.phase = Phase.LOAD
        self.run: TrainRun | None = None
        self.has_resumed = False  # the plan's checkpoint is for the first training of the process
        self._told: BaseException | None = None
        self._is_started = False

    def start(self) -> None:
        """Say once that the process is up. A process made by multiprocessing only says what it trains."""
        if self._is_started or multiprocessing.parent_process() is not None:
            return
        self._is_started = True
        self.events.write("start", versions=versions())
        if self.events.rank == 0:
            self.events.write("phase", phase=Phase.LOAD.value)

    def enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase = phase
            if self.events.rank == 0:
                self.events.write("phase", phase=phase.value)

    def died(self, error: BaseException, **facts: Any) -> None:
        """Say once of what this process dies. `facts` are known inside of a training."""
        if error is self._told or is_launchers(error):
            return
        self._told = error
        found = {"phase": self.phase.value, "batch": None, "step": None, "part": None, "saved": None, **facts}
        self.events.write("died", **describe(error), **found)

    def hear_of_deaths(self) -> None:
        """Also tell of exceptions outside of a training: those that nothing catches."""
        previous = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            harmless(self.died)(error)
            previous(kind, error, trace)

        sys.excepthook = hook


_current: Session | None = None
_is_broken = False  # something here went wrong: training goes on without us


def current() -> Session | None:
    return None if _is_broken else _current


def open_session() -> Session | None:
    """This process's session; None without a plan. Raises `InvalidRequest` where the plan cannot be read."""
    global _current
    if _current is None and (plan := read_plan()) is not None:
        _current = Session(plan)
        _current.hear_of_deaths()
    return current()


def module_loaded(name: str) -> None:
    """Called by the hook each time a module that it watches has been imported."""
    session = open_session()
    if session is not None and name == "transformers.trainer":
        from autotune.recover.trainer.patch import install

        install(sys.modules[name].Trainer)
        session.start()


def harmless(function: Callable[P, R]) -> Callable[P, R | None]:
    """`function` that cannot end a training: its first failure is one line on stderr, and the hook is off."""

    def run(*arguments: P.args, **named: P.kwargs) -> R | None:
        global _is_broken
        if _is_broken:
            return None
        try:
            return function(*arguments, **named)
        except Exception as error:  # noqa: BLE001 - the outermost frame of what is ours inside a user's training
            _is_broken = True
            sys.stderr.write(f"autotune: training goes on without its hook: {type(error).__name__}: {error}\n")
            return None

    return run


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
