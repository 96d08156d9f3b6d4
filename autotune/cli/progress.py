"""A fit as it goes, on stderr: one line a finished trial, and on a terminal what runs now with the time left."""

from __future__ import annotations

import statistics
import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

from autotune.cli.words import describe, mib, outcome
from autotune.values import Device, FitRequest, Prediction, TrainingConfig, TrialRecord

_EXPECTED_PROBES = 8  # of a usual fit; only the guess of the time left rests on it


class FitProgress:
    """Implements the flow's `Observer`."""

    def __init__(self, device: Device, request: FitRequest) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self._device, self._request = device, request
        self._status: Status | None = None
        self._what = ""
        self._phase = ""
        self._began = time.monotonic()
        self._times: list[float] = []
        self._said_first = False
        self._trial_began = self._began

    def __enter__(self) -> FitProgress:
        if self.console.is_terminal:
            self._status = self.console.status("starting")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()

    def trial_starts(self, config: TrainingConfig, reason: str, *, proof: bool) -> None:
        if not self._times:
            self._say_first()
        self._trial_began = time.monotonic()
        self._what = f"{'proving' if proof else 'trying'} {describe(config)} ({reason})"
        self._show()

    def phase(self, name: str) -> None:
        """Hear the phase that a probe enters."""
        self._phase = name
        self._show()

    def trial_ends(self, trial: TrialRecord) -> None:
        self._times.append(time.monotonic() - self._trial_began)
        label = f"{len(self._times):>3} {trial.origin.value}"
        self.console.print(f"{label:<10}{describe(trial.config)}: {outcome(trial)}", markup=False, soft_wrap=True)

    def trial_skipped(self, config: TrainingConfig, prediction: Prediction) -> None:
        if not self._times:
            self._say_first()
        self.console.print(
            f"    skip  {describe(config)}: predicted not to fit, {mib(prediction.peak_allocated_bytes)} of tensors",
            markup=False,
            soft_wrap=True,
        )

    def _say_first(self) -> None:
        if self._said_first:
            return
        self._said_first = True
        start = self._request.start
        self.console.print(
            f"Fitting {self._request.model.name} on {self._device.name}: {start.sequence_length} tokens,"
            f" effective batch {start.effective_batch_size}, real training steps.",
            markup=False,
            soft_wrap=True,
        )

    def _show(self) -> None:
        if self._status:
            left = self._seconds_left()
            ahead = f", about {left:.0f} s left" if left is not None else ""
            self._status.update(f"{self._what} — {self._phase}{ahead}")

    def _seconds_left(self) -> float | None:
        """From the trials so far: a guess, for a fit may take fewer or more."""
        if not self._times:
            return None
        ahead = max(1, _EXPECTED_PROBES - len(self._times)) + 1
        return ahead * statistics.median(self._times)
