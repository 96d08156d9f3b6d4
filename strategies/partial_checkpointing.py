"""Recompute every second layer in backward instead of keeping its activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, Preserves, TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialCheckpointing:
    """off → every_2."""

    name: str = "partial_checkpointing"
    preserves: Preserves = Preserves.EXACT
    why: str = "saves the activations of every second layer; costs their forward a second time"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        return replace(config, gradient_checkpointing="every_2") if config.gradient_checkpointing == "off" else None

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        after_n, before_n = _interval(after.gradient_checkpointing), _interval(before.gradient_checkpointing)
        return after_n is not None and (
            before.gradient_checkpointing == "off" or (before_n is not None and before_n > after_n)
        )


def _interval(checkpointing: str) -> int | None:
    return int(checkpointing.removeprefix("every_")) if checkpointing.startswith("every_") else None
