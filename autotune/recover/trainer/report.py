"""For training loops without transformers: tell the supervisor what the hook would have told.

from autotune.recover.trainer.report import Reporter, read_plan

plan = read_plan()
with Reporter() as report:
    report.begin(step=0, max_steps=1000, micro_batch_size=4, gradient_accumulation_steps=8)
    for step in range(1000):
        ...
        report.step(step + 1, samples=32, tokens=32 * 512, loss=loss)
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from autotune.recover.facts import Phase
from autotune.recover.trainer.death import describe
from autotune.recover.trainer.events import Events, rank_of, world_size_of
from autotune.recover.trainer.plan import Plan, read_plan

__all__ = ["Plan", "Reporter", "read_plan"]


class Reporter:
    """Writes the events of one process. As a context manager it also tells of an exception, and of the end.

    Without a plan, or with one that names no events file, it does nothing.
    """

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan if plan is not None else read_plan()
        self.events = Events(self.plan.events if self.plan else None, rank_of())
        self.phase_now = Phase.LOAD
        self.batch: dict[str, int] | None = None
        self.part: str | None = None
        self.last_step: int | None = None
        self._is_dead = False
        self._ended_at = time.perf_counter()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        elif not self._is_dead:
            self.died(error)
        self.events.close()

    def start(self, **versions: str) -> None:
        """This process is up; `versions` of what it trains with."""
        self.events.write("start", versions=versions)
        self.phase(Phase.LOAD)

    def phase(self, phase: Phase | str) -> None:
        """What the process does from here on."""
        self.phase_now = Phase(phase)
        if self.events.rank == 0:
            self.events.write("phase", phase=self.phase_now.value)

    def begin(self, *, step: int = 0, **fields: Any) -> None:
        """Training begins after `step`; `fields` as in the hook's "begin" event."""
        self.last_step = step
        self.phase(Phase.TRAIN)
        if self.events.rank == 0:
            self.events.write("begin", **{"step": step, "world_size": world_size_of(), "resumed": step > 0, **fields})
        self._ended_at = time.perf_counter()

    def batch_begins(self, samples: int, tokens: int) -> None:
        """A micro batch of this shape is worked on: a death from here on tells it."""
        self.batch, self.part = {"samples": samples, "tokens": tokens}, "forward_backward"

    def optimizer_begins(self) -> None:
        self.part = "optimizer"

    def step(self, step: int, **fields: Any) -> None:
        """Optimizer step `step` is done. `seconds` is measured since the last one unless it is given."""
        now = time.perf_counter()
        fields.setdefault("seconds", now - self._ended_at)
        self._ended_at, self.last_step, self.batch, self.part = now, step, None, None
        if self.events.rank == 0:
            self.events.write("step", step=step, **fields)

    def saved(self, path: str, step: int, *, seconds: float | None = None, emergency: bool = False) -> None:
        """A checkpoint is complete. The time it took is no part of the next step's."""
        self._ended_at = time.perf_counter()
        if self.events.rank == 0:
            self.events.write("saved", path=str(path), step=step, seconds=seconds, emergency=emergency)

    def died(self, error: BaseException, *, saved: str | None = None) -> None:
        """This process ends with `error`; `saved` is the checkpoint that it still wrote."""
        self._is_dead = True
        self.events.write(
            "died",
            **describe(error),
            phase=self.phase_now.value,
            batch=self.batch,
            step=self.last_step,
            part=self.part,
            saved=saved,
        )

    def end(self, *, stopped: bool = False) -> None:
        if self.events.rank == 0:
            self.events.write("end", step=self.last_step, stopped=stopped)
            self.phase(Phase.DONE)
