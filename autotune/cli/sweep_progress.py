"""A sweep as it goes, on stderr: one line a config, with how many are left."""

from __future__ import annotations

import statistics
import time

from autotune.cli.progress import FitProgress
from autotune.cli.words import describe, outcome
from autotune.values import Device, FitRequest, TrainingConfig, TrialRecord


class SweepProgress(FitProgress):
    """Implements the flow's `Observer`; `todo` configs are to be measured, `known` of the grid were before."""

    def __init__(self, device: Device, request: FitRequest, *, todo: int, known: int) -> None:
        super().__init__(device, request)
        self._todo, self._known = todo, known
        self._label = ""

    def trial_starts(self, config: TrainingConfig, reason: str, *, proof: bool) -> None:
        self._label = reason
        super().trial_starts(config, reason, proof=proof)

    def trial_ends(self, trial: TrialRecord) -> None:
        self._times.append(time.monotonic() - self._trial_began)
        self.console.print(f"{self._label}: {describe(trial.config)}: {outcome(trial)}", markup=False, soft_wrap=True)

    def _say_first(self) -> None:
        if self._said_first:
            return
        self._said_first = True
        known = f", {self._known} more are there already" if self._known else ""
        self.console.print(
            f"Sweeping {self._request.model.name} on {self._device.name}: {self._todo} configs{known},"
            f" effective batch {self._request.start.effective_batch_size}, real training steps.",
            markup=False,
            soft_wrap=True,
        )

    def _seconds_left(self) -> float | None:
        """From the probes so far; the first starts a worker, and is no config of the grid."""
        if len(self._times) < 2:
            return None
        return max(1, self._todo - len(self._times) + 1) * statistics.mean(self._times[1:])
