"""Peaks of the device that a trainer runs on, at a cost that does not show."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

_INTERVAL_S = 1.0
_STATUS = "/proc/self/status"


class Peaks:
    """Peak allocated and reserved bytes so far: torch's counters on CUDA, VmHWM and the largest VmData on the CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.allocated: int | None = None
        self.reserved: int | None = None
        self._next = 0.0

    def read(self, *, now: bool = False) -> None:
        """Look again, at most once a second unless it must be `now`."""
        clock = time.monotonic()
        if clock < self._next and not now:
            return
        self._next = clock + _INTERVAL_S
        if self.device.startswith("cuda"):
            self._read_cuda()
        elif self.device.startswith("cpu"):
            self._read_process()

    def _read_cuda(self) -> None:
        torch = sys.modules["torch"]
        if not torch.cuda.is_initialized():
            return
        statistics = torch.cuda.memory_stats_as_nested_dict(self.device)
        if statistics:
            self.allocated = statistics["allocated_bytes"]["all"]["peak"]
            self.reserved = statistics["reserved_bytes"]["all"]["peak"]

    def _read_process(self) -> None:
        try:
            with open(_STATUS, encoding="ascii", errors="replace") as file:
                fields = dict(line.split(":", 1) for line in file if line.startswith(("VmHWM", "VmData")))
        except OSError:
            return
        if "VmHWM" in fields and "VmData" in fields:
            self.allocated = int(fields["VmHWM"].split()[0]) * 1024
            self.reserved = max(self.reserved or 0, int(fields["VmData"].split()[0]) * 1024)


def device_total_bytes(device: str) -> int | None:
    """Memory of the device; of the CPU what this process may use (its RLIMIT_DATA, else the machine's)."""
    if device.startswith("cuda"):
        properties: Any = sys.modules["torch"].cuda.get_device_properties(device)
        return int(properties.total_memory)
    if not device.startswith("cpu"):
        return None
    limit = _data_limit()
    if limit is not None:
        return limit
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _data_limit() -> int | None:
    try:
        import resource
    except ImportError:  # no POSIX system
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else soft
