"""The fastest config that is predicted to fit, found without a probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from autotune.predict.forecast import Forecast
from autotune.values import AllocatorSetting, LossPath, TrainingConfig, Upcast

LARGEST_MICRO_BATCH = 64
TIE = 1.01  # step times within this ratio are one speed: the config that takes less memory is the better one

Predict = Callable[[TrainingConfig], Forecast]
Seconds = Callable[[TrainingConfig], float | None]  # of an optimizer step; None: not known, as on the CPU


def families(start: TrainingConfig) -> list[list[TrainingConfig]]:
    """Configs at the start's effective batch, by checkpointing and loss, each from the smallest micro batch up.

    Without float32 copies, which cost memory and time and change nothing that is learned (`no_fp32_copies`).
    """
    batch = start.effective_batch_size
    sizes = [n for n in range(1, min(batch, LARGEST_MICRO_BATCH) + 1) if batch % n == 0]
    return [
        [
            replace(
                start,
                micro_batch_size=size,
                gradient_accumulation_steps=batch // size,
                gradient_checkpointing=checkpointing,
                loss=loss,
                upcast=Upcast.NONE,
            )
            for size in sizes
        ]
        for checkpointing in ("off", "full")
        for loss in dict.fromkeys([start.loss, LossPath.CHUNKED])
    ]


def least(start: TrainingConfig) -> list[TrainingConfig]:
    """The family that takes least memory: every layer checkpointed, the loss in chunks."""
    return families(start)[-1]


def fastest(
    candidates: Sequence[Sequence[TrainingConfig]], predict: Predict, seconds: Seconds
) -> tuple[Forecast, list[Forecast]]:
    """(the fastest predicted to fit, or the one that needs least where none does; all whose memory was predicted).

    `candidates` are in families, each from the smallest micro batch up. Time is quick to predict and memory is not:
    what cannot be faster than a config that fits is left out.
    """
    seen: list[Forecast] = []
    fitting: list[Forecast] = []
    for family in candidates:
        for config in family:
            quickest = min((found.step_time_s or 0.0 for found in fitting), default=math.inf)
            if (seconds(config) or 0.0) > quickest * TIE:
                continue
            tried = _tried(config, predict)
            seen += tried
            if tried[-1].fits is False:
                break  # larger micro batches take more
            fitting.append(tried[-1])
    if not fitting:
        return min(seen, key=lambda found: found.device_used_bytes), seen
    quickest = min(found.step_time_s or 0.0 for found in fitting)
    ties = [found for found in fitting if (found.step_time_s or 0.0) <= quickest * TIE]
    return min(ties, key=lambda found: found.device_used_bytes), seen


def _tried(config: TrainingConfig, predict: Predict) -> list[Forecast]:
    """With the allocator's default, then with expandable segments where only they fit, or save it from giving its
    cache back; the better one last."""
    found = predict(config)
    if found.fits is not False and not found.memory.alloc_retries:
        return [found]
    other = predict(replace(config, allocator=AllocatorSetting.EXPANDABLE_SEGMENTS))
    return [found, other] if other.fits or not found.fits else [other, found]
