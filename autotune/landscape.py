"""Measured or simulated landscapes: a JSONL file of configs with what running each one gives, so that searches replay.

The first line is the header, every other line a row; `docs/landscapes.md` has each field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from autotune.values import Device, Environment, ModelSource, Prediction, TrainingConfig, Verdict

SCHEMA = "autotune.landscape/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Of what a landscape is. Bytes are of the whole device."""

    name: str
    origin: Literal["measured", "simulated"]
    device: Device
    model: ModelSource
    start: TrainingConfig  # as a fit's request has it: wanted length, effective batch, settings
    memory_limit_bytes: int | None = None  # None: the whole device
    headroom_bytes: int = 0
    installed: tuple[str, ...] = ()  # importable optional packages
    environment: Environment | None = None
    fresh_start_s: float = 0.0  # a new process up to its first micro batch
    schema: str = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What running one config gives."""

    config: TrainingConfig
    verdict: Verdict  # fits | device_oom | spill
    needed_bytes: int | None = None  # what the limit is compared with: whole device's use; CPU: growth of VmData
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    tried_bytes: int | None = None  # asked for by the allocation that failed
    micro_batch_times_s: tuple[float, ...] = ()  # every timed one
    optimizer_times_s: tuple[float, ...] = ()
    startup_s: float = 0.0  # of a warm probe: all that was not timed
    true_step_time_s: float | None = None  # simulated: without noise
    predicted: Prediction | None = None  # before anything was learned


@dataclass(frozen=True, slots=True, kw_only=True)
class Landscape:
    header: Header
    rows: tuple[Row, ...] = field(default=())
