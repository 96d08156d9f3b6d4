"""The processes behind the ranks, and what memory an attempt's processes hold."""

from __future__ import annotations

import os

from autotune.recover.keeper import Process, is_same
from autotune.recover.progress import Told


class Ranks:
    """The processes of the ranks: one that is gone while the others go on has died without a word."""

    def __init__(self) -> None:
        self._seen: dict[int, Process] = {}  # by pid: told, and found among the command's processes
        self._asked: set[int] = set()
        self.gone_at: float | None = None

    def unknown(self, told: Told) -> bool:
        return any(pid not in self._asked for _, pid in told.pids)

    def learn(self, told: Told, found: list[Process]) -> None:
        """A pid of another namespace (a container's) names nothing here, and is not looked for."""
        pids = {pid for _, pid in told.pids}
        self._asked |= pids
        self._seen |= {process.pid: process for process in found if process.pid in pids}

    def look(self, told: Told, now: float) -> None:
        """A rank is there as long as one process that spoke for it is: its data workers may have spoken too."""
        there: dict[int, bool] = {}
        for rank, pid in told.pids:
            if pid in self._seen:
                there[rank] = there.get(rank, False) or is_same(self._seen[pid])
        if all(there.values()):
            self.gone_at = None
        elif self.gone_at is None:
            self.gone_at = now


def is_below(process: Process, pids: set[int], processes: dict[int, Process]) -> bool:
    """Whether one of `pids` has started it, at any remove."""
    seen: set[int] = set()
    parent = process.parent
    while parent in processes and parent not in seen:
        if parent in pids:
            return True
        seen.add(parent)
        parent = processes[parent].parent
    return False


def rss_bytes(process: Process) -> int:
    """Resident memory; pages that processes share count for each of them."""
    try:
        with open(f"/proc/{process.pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
