"""The methods of transformers' `Trainer` that the hook wraps: once, at the class, so every subclass is covered."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from autotune.recover.facts import Phase
from autotune.recover.trainer.session import current, harmless
from autotune.recover.trainer.supervised import train_under

Method = Callable[..., Any]
_MARK = "_autotune_hooked"


def install(trainer_class: Any) -> None:
    """Wrap `trainer_class`'s own methods; a second call does nothing."""
    if getattr(trainer_class, _MARK, False):
        return
    wrappers: dict[str, Callable[[Method], Method]] = {
        "train": _train,
        "training_step": _training_step,
        "evaluate": _during(Phase.EVALUATE),
        "predict": _during(Phase.EVALUATE),
        "_save_checkpoint": _during(Phase.SAVE),
    }
    for name, wrap in wrappers.items():
        original = getattr(trainer_class, name)
        setattr(trainer_class, name, functools.wraps(original)(wrap(original)))
    setattr(trainer_class, _MARK, True)


def _train(original: Method) -> Method:
    def train(self: Any, *arguments: Any, **named: Any) -> Any:
        session = current()
        if session is None or session.run is not None:
            return original(self, *arguments, **named)
        return train_under(session, self, original, arguments, named)

    return train


def _training_step(original: Method) -> Method:
    def training_step(self: Any, *arguments: Any, **named: Any) -> Any:
        session = current()
        if session is not None and session.run is not None and session.run.trainer is self:
            harmless(session.run.micro_batch_begins)(arguments[1] if len(arguments) > 1 else named.get("inputs"))
        return original(self, *arguments, **named)

    return training_step


def _during(phase: Phase) -> Callable[[Method], Method]:
    """Say that the process is in `phase` while the method runs. After an exception it stays there: that is where."""

    def wrap(original: Method) -> Method:
        def method(self: Any, *arguments: Any, **named: Any) -> Any:
            session = current()
            if session is None or session.phase is phase:
                return original(self, *arguments, **named)
            before, began = session.phase, time.perf_counter()
            if session.run is not None:
                harmless(session.run.flush)()
            harmless(session.enter)(phase)
            result = original(self, *arguments, **named)
            harmless(session.enter)(before)
            if session.run is not None:
                session.run.pause(time.perf_counter() - began, saving=phase is Phase.SAVE)
            return result

        return method

    return wrap
