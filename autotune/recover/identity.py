"""Which process is meant: a pid with its start, which no clock that is set moves and no reboot repeats."""

from __future__ import annotations

import functools
import os
import sys
import time
from dataclasses import dataclass

from autotune.recover import keeper

_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """A process of this machine. Two are equal only if they are the same process."""

    pid: int
    started: float  # Linux: clock ticks since boot; elsewhere seconds since the epoch
    boot: str  # of which boot that is; empty where the system does not say

    @property
    def is_alive(self) -> bool:
        """A zombie is not: it has ended, and only its parent does not know yet."""
        return process_id(self.pid) == self

    def send(self, number: int) -> bool:
        """Signal this process and no other that has its pid by now; whether it was sent."""
        if not self.is_alive:
            return False
        try:
            if sys.platform == "linux" and (process := keeper.read_process(self.pid)) is not None:
                return process.ticks == self.started and keeper.send(process, number)
            os.kill(self.pid, number)
        except OSError:  # gone just now, or no longer ours
            return False
        return True

    def wait(self, limit_s: float) -> bool:
        """Until it has ended; False where it has not within the limit."""
        until = time.monotonic() + limit_s
        while self.is_alive:
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL_S)
        return True


def process_id(pid: int) -> ProcessId | None:
    """Of the process that has this pid now; None where there is none, or it has ended."""
    started = _started_linux(pid) if sys.platform == "linux" else _started_elsewhere(pid)
    return None if started is None else ProcessId(pid=pid, started=started, boot=this_boot())


def own_process_id() -> ProcessId:
    found = process_id(os.getpid())
    assert found is not None
    return found


this_boot = functools.cache(keeper.boot_id)


def _started_linux(pid: int) -> float | None:
    process = keeper.read_process(pid)
    return float(process.ticks) if process is not None and process.alive else None


def _started_elsewhere(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None
