"""Recompute every layer in backward, keeping only what goes in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, Preserves, TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FullCheckpointing:
    """off or some layers → all layers."""

    name: str = "full_checkpointing"
    preserves: Preserves = Preserves.EXACT
    why: str = "saves the activations of all layers but one; costs about a second forward"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        if config.gradient_checkpointing in ("full", "offload"):
            return None
        return replace(config, gradient_checkpointing="full")

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return after.gradient_checkpointing == "full" and before.gradient_checkpointing not in ("full", "offload")
