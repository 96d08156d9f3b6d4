"""The seams: what the flow needs of a prober, a store, a device reader and a strategy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from autotune.values import (
    Device,
    Environment,
    FitRequest,
    Prediction,
    Preserves,
    ProbeReport,
    ProbeRequest,
    TrainingConfig,
    TrialRecord,
)


class Strategy(Protocol):
    """One memory-saving move."""

    @property
    def name(self) -> str: ...

    @property
    def preserves(self) -> Preserves: ...

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        """The next config down, or None where the move does not apply or has no consent."""
        ...


class ProbeExecutor(Protocol):
    """Runs probes. Raises `Interrupted` when the user stops it; never raises for a probe that dies."""

    def probe(self, request: ProbeRequest, *, fresh: bool = False) -> ProbeReport: ...

    def environment(self) -> Environment: ...

    def close(self) -> None: ...


class Predictor(Protocol):
    """Says what to expect of a config before it is probed, and learns from what was measured."""

    def predict(self, config: TrainingConfig) -> Prediction | None:
        """None where it cannot be predicted."""
        ...

    def hopeless(self, config: TrainingConfig) -> bool:
        """Whether a probe would be wasted: even the low end of what is expected does not fit."""
        ...

    def learn(self, trial: TrialRecord) -> None: ...

    @property
    def allowed_bytes(self) -> int | None:
        """What `Prediction.device_used_bytes` may reach; None: not known."""
        ...

    def prepare(self, configs: Iterable[TrainingConfig]) -> None:
        """Make the dry runs of these, side by side, so that what is asked next is at hand."""
        ...

    def at_hand(self, config: TrainingConfig) -> bool:
        """Whether `seconds` and `expect` answer without a dry run."""
        ...

    def seconds(self, config: TrainingConfig) -> Mapping[str, float] | None:
        """Of an optimizer step by kind of operator, with nothing learned in it; quick once a trace is at hand."""
        ...

    def expect(self, config: TrainingConfig) -> Prediction | None:
        """As `predict`, with nothing learned in it."""
        ...


class TrialStore(Protocol):
    """Keeps trials. Append only; raises `StoreError`."""

    def append(self, trial: TrialRecord) -> TrialRecord:
        """Committed when this returns; gives the trial back with its row id."""
        ...

    def trials(self, *, model_fingerprint: str | None = None, request_id: str | None = None) -> list[TrialRecord]: ...


class DeviceReader(Protocol):
    """Says what devices this machine has, best memory first within a kind."""

    def devices(self) -> Iterable[Device]: ...
