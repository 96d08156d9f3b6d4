"""Fewer samples at once and more accumulation, the effective batch kept exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, Preserves, TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallerMicroBatch:
    """To the next smaller divisor of effective batch ÷ world size; the evaluation's batch follows."""

    name: str = "smaller_micro_batch"
    preserves: Preserves = Preserves.EXACT
    why: str = "saves activations and logits in proportion to the samples; costs speed where the GPU is not kept busy"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        samples = config.micro_batch_size * config.gradient_accumulation_steps  # of one GPU in an optimizer step
        size = max((size for size in range(1, config.micro_batch_size) if samples % size == 0), default=1)
        evaluated = config.eval_micro_batch_size
        smaller = replace(
            config,
            micro_batch_size=size,
            gradient_accumulation_steps=samples // size,
            eval_micro_batch_size=None if evaluated is None else min(evaluated, size),
        )
        return None if smaller == config else smaller

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return after.micro_batch_size < before.micro_batch_size or _evaluated(after) < _evaluated(before)


def _evaluated(config: TrainingConfig) -> int:
    return config.eval_micro_batch_size or config.micro_batch_size
