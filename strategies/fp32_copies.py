"""Leave embedding, head and norms in 16 bits instead of upcasting them to float32."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, Preserves, TrainingConfig, Upcast

_ORDER = (Upcast.FP32, Upcast.NORMS, Upcast.NONE)  # most memory first


@dataclass(frozen=True, slots=True, kw_only=True)
class NoFp32Copies:
    """fp32 or norms → none: float32 norms alone make the whole hidden stream float32."""

    name: str = "no_fp32_copies"
    preserves: Preserves = Preserves.EXACT
    why: str = "saves 2 bytes a weight of embedding and head and half the hidden states; they round as 16-bit numbers"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        if config.upcast is Upcast.NONE or config.compute_dtype == "float32":
            return None
        return replace(config, upcast=Upcast.NONE)

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return _ORDER.index(after.upcast) > _ORDER.index(before.upcast)
