"""Compute head and cross-entropy in blocks of tokens, so that the whole logits never exist at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, LossPath, Preserves, Trainer, TrainingConfig

_ORDER = (LossPath.FULL, LossPath.CHUNKED, LossPath.LIGER)  # most memory first


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedOrChunkedLoss:
    """full → chunked → Liger's fused kernel. Whether liger-kernel is installed is for the caller to know.

    trl from 1.15 keeps its own chunked head where Liger is asked for, so there the last step changes nothing.
    """

    name: str = "fused_or_chunked_loss"
    preserves: Preserves = Preserves.EXACT
    why: str = "saves 12-16 bytes for each token and vocabulary entry; costs a second pass through the head"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        if config.loss is LossPath.FULL:
            return replace(config, loss=LossPath.CHUNKED)
        runs_liger = device.kind in ("cuda", "rocm") and config.trainer is not Trainer.TRL
        if config.loss is LossPath.CHUNKED and runs_liger:
            return replace(config, loss=LossPath.LIGER)
        return None

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return _ORDER.index(after.loss) > _ORDER.index(before.loss)
