"""Use an attention kernel that does not keep the tokens × tokens matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Attention, Device, FitRequest, Preserves, TrainingConfig

_ORDER = (Attention.EAGER, Attention.SDPA, Attention.FLASH_ATTENTION_2)  # most memory first


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel:
    """eager → sdpa → FlashAttention 2. Whether flash-attn is installed is for the caller to know."""

    name: str = "attention_kernel"
    preserves: Preserves = Preserves.EXACT
    why: str = "saves the matrix of tokens × tokens of each head, and time; costs nothing"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        if config.attention is Attention.EAGER:
            return replace(config, attention=Attention.SDPA)
        if config.attention is Attention.SDPA and _runs_flash(config, device):
            return replace(config, attention=Attention.FLASH_ATTENTION_2)
        return None

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return _ORDER.index(after.attention) > _ORDER.index(before.attention)


def _runs_flash(config: TrainingConfig, device: Device) -> bool:
    """Compute capability 8.0 and 16-bit inputs (github.com/Dao-AILab/flash-attention, "NVIDIA CUDA Support")."""
    major = (device.compute_capability or "").partition(".")[0]
    ampere = device.kind == "cuda" and major.isdecimal() and int(major) >= 8
    return ampere and config.compute_dtype != "float32"
