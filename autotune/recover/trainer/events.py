"""Lines that a training process leaves for its supervisor."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any


class Events:
    """Appends one JSON object a line, one write each. Never raises OSError: what could not be written is counted."""

    def __init__(self, path: str | None, rank: int = 0) -> None:
        self.path = path
        self.rank = rank
        self.lost = 0
        self._descriptor: int | None = None
        self._torn = False  # the last line was written in part: a full disk

    def write(self, event: str, **fields: Any) -> None:
        if self.path is None:
            return
        document = {"event": event, "time": time.time(), "pid": os.getpid(), "rank": self.rank, **fields}
        line = (json.dumps(document, default=str, separators=(",", ":")) + "\n").encode()
        try:
            if self._descriptor is None:
                self._descriptor = _open(self.path)
            if self._torn:
                line = b"\n" + line
            written = os.write(self._descriptor, line)
            self._torn = written < len(line)
            self.lost += self._torn
        except OSError:
            self.lost += 1

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o600)


def rank_of(environ: Mapping[str, str] = os.environ) -> int:
    """This process's rank as its launcher says; 0 without one."""
    value = environ.get("RANK") or environ.get("LOCAL_RANK") or "0"
    return int(value) if value.isdecimal() else 0


def world_size_of(environ: Mapping[str, str] = os.environ) -> int:
    value = environ.get("WORLD_SIZE") or "1"
    return int(value) if value.isdecimal() else 1
