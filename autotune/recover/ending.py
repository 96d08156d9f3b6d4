"""How an attempt is brought to its end: a clock that only moves while we do, and steps with a time each."""

from __future__ import annotations

import signal
from collections.abc import Callable

from autotune.recover.facts import EndedBy
from autotune.recover.keeper import Process, send

_PAUSE_S = 10.0  # a turn that took longer: we were stopped, or the machine slept, and so did the command
_KILL_S = 0.25  # between rounds of SIGKILL
_GIVE_UP_S = 15.0  # after the first SIGKILL: a process that waits for a device cannot be ended


class SteadyClock:
    """Seconds of the run's own: those in which we did not run are left out, for the command may not have either."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._paused_s = 0.0
        self._last = self._now = clock()

    def tick(self) -> None:
        """Once a turn."""
        now = self._clock()
        if now - self._last > _PAUSE_S:
            self._paused_s += now - self._last
        self._last = now
        self._now = now - self._paused_s

    def now(self) -> float:
        """As of this turn."""
        return self._now

    def fresh(self) -> float:
        return self._clock() - self._paused_s


class Ending:
    """Who ends the attempt, and the steps that are still to come."""

    def __init__(self, clock: SteadyClock) -> None:
        self._clock = clock
        self._plan: list[tuple[float, Callable[[list[Process]], None]]] = []
        self.by: EndedBy | None = None
        self.death_at: float | None = None
        self.killing = False
        self.given_up = False
        self.left: tuple[int, ...] = ()
        self._kill_until = 0.0

    def begin(self, by: EndedBy) -> None:
        """The steps of an earlier reason stay: the first deadline counts."""
        self.by = by

    def death_seen(self, seen: bool) -> None:
        """The first rank's death counts, until none is dead: training began anew."""
        if not seen:
            self.death_at = None
        elif self.death_at is None:
            self.death_at = self._clock.now()

    def plan(self, after_s: float, step: Callable[[list[Process]], None]) -> None:
        self._plan.append((self._clock.now() + after_s, step))

    @property
    def is_due(self) -> bool:
        return any(at <= self._clock.now() for at, _ in self._plan)

    def carry_out(self, found: list[Process]) -> None:
        due = [step for at, step in self._plan if at <= self._clock.now()]
        self._plan = [(at, step) for at, step in self._plan if at > self._clock.now()]
        for step in due:
            step(found)

    def terminate(self, found: list[Process]) -> None:
        for process in found:
            send(process, signal.SIGTERM)
            send(process, signal.SIGCONT)  # a stopped one hears nothing else

    def kill(self, found: list[Process]) -> None:
        """Round after round, since a process may have started another."""
        if not self.killing:
            self.killing, self._kill_until = True, self._clock.now() + _GIVE_UP_S
        for process in found:
            send(process, signal.SIGKILL)
        self.left = tuple(process.pid for process in found)
        if self._clock.now() < self._kill_until:
            self.plan(_KILL_S, self.kill)
        elif found:
            self.given_up = True
