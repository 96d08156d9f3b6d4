"""What a fit expects of a config before it probes it, corrected by what its probes measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from autotune.errors import InvalidRequest
from autotune.hardware.cards import Card, find_card
from autotune.mix import timed_lengths
from autotune.predict.context import context_of_capability
from autotune.predict.forecast import Forecast, Target, cannot_fit, cpu_target, target_of_card
from autotune.predict.kernels import kernels_of
from autotune.predict.learned import learn, with_learned
from autotune.predict.steptime import forecast_time
from autotune.predict.trace import NotAlike
from autotune.probe.dry_run import DryRunner
from autotune.values import Device, Environment, LengthMix, ModelSource, Prediction, TrainingConfig, TrialRecord

logger = logging.getLogger(__name__)


class FitPredictor:
    """Implements the flow's `Predictor`: a config that cannot be traced has no prediction, and is probed.

    `target` says the headroom too. `history` gives what is stored of this device; it is asked once, before the first
    prediction. `card` stands in for the target's, where that has none, in `seconds` alone. With `lengths` times are of
    micro batches as long as theirs; memory is of full length.
    """

    def __init__(
        self,
        runner: DryRunner,
        source: ModelSource,
        target: Target,
        environment: Environment,
        history: Callable[[], Sequence[TrialRecord]] = lambda: (),
        *,
        card: Card | None = None,
        lengths: LengthMix | None = None,
    ) -> None:
        self._runner, self._source, self._plain = runner, source, target
        self._environment = environment
        self._history = history
        self._trials: list[TrialRecord] | None = None
        self._target = target
        self._card = target.card or card  # of the steps' time
        self._lengths = lengths

    def predict(self, config: TrainingConfig) -> Prediction | None:
        """What is expected, with what was learned. Raises `Interrupted`, `StoreError`."""
        self._known()
        return self._predicted(config, self._target)

    def hopeless(self, config: TrainingConfig) -> bool:
        """Whether even the low end of what is expected is above what may be used."""
        self._known()
        found = self._forecast(config, self._target)
        return found is not None and cannot_fit(found)

    @property
    def allowed_bytes(self) -> int | None:
        return self._plain.allowed_bytes

    def at_hand(self, config: TrainingConfig) -> bool:
        return all(self._runner.has(self._source, one, self._plain.kernels) for one in (config, *self._timed(config)))

    def prepare(self, configs: Iterable[TrainingConfig]) -> None:
        """Make the traces of these side by side. Raises `Interrupted`, and `DryRunFailed` where no process starts."""
        every = [one for config in configs for one in (config, *self._timed(config))]
        self._runner.prepare(self._source, every, self._plain.kernels)

    def seconds(self, config: TrainingConfig) -> Mapping[str, float] | None:
        """None where the config cannot be traced, or nothing is known of the card. Raises `Interrupted`."""
        found = [self._seconds(one) for one in self._timed(config) or (config,)]
        each = [seconds for seconds in found if seconds is not None]
        if len(each) < len(found):
            return None
        kinds = dict.fromkeys(kind for seconds in each for kind in seconds)
        return {kind: sum(seconds.get(kind, 0.0) for seconds in each) / len(each) for kind in kinds}

    def _seconds(self, config: TrainingConfig) -> Mapping[str, float] | None:
        """At the config's own length."""
        if self._card is None:
            return None
        try:
            trace = self._runner.trace(self._source, config, self._plain.kernels)
            return forecast_time(trace, config, self._card).by_kind
        except (InvalidRequest, NotAlike) as error:
            logger.debug("no prediction: %s", error)
            return None

    def expect(self, config: TrainingConfig) -> Prediction | None:
        """Raises `Interrupted`."""
        return self._predicted(config, self._plain)

    def learn(self, trial: TrialRecord) -> None:
        """Take a trial of this fit in: the next prediction goes by it too."""
        self._relearn([*self._known(), trial])

    def close(self) -> None:
        self._runner.close()

    def _known(self) -> list[TrialRecord]:
        if self._trials is None:
            self._relearn(list(self._history()))
        return self._trials or []

    def _relearn(self, trials: list[TrialRecord]) -> None:
        self._trials = trials
        learned = learn(trials, self._environment, model_fingerprint=self._source.fingerprint)
        self._target = with_learned(self._plain, learned)

    def _timed(self, config: TrainingConfig) -> tuple[TrainingConfig, ...]:
        """The config at each length that its micro batches are timed at; (): at its own alone."""
        lengths = timed_lengths(config, self._lengths) if self._lengths else ()
        return tuple(replace(config, sequence_length=length) for length in lengths)

    def _predicted(self, config: TrainingConfig, target: Target) -> Prediction | None:
        found = self._forecast(config, target)
        if found is None:
            return None
        seconds, prediction = self.seconds(config), found.prediction()
        if self._timed(config) and prediction.step_time_s is not None:
            full = self._seconds(config)
            share = sum(seconds.values()) / sum(full.values()) if seconds and full else None
            step_time_s = prediction.step_time_s * share if share else None
            prediction = replace(prediction, step_time_s=step_time_s)
        return replace(prediction, seconds_by_kind=dict(seconds) if seconds else None)

    def _forecast(self, config: TrainingConfig, target: Target) -> Forecast | None:
        try:
            return self._runner.forecast(self._source, config, target)
        except (InvalidRequest, NotAlike) as error:
            logger.debug("no prediction: %s", error)
            return None


def target_of_device(device: Device, limit_bytes: int | None) -> Target:
    """A device of this machine as a target: its card's facts where the catalogue has it, and what is in use now."""
    if device.kind == "cpu":
        return cpu_target(device.name, limit_bytes)
    card = _card_of(device)
    if card is not None:
        target = target_of_card(card)
    else:
        target = Target(
            name=device.name,
            kernels=kernels_of(_VENDOR[device.kind], device.compute_capability),
            capacity_bytes=None,
            context=context_of_capability(device.compute_capability),
        )
    others = max(0, (device.total_bytes or 0) - device.free_bytes) if device.free_bytes is not None else 0
    return replace(
        target,
        name=device.name,
        capacity_bytes=limit_bytes or device.total_bytes,
        total_bytes=device.total_bytes,
        others_bytes=others,
    )


_VENDOR = {"cuda": "nvidia", "rocm": "amd", "xpu": "intel"}


def _card_of(device: Device) -> Card | None:
    """The catalogue's card of that name; a MIG slice, which has its card's name, is another."""
    if device.mig not in (None, "enabled"):
        return None
    try:
        return find_card(device.name).card
    except InvalidRequest:
        return None
