"""What configs are expected to need after a run has died: predictions corrected by what it measured. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autotune.protocols import Predictor
from autotune.search.remember import needed_bytes
from autotune.search.space import needs_at_least
from autotune.values import AllocatorSetting, Prediction, TrainingConfig, TrialRecord, Verdict

MARGIN = 0.03  # of what is allowed: predicted peaks were within 1.1 % of 21 of 22 published ones (docs)


def needs_as_much(config: TrainingConfig, died: TrainingConfig) -> bool:
    """Whether `config` surely takes as much as one that ran out: no setting saves memory, and no fewer tokens are live.

    Activations and logits go with the tokens of a micro batch, attention rather with their square.
    """
    alike = replace(
        config,
        micro_batch_size=died.micro_batch_size,
        sequence_length=died.sequence_length,
        eval_micro_batch_size=died.eval_micro_batch_size,
        world_size=died.world_size,
    )
    return needs_at_least(alike, died) and tokens_of(config) >= tokens_of(died)


def tokens_of(config: TrainingConfig) -> int:
    """Of one micro batch."""
    return config.micro_batch_size * config.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What this run itself showed: a batch that passed, and the one that did not."""

    died: TrainingConfig  # at the batch that it died on
    fitted: TrainingConfig | None = None  # at the longest batch that passed
    fitted_bytes: int | None = None  # its peak, in the terms of `allowed_bytes`
    wanted_bytes: int | None = None  # held and asked for when it died: a lower bound of the need, in the same terms


class Expected:
    """Need and speed of configs, in the terms of `allowed_bytes`."""

    def __init__(
        self, predictor: Predictor | None, allowed_bytes: int | None, measured: Measured, *, on_cpu: bool
    ) -> None:
        self._predictor, self._measured, self._on_cpu = predictor, measured, on_cpu
        self._seen: dict[TrainingConfig, Prediction | None] = {}
        at_death = self.prediction(measured.died)
        plain = needed_bytes(at_death) if at_death else None
        stated = allowed_bytes if allowed_bytes is not None else predictor.allowed_bytes if predictor else None
        self.allowed_bytes: float | None = stated if stated is not None else plain
        self._short = 0.0  # how far the death was predicted too low, at least
        if plain is not None and self.allowed_bytes is not None:
            self._short = max(self.allowed_bytes, measured.wanted_bytes or 0) - plain

    def prediction(self, config: TrainingConfig) -> Prediction | None:
        """Nothing of this run in it; None where nothing can be predicted."""
        if config not in self._seen:
            self._seen[config] = self._predictor.predict(config) if self._predictor else None
        return self._seen[config]

    def need(self, config: TrainingConfig) -> float | None:
        """Bytes that `config` is expected to need: what is predicted, moved by how far off it was where this run is
        known to have been; without a prediction on the line between the batch that passed and the one that did not.
        """
        found = self.prediction(config)
        if found is None:
            return self._between(config)
        plain = needed_bytes(found)
        return plain + max(self._off(found), self._short)

    def _off(self, found: Prediction) -> float:
        """How much more is needed than predicted, by the longest batch that passed; 0 where that is not known."""
        measured = self._measured
        then = self.prediction(measured.fitted) if measured.fitted and measured.fitted_bytes else None
        if then is None or measured.fitted_bytes is None:
            return 0.0
        if self._on_cpu:
            return measured.fitted_bytes - needed_bytes(then)  # whatever else the process holds is in it
        training = then.training_peak_allocated_bytes or then.peak_allocated_bytes
        share = measured.fitted_bytes / training - 1
        return max(measured.fitted_bytes - training, share * found.peak_allocated_bytes)

    def _between(self, config: TrainingConfig) -> float | None:
        died, fitted, low = self._measured.died, self._measured.fitted, self._measured.fitted_bytes
        if fitted is None or low is None or self.allowed_bytes is None:
            return None
        same = _settings(config) == _settings(died) == _settings(fitted)
        wide = tokens_of(died) - tokens_of(fitted)
        if not same or wide <= 0:
            return None
        high = max(self.allowed_bytes, self._measured.wanted_bytes or 0)
        return low + (tokens_of(config) - tokens_of(fitted)) * (high - low) / wide

    def fits(self, config: TrainingConfig, *, margin: float = MARGIN) -> bool | None:
        """Whether it is expected to; None: not known."""
        need = self.need(config)
        if need is None or self.allowed_bytes is None:
            return None
        if self.prediction(config) is None and need <= (self._measured.fitted_bytes or 0):
            return True  # no more tokens than passed
        return need <= (1 - margin) * self.allowed_bytes

    def has_passed(self, config: TrainingConfig) -> bool:
        """Whether this run's own batches, larger than this one and with the same settings, passed."""
        fitted = self._measured.fitted
        return (
            fitted is not None
            and _settings(fitted) == _settings(config)
            and tokens_of(config) <= tokens_of(fitted)
            and config.sequence_length <= fitted.sequence_length
        )


def trial_that_fits(
    config: TrainingConfig, trials: Sequence[TrialRecord], allowed_bytes: float | None, *, on_cpu: bool
) -> TrialRecord | None:
    """The stored trial that ran these settings at this length or a longer one, within what is allowed now."""
    found = [
        trial
        for trial in trials
        if trial.judgement.verdict is Verdict.FITS
        and _settings(trial.config) == _settings(config)
        and trial.config.micro_batch_size >= config.micro_batch_size
        and trial.config.sequence_length >= config.sequence_length
        and (used := trial.report.peak_reserved_bytes if on_cpu else trial.report.device_used_bytes) is not None
        and (allowed_bytes is None or used <= allowed_bytes)
    ]
    return min(found, key=lambda trial: (tokens_of(trial.config), -(trial.id or 0)), default=None)


def died_in_trials(trials: Sequence[TrialRecord], allowed_bytes: float | None) -> list[TrainingConfig]:
    """Configs of stored trials that ran out of memory where there was as much of it as now."""
    return [
        trial.config
        for trial in trials
        if trial.judgement.verdict in (Verdict.DEVICE_OOM, Verdict.SPILL)
        and allowed_bytes is not None
        and (trial.report.limit_bytes or 0) >= allowed_bytes
    ]


def _settings(config: TrainingConfig) -> TrainingConfig:
    """The config without its sizes, and with the allocator that was always had."""
    return replace(
        config,
        sequence_length=1,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        world_size=1,
        eval_micro_batch_size=None,
        allocator=AllocatorSetting.DEFAULT,
    )
