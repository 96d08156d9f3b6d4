"""What a fit expects of a config before it probes it, corrected by what its probes measured."""

from __future__ import annotations

import logging
import statistics
from dataclasses import replace

from autotune.errors import InvalidRequest
from autotune.hardware.cards import Card, find_card
from autotune.predict.forecast import Forecast, Target, cannot_fit, cpu_target, forecast, target_of_card
from autotune.predict.kernels import KernelSet
from autotune.predict.trace import NotAlike
from autotune.probe.dry_run import DryRunner
from autotune.values import Device, ModelSource, Prediction, TrainingConfig, TrialRecord

logger = logging.getLogger(__name__)

LARGEST_CORRECTION = 1.25  # a ratio beyond it, either way, is no error of a prediction but another cause


class FitPredictor:
    """Implements the flow's `Predictor`: a config that cannot be traced has no prediction, and is probed."""

    def __init__(self, runner: DryRunner, source: ModelSource, target: Target, usable_bytes: int | None) -> None:
        self._runner, self._source, self._target = runner, source, target
        self._usable_bytes = usable_bytes
        self._ratios: list[float] = []
        self._time_ratios: list[float] = []

    def predict(self, config: TrainingConfig) -> Prediction | None:
        """What is expected, with what was learned. Raises `Interrupted`."""
        found = self._forecast(config)
        if found is None:
            return None
        memory, time = self._correction(self._ratios), self._correction(self._time_ratios)
        plain = found.prediction()
        return replace(
            plain,
            peak_allocated_bytes=round(plain.peak_allocated_bytes * memory),
            step_time_s=plain.step_time_s * time if plain.step_time_s else None,
        )

    def hopeless(self, config: TrainingConfig) -> bool:
        """Whether even the low end of what is expected is above what may be used."""
        found = self._forecast(config)
        if found is None or self._usable_bytes is None:
            return False
        return cannot_fit(found, round(self._usable_bytes / min(1.0, self._correction(self._ratios))))

    def learn(self, trial: TrialRecord) -> None:
        """Take the ratio of what a trial measured to what was expected of it, without its earlier correction."""
        found = self._forecast(trial.config) if trial.prediction is not None else None
        if found is None:
            return
        if trial.report.peak_allocated_bytes and trial.judgement.verdict == "fits":
            self._ratios.append(trial.report.peak_allocated_bytes / found.memory.peak_allocated_bytes)
        measured = trial.report.step_time_s(trial.config.gradient_accumulation_steps)
        if found.step_time_s and measured:
            self._time_ratios.append(measured / found.step_time_s)

    def close(self) -> None:
        self._runner.close()

    def _correction(self, ratios: list[float]) -> float:
        usual = statistics.median(ratios) if ratios else 1.0
        if ratios is self._ratios and not 1 / LARGEST_CORRECTION <= usual <= LARGEST_CORRECTION:
            return 1.0
        return usual

    def _forecast(self, config: TrainingConfig) -> Forecast | None:
        try:
            trace = self._runner.trace(self._source, config, self._target.kernels)
            return forecast(trace, config, self._target)
        except (InvalidRequest, NotAlike) as error:
            logger.debug("no prediction: %s", error)
            return None


def target_of_device(device: Device, limit_bytes: int | None) -> Target:
    """A device of this machine as a target: its card's facts where the catalogue has it."""
    if device.kind == "cpu":
        return cpu_target(device.name, limit_bytes)
    card: Card | None
    try:
        card = find_card(device.name).card
    except InvalidRequest:
        card = None
    capacity = limit_bytes or device.total_bytes
    if card is not None:
        return replace(target_of_card(card), name=device.name, capacity_bytes=capacity)
    major = (device.compute_capability or "").split(".")[0]
    return Target(
        name=device.name,
        kernels=KernelSet(sdpa_flash=not major.isdecimal() or int(major) >= 8),
        capacity_bytes=capacity,
    )
