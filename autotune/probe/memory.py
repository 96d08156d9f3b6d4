"""The worker's memory: a limit that is enforced, and the facts a device tells about use."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from autotune.values import MIB

_STATUS = Path("/proc/self/status")
_TOLD_STEP_BYTES = 4 * MIB


def status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes (VmData, VmHWM, …); None where there is no such file or field."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def limit_data(limit_bytes: int) -> None:
    """Set this process's soft RLIMIT_DATA: past it mmap and brk fail, and torch raises its own error."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))


def lift_data_limit() -> None:
    """Back to the hard limit, so that an error can be described after memory has run out."""
    if sys.platform == "win32":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


class DataPeak(threading.Thread):
    """Samples VmData every `interval_s`: the nearest thing to a reserved peak that a CPU process has.

    `tell` hears each peak that is a step above the last one told, so that it outlives a process that crashes.
    """

    def __init__(self, tell: Callable[[int], None], interval_s: float = 0.02) -> None:
        super().__init__(daemon=True, name="data-peak")
        self.peak_bytes = status_bytes("VmData") or 0
        self._tell, self._told = tell, 0
        self._interval_s = interval_s
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(self._interval_s):
            self.peak_bytes = max(self.peak_bytes, status_bytes("VmData") or 0)
            if self.peak_bytes >= self._told + _TOLD_STEP_BYTES:
                self._told = self.peak_bytes
                with contextlib.suppress(OSError):  # the parent is gone: the heartbeat ends this process
                    self._tell(self.peak_bytes)

    def stop(self) -> None:
        """Take no more samples: what follows is no longer under the limit."""
        self._done.set()

    def finish(self) -> int:
        """The peak, with a last sample unless it was stopped."""
        if not self._done.is_set():
            self._done.set()
            self.peak_bytes = max(self.peak_bytes, status_bytes("VmData") or 0)
        return self.peak_bytes
