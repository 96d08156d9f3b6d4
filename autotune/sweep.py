"""The flow of a sweep: every config of a plan measured in turn, stored as a fit's trials are, and kept as a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from autotune.errors import Interrupted, ProbeFailed
from autotune.grid import asked
from autotune.landscape import Row
from autotune.tuner import Seams, failure_line, request_id
from autotune.values import (
    Device,
    FitRequest,
    Isolation,
    Origin,
    Prediction,
    ProbeRequest,
    TrainingConfig,
    TrialRecord,
    Verdict,
)

IN_A_ROW = 3  # failures that are not about memory, after which a sweep gives up
_MEASURED = (Verdict.FITS, Verdict.DEVICE_OOM, Verdict.SPILL)
_RETRIED = (Verdict.AMBIGUOUS, Verdict.TIMEOUT, Verdict.DEVICE_LOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A config that died of something other than memory: no row says anything of it."""

    config: TrainingConfig
    reason: str


class Sweep:
    """One sweep on one device. Every trial is in the store before it is shown, and then a row."""

    def __init__(
        self, request: FitRequest, device: Device, seams: Seams, *, headroom_bytes: int, micro_batches: int
    ) -> None:
        self.request, self.device, self.seams = request, device, seams
        self.headroom_bytes, self.micro_batches = headroom_bytes, micro_batches

    def start_worker(self, config: TrainingConfig) -> float:
        """Seconds of a new process up to its first micro batch; later probes find it warm.

        Raises `ProbeFailed` where `config` dies of something other than memory, before an hour is spent on it.
        """
        trial = self._measured(config, "starts a worker", micro_batches=1)
        if trial.judgement.verdict not in _MEASURED:
            raise _error(trial)
        return trial.report.startup_s

    def run(self, configs: Sequence[TrainingConfig], keep: Callable[[Row], None]) -> Iterable[Failed]:
        """Measure each, `keep` its row, and give those that failed as they do.

        Raises `ProbeFailed` after `IN_A_ROW` failures one after the other, `Interrupted`, `StoreError`.
        """
        failures = 0
        for number, config in enumerate(configs, start=1):
            trial = self._measured(config, f"{number} of {len(configs)}", micro_batches=self.micro_batches)
            if trial.judgement.verdict in _MEASURED:
                failures = 0
                keep(row_of(trial, self.expected(config), on_cpu=self.device.kind == "cpu"))
                continue
            failures += 1
            if failures == IN_A_ROW:
                raise _error(trial)
            yield Failed(config=config, reason=failure_line(trial))

    def expected(self, config: TrainingConfig) -> Prediction | None:
        """With nothing learned in it."""
        return self.seams.predictor.expect(config) if self.seams.predictor else None

    def _measured(self, config: TrainingConfig, reason: str, *, micro_batches: int) -> TrialRecord:
        """The trial, the second one where the first may have had bad luck. Raises `Interrupted`."""
        self.seams.observer.trial_starts(config, reason, proof=False)
        trial = self._trial(config, micro_batches, fresh=False)
        if trial.judgement.verdict in _RETRIED:
            again = f"{trial.judgement.verdict}: once more, in a fresh worker"
            self.seams.observer.trial_starts(config, again, proof=False)
            trial = self._trial(config, micro_batches, fresh=True)
        if trial.judgement.verdict is Verdict.INTERRUPTED:
            raise Interrupted("a probe was interrupted; everything measured is kept")
        return trial

    def _trial(self, config: TrainingConfig, micro_batches: int, *, fresh: bool) -> TrialRecord:
        """Predict, probe, judge, store, tell: as a fit does."""
        seams, request = self.seams, asked(self.request, config)
        probe = ProbeRequest(
            model=request.model,
            config=config,
            device=self.device.id,
            memory_limit_bytes=request.memory_limit_bytes,
            headroom_bytes=self.headroom_bytes,
            micro_batches=micro_batches,
        )
        prediction = seams.predictor.predict(config) if seams.predictor else None  # before the probe runs
        seams.judge.begin()
        report = seams.executor.probe(probe, fresh=fresh or request.isolation is Isolation.FRESH)
        trial = seams.store.append(
            TrialRecord(
                request_id=request_id(request, self.headroom_bytes),
                model_name=request.model.name,
                model_fingerprint=request.model.fingerprint,
                device_slug=self.device.slug,
                config=config,
                memory_limit_bytes=request.memory_limit_bytes,
                report=report,
                judgement=seams.judge.judge(report, probe),
                environment=seams.executor.environment(),
                origin=Origin.PROBE,
                time_utc=seams.now_utc(),
                prediction=prediction,
            )
        )
        if seams.predictor:
            seams.predictor.learn(trial)
        seams.observer.trial_ends(trial)
        return trial


def row_of(trial: TrialRecord, predicted: Prediction | None, *, on_cpu: bool) -> Row:
    """What a landscape keeps of a trial: what did not fit has no times, and its need is not known."""
    report, fits = trial.report, trial.judgement.verdict is Verdict.FITS
    needed = report.peak_reserved_bytes if on_cpu else report.device_used_bytes
    return Row(
        config=trial.config,
        verdict=trial.judgement.verdict,
        needed_bytes=needed if fits else None,
        peak_allocated_bytes=report.peak_allocated_bytes,
        peak_reserved_bytes=report.peak_reserved_bytes,
        tried_bytes=None if fits else trial.judgement.numbers.get("tried_bytes"),
        micro_batch_times_s=report.micro_batch_times_s if fits else (),
        optimizer_times_s=report.optimizer_times_s if fits else (),
        startup_s=report.startup_s,
        predicted=predicted,
    )


def _error(trial: TrialRecord) -> ProbeFailed:
    return ProbeFailed(failure_line(trial), worker_exit_code=trial.report.exit_code, stderr_tail=trial.report.log_tail)
