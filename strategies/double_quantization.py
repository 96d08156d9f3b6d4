"""Quantise the scales of the 4-bit weights too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, Preserves, Quantization, TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DoubleQuantization:
    """Near, not exact: rounded scales make slightly other frozen weights."""

    name: str = "double_quantization"
    preserves: Preserves = Preserves.NEAR
    why: str = "saves 0.047 bytes a 4-bit weight (about 0.3 GiB of 7 billion); costs precision of the frozen weights"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        if not request.allow_near or config.double_quant or config.quantization is not Quantization.NF4:
            return None
        return replace(config, double_quant=True)

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return after.double_quant and not before.double_quant
