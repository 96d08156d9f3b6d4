"""What a trainer under fault injection did, on disk before it goes on; and what it would have done undisturbed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

LEDGER = "ledger.jsonl"
FIRST_STATE = hashlib.sha256(b"untrained").hexdigest()
PEAK_RATE = 2e-4


@dataclass(frozen=True)
class Task:
    """A training run's data and length. Samples come in the same order whatever the micro batch."""

    samples: int
    max_steps: int
    effective_batch: int
    seed: int = 0

    @cached_property
    def order(self) -> list[list[int]]:
        """Sample ids of each optimizer step, from step 1."""
        ids = list(self._ids())
        size = self.effective_batch
        return [ids[step * size : (step + 1) * size] for step in range(self.max_steps)]

    def _ids(self) -> Iterator[int]:
        for epoch in range(-(-self.max_steps * self.effective_batch // self.samples)):
            ids = list(range(self.samples))
            random.Random(f"{self.seed} {epoch}").shuffle(ids)
            yield from ids

    def final_state(self) -> str:
        """Of a run that nothing disturbed."""
        state = FIRST_STATE
        for step, ids in enumerate(self.order, 1):
            state = advance(state, step, ids, rate_at(step, self.max_steps))
        return state


def rate_at(step: int, max_steps: int) -> float:
    """Learning rate of an optimizer step: linear to zero."""
    return PEAK_RATE * (1 - (step - 1) / max_steps)


def advance(state: str, step: int, ids: Iterable[int], rate: float) -> str:
    """The state after one optimizer step: another step, sample, order or learning rate leads to another state."""
    return hashlib.sha256(f"{state} {step} {list(ids)} {rate:.12g}".encode()).hexdigest()


class Ledger:
    """Lines appended to one file: each is on disk before `write` returns."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        self.attempt = 1 + sum(entry["event"] == "start" for entry in read_ledger(folder))

    def write(self, event: str, **facts: Any) -> None:
        entry = {"event": event, "attempt": self.attempt, "clock": time.monotonic(), "pid": os.getpid(), **facts}
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, (json.dumps(entry) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """All whole lines, oldest first; a line that a kill cut short is none."""
    try:
        lines = (folder / LEDGER).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def of(entries: Sequence[dict[str, Any]], event: str, attempt: int | None = None) -> list[dict[str, Any]]:
    """The entries of one kind, of one attempt or of all."""
    return [entry for entry in entries if entry["event"] == event and attempt in (None, entry.get("attempt"))]
