"""One store in memory, for replays and tests. It imports nothing heavy: processes that only count imports use it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from autotune.values import TrialRecord


@dataclass(slots=True)
class MemoryStore:
    """A `TrialStore` that forgets with the process."""

    rows: list[TrialRecord] = field(default_factory=list)

    def append(self, trial: TrialRecord) -> TrialRecord:
        self.rows.append(replace(trial, id=len(self.rows) + 1))
        return self.rows[-1]

    def trials(self, *, model_fingerprint: str | None = None, request_id: str | None = None) -> list[TrialRecord]:
        return [
            row
            for row in self.rows
            if model_fingerprint in (None, row.model_fingerprint) and request_id in (None, row.request_id)
        ]
