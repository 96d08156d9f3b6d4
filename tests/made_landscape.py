"""A landscape from a made-up law: every batch × checkpointing × loss that a search may propose, so that all replays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from autotune.landscape import Header, Landscape, Row
from autotune.values import MIB, AllocatorSetting, LossPath, Prediction, TrainingConfig, Verdict
from tests.fakes import Law, a_gpu, a_model

CONTEXT = 300 * MIB  # beside tensors
OPTIMIZER_S = 0.01
FRESH_START_S, STARTUP_S = 12.0, 1.0
SAMPLES = 8
START = TrainingConfig(sequence_length=256, micro_batch_size=16)


def a_landscape(
    allowed_mib: int = 1700,
    *,
    law: Law | None = None,
    start: TrainingConfig = START,
    lengths: Sequence[int] = (256,),
    noise: float = 0.01,
    **header: Any,
) -> Landscape:
    """Under a memory limit, sixteen samples a step. Times differ by up to twice `noise` between samples."""
    law, limit = law or Law(), allowed_mib * MIB
    kept = ("off", "every_2", "every_3", "every_4", "full", "offload")
    batch = start.effective_batch_size
    sizes = [size for size in (1, 2, 4, 8, 16) if batch % size == 0]
    rows = [
        _row(
            law,
            replace(
                start,
                sequence_length=length,
                micro_batch_size=size,
                gradient_accumulation_steps=batch // size,
                gradient_checkpointing=checkpointing,
                loss=loss,
                allocator=allocator,
                optimizer=optimizer,
            ),
            limit,
            noise,
        )
        for length, size, checkpointing, loss, allocator, optimizer in itertools.product(
            lengths, sizes, kept, LossPath, AllocatorSetting, ("adamw_torch_fused", "paged_adamw_32bit")
        )
    ]
    defaults: dict[str, Any] = {
        "name": "made up",
        "origin": "simulated",
        "device": a_gpu(12),
        "model": a_model(),
        "start": replace(start, sequence_length=lengths[0]),
        "memory_limit_bytes": limit,
        "installed": ("liger_kernel",),
        "fresh_start_s": FRESH_START_S,
    }
    return Landscape(header=Header(**{**defaults, **header}), rows=tuple(rows))


def _row(law: Law, config: TrainingConfig, limit: int, noise: float) -> Row:
    peak = law.peak_bytes(config)
    micro_s = config.micro_batch_size * config.sequence_length / law.speed(config)
    step_s = micro_s * config.gradient_accumulation_steps + OPTIMIZER_S
    predicted = Prediction(
        peak_allocated_bytes=peak,
        training_peak_allocated_bytes=peak,
        peak_reserved_bytes=peak,
        device_used_bytes=peak + CONTEXT,
        step_time_s=step_s,
        seconds_by_kind={"matrix products": 0.8 * step_s, "the rest": 0.2 * step_s},
    )
    row = Row(
        config=config,
        verdict=Verdict.FITS,
        needed_bytes=peak + CONTEXT,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=peak,
        micro_batch_times_s=tuple(micro_s * (1 + noise * (i * 7 % 5 - 2)) for i in range(SAMPLES)),
        optimizer_times_s=(OPTIMIZER_S,) * 3,
        startup_s=STARTUP_S,
        true_step_time_s=step_s,
        predicted=predicted,
    )
    if peak + CONTEXT <= limit:
        return row
    return replace(
        row,
        verdict=Verdict.DEVICE_OOM,
        needed_bytes=None,
        peak_allocated_bytes=limit - CONTEXT,
        tried_bytes=64 * MIB,
        micro_batch_times_s=(),
        optimizer_times_s=(),
        true_step_time_s=None,
    )
