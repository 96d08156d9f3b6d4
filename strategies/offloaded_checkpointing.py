"""Hold what checkpointing keeps of each layer in the host's memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, Preserves, TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadedCheckpointing:
    """full → offload, where the device has memory of its own."""

    name: str = "offloaded_checkpointing"
    preserves: Preserves = Preserves.EXACT
    why: str = "saves layers × tokens × hidden size on the GPU; costs two copies a layer over PCIe, and host memory"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        if config.gradient_checkpointing != "full" or device.kind == "cpu" or device.unified_memory:
            return None
        return replace(config, gradient_checkpointing="offload")

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return after.gradient_checkpointing == "offload" and before.gradient_checkpointing != "offload"
