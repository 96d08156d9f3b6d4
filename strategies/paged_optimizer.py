"""Let the driver move the optimizer's states to the host when the card is full."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, Preserves, TrainingConfig

_PAGED = {
    "adamw_torch": "paged_adamw_32bit",
    "adamw_torch_fused": "paged_adamw_32bit",
    "adamw_bnb_8bit": "paged_adamw_8bit",
    "adamw_8bit": "paged_adamw_8bit",
    "lion_32bit": "paged_lion_32bit",
    "lion_8bit": "paged_lion_8bit",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedOptimizer:
    """The same update from managed memory, which a virtual GPU may not offer; the CPU's bitsandbytes has none."""

    name: str = "paged_optimizer"
    preserves: Preserves = Preserves.EXACT
    why: str = "saves the optimizer's states at the peak (little for LoRA); costs copies over PCIe at each step"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        pages = device.kind != "cpu" and not device.unified_memory and not device.virtual
        if not pages or config.optimizer not in _PAGED:
            return None
        return replace(config, optimizer=_PAGED[config.optimizer])

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return after.optimizer.startswith("paged_") and not before.optimizer.startswith("paged_")
