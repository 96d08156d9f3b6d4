"""Train on shorter samples: it trains something else, so only where the length is ours to choose or with consent."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, Preserves, TrainingConfig

GPU_FLOOR = 512  # tokens, where nobody stated a length
CPU_FLOOR = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ShorterSequence:
    """Half, in whole multiples of 64 tokens (of 8 below that), never under what was allowed."""

    name: str = "shorter_sequence"
    preserves: Preserves = Preserves.CONSENT
    why: str = "saves activations and logits in proportion to the tokens; costs what longer samples would teach"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        floor = _floor(request, device)
        if floor is None or config.sequence_length <= floor:
            return None
        half = config.sequence_length // 2
        return replace(config, sequence_length=max(half - half % (64 if half >= 64 else 8), floor))

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return after.sequence_length < before.sequence_length


def _floor(request: FitRequest, device: Device) -> int | None:
    """The shortest length allowed, in tokens; None where it may not change."""
    if request.min_sequence_length is not None:
        return max(1, request.min_sequence_length)
    if request.sequence_length_stated:
        return None
    return CPU_FLOOR if device.kind == "cpu" else GPU_FLOOR
