"""Keep the optimizer's states in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, Preserves, TrainingConfig

_EIGHT_BIT = {
    "adamw_torch": "adamw_bnb_8bit",
    "adamw_torch_fused": "adamw_bnb_8bit",
    "paged_adamw_32bit": "paged_adamw_8bit",
    "lion_32bit": "lion_8bit",
    "paged_lion_32bit": "paged_lion_8bit",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer8bit:
    """Near, not exact: the states are rounded to 8 bits, block by block, after every step."""

    name: str = "optimizer_8bit"
    preserves: Preserves = Preserves.NEAR
    why: str = "saves 6 of 8 bytes of state a trained parameter; costs precision of the optimizer's states"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        if not request.allow_near or config.optimizer not in _EIGHT_BIT:
            return None
        return replace(config, optimizer=_EIGHT_BIT[config.optimizer])

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return "8bit" in after.optimizer and "8bit" not in before.optimizer
