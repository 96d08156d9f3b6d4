"""Memory in use, read again and again beside whatever runs: of a card, or of a trainer on the CPU."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import psutil

from autotune.hardware.readers import watcher
from autotune.recover.card import BACK_BYTES
from autotune.values import Device

Sample = tuple[float, int]  # `time.time()`, bytes

CARD_S, PROCESS_S = 0.5, 0.02  # between samples
_BACK_S = 10.0  # for a driver to give back what a process held
_SEARCH_S = 0.5  # between looks for the trainer's process


class MemoryWatch:
    """A context, in which a thread reads."""

    def __init__(self, read: Callable[[], int | None], interval_s: float) -> None:
        self.samples: list[Sample] = []
        self._read, self._interval_s = read, interval_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go, daemon=True, name="memory-watch")

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(10 * self._interval_s + 5)

    def wait_until_back(self) -> None:
        """Until no more is used than in the first sample, or ten seconds."""
        until = time.monotonic() + _BACK_S
        while time.monotonic() < until and not (self.samples and is_back(self.samples[-1][1], self.samples[0][1])):
            time.sleep(self._interval_s)

    def _go(self) -> None:
        while True:
            used = self._read()
            if used is not None:
                self.samples.append((time.time(), used))
            if self._over.wait(self._interval_s):
                return


def is_back(used_bytes: int, before_bytes: int) -> bool:
    """Whether what was taken is given back, as the supervisor has it."""
    return used_bytes - before_bytes <= BACK_BYTES


def watch_of(device: Device, module: str) -> MemoryWatch:
    """Of the whole card; on the CPU of the process that runs `module`."""
    if device.kind == "cpu":
        return MemoryWatch(TrainerData(module).read, PROCESS_S)
    look = watcher(device)

    def read() -> int | None:
        found = look()
        if found is None or found.total_bytes is None or found.free_bytes is None:
            return None
        return found.total_bytes - found.free_bytes

    return MemoryWatch(read, CARD_S)


class TrainerData:
    """VmData, which RLIMIT_DATA limits, of the one process below this one that runs `python -m module`; else 0."""

    def __init__(self, module: str) -> None:
        self._module, self._own = module, psutil.Process()
        self._pid: int | None = None
        self._search_at = 0.0

    def read(self) -> int:
        held = data_bytes(self._pid) if self._pid is not None else 0
        if not held and time.monotonic() >= self._search_at:
            self._search_at = time.monotonic() + _SEARCH_S
            self._pid = self._find()
            held = data_bytes(self._pid) if self._pid is not None else 0
        return held

    def _find(self) -> int | None:
        for process in self._own.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[1:3] == ["-m", self._module]:
                    return process.pid
        return None


def data_bytes(pid: int) -> int:
    """0 where there is no such process any more."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)


def within(samples: Iterable[Sample], begin: float, end: float) -> list[int]:
    """Bytes of the samples of a time."""
    return [used for moment, used in samples if begin <= moment <= end]
