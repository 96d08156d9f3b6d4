"""Requests to stop: SIGTERM, and the file that a supervisor writes."""

from __future__ import annotations

import json
import os
import signal
import threading
from types import FrameType


class StopSignal:
    """SIGTERM heard as a request, where nobody else handles it. The second one ends the process at once."""

    def __init__(self) -> None:
        self.is_requested = False
        self._is_installed = False
        self._pid = os.getpid()

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._heard)
            self._is_installed = True

    def remove(self) -> None:
        if self._is_installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._is_installed = False

    def _heard(self, _number: int, _frame: FrameType | None) -> None:
        if self.is_requested or os.getpid() != self._pid:  # what this process has forked dies as if we were not here
            die_of_sigterm()
        self.is_requested = True


def die_of_sigterm() -> None:
    """End as the signal would have ended this process, so that its exit status says so."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


class StopRequests:
    """Whether training is to stop after this step, the same answer for every rank.

    One process stops at once. Of several, rank 0 decides and writes the last step into `agreement`, two steps ahead:
    no rank can finish the next step before rank 0 has begun it, so all have seen the file by then.
    """

    def __init__(self, control: str | None, agreement: str | None, *, rank: int, world_size: int) -> None:
        self.by_signal = StopSignal()
        self.by_control = False
        self._control, self._agreement = control, agreement if world_size > 1 else None
        self._rank, self._world_size = rank, world_size
        self._seen: tuple[int, int] | None = None
        self._last_step: int | None = None

    def install(self) -> None:
        """Listen for SIGTERM, where what it asks for can be done."""
        if self._world_size == 1 or self._agreement is not None:
            self.by_signal.install()

    def is_due(self, step: int) -> bool:
        """Called at the end of every step: a stat or two."""
        if self._rank == 0:
            self._look()
        wanted = self.by_signal.is_requested or self.by_control
        if self._world_size == 1:
            return wanted
        if self._last_step is None:
            if self._rank == 0:
                self._last_step = self._announce(step + 2) if wanted else None
            elif self._agreement is not None and os.path.exists(self._agreement):
                self._last_step = _read_step(self._agreement)
        return self._last_step is not None and step >= self._last_step

    def _look(self) -> None:
        """Read the control file where it has changed. What is no request is no news."""
        if self._control is None:
            return
        try:
            status = os.stat(self._control)
            if (key := (status.st_mtime_ns, status.st_size)) == self._seen:
                return
            self._seen = key
            with open(self._control, encoding="utf-8") as file:
                asked = json.load(file)
        except (OSError, ValueError):
            return
        if isinstance(asked, dict) and asked.get("do") == "save_and_stop":
            self.by_control = True

    def _announce(self, last_step: int) -> int | None:
        if self._agreement is None:
            return None
        try:
            temporary = f"{self._agreement}.{os.getpid()}"
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(str(last_step))
            os.replace(temporary, self._agreement)
        except OSError:
            return None  # tried again after the next step
        return last_step


def _read_step(path: str) -> int | None:
    try:
        with open(path, encoding="utf-8") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
