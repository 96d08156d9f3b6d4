"""Smaller adapters: fewer trained parameters, so only with consent."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, Preserves, TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerRank:
    """Half the rank, never under what was allowed. Alpha follows, so that alpha ÷ rank, the adapters' scale, stays.

    Alpha is a whole number: where half the rank has none, the next lower rank that has one.
    """

    name: str = "lower_rank"
    preserves: Preserves = Preserves.CONSENT
    why: str = "saves adapters, their gradients and states in proportion to the rank; costs what they can learn"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        if request.min_lora_rank is None:
            return None
        floor = max(1, request.min_lora_rank)
        highest = min(max(config.lora_rank // 2, floor), config.lora_rank - 1)
        for rank in range(highest, floor - 1, -1):
            alpha, rest = divmod(config.lora_alpha * rank, config.lora_rank)
            if rest == 0:
                return replace(config, lora_rank=rank, lora_alpha=alpha)
        return None

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return after.lora_rank < before.lora_rank
