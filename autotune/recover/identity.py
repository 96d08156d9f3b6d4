"""Which process is meant: a pid with its start, which no clock that is set moves and no reboot repeats."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """A process of this machine. Two are equal only if they are the same process."""

    pid: int
    started: float  # Linux: clock ticks since boot; elsewhere seconds since the epoch
    boot: str  # of which boot that is

    @property
    def is_alive(self) -> bool:
        """A zombie is not: it has ended, and only its parent does not know yet."""
        return process_id(self.pid) == self


def process_id(pid: int) -> ProcessId | None:
    """Of the process that has this pid now; None where there is none, or it has ended."""
    started = _started_linux(pid) if Path("/proc/self/stat").exists() else _started_elsewhere(pid)
    return None if started is None else ProcessId(pid=pid, started=started, boot=boot_id())


def own_process_id() -> ProcessId:
    found = process_id(os.getpid())
    assert found is not None
    return found


@functools.cache
def boot_id() -> str:
    """Another one after every boot; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started_linux(pid: int) -> float | None:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if after_name[0] in (b"Z", b"X") else float(after_name[19])  # fields 3 and 22 of proc(5)


def _started_elsewhere(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None
