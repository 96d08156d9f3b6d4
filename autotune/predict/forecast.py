"""Memory, time and what no tensor shows, joined for one config on one target."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.hardware.cards import Card
from autotune.predict.allocator import OutOfMemory
from autotune.predict.context import Context, context_of
from autotune.predict.kernels import CPU, KernelSet, kernels_of
from autotune.predict.memory import MemoryForecast, forecast_memory
from autotune.predict.steptime import TimeForecast, forecast_time
from autotune.predict.trace import Trace
from autotune.values import Prediction, TrainingConfig

#: Of allocated memory, either way: 31 published T4 rows lay within 0.4 %, and stacks differ (benchmarks/).
ALLOCATED_INTERVAL = 0.01
#: Of reserved memory: fragmentation depends on what ran before, below and above what is predicted.
RESERVED_INTERVAL = (0.03, 0.08)


#: What a `MemoryForecast` says of the allocator, in bytes.
ALLOCATOR_SIZES = (
    "after_load_bytes",
    "forward_peak_allocated_bytes",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "training_peak_allocated_bytes",
    "evaluation_peak_allocated_bytes",
    "checkpoint_peak_allocated_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a config is predicted for."""

    name: str
    kernels: KernelSet
    capacity_bytes: int | None  # what this run may take: the card's memory as a program sees it, or a limit
    total_bytes: int | None = None  # the card's own memory; None: there is none beside the capacity (the CPU)
    headroom_bytes: int = 0  # of the capacity, what is to stay free
    others_bytes: int = 0  # held by other processes and the display
    context: Context | None = None  # None: nothing beside tensors (the CPU)
    card: Card | None = None
    memory_factor: float = 1.0  # learned here: bytes measured ÷ predicted
    memory_interval: tuple[float, float] = (1 - ALLOCATED_INTERVAL, 1 + ALLOCATED_INTERVAL)  # of allocated memory
    time_factor: float = 1.0  # learned here: seconds measured ÷ predicted
    time_interval: tuple[float, float] | None = None  # of step time; None: nothing learned, the roofline's own

    @property
    def allowed_bytes(self) -> int | None:
        """What `device_used_bytes` may reach: a limit is of this run alone, but all must find room on the card."""
        if self.capacity_bytes is None:
            return None
        total = self.capacity_bytes if self.total_bytes is None else self.total_bytes
        return min(self.capacity_bytes + self.others_bytes, total) - self.headroom_bytes


def target_of_card(card: Card) -> Target:
    """A card of the catalogue as a target."""
    return Target(
        name=card.name,
        kernels=kernels_of(card.vendor, card.compute_capability, card.attention),
        capacity_bytes=card.memory_bytes,
        total_bytes=card.memory_bytes,
        context=context_of(card),
        card=card,
    )


def cpu_target(name: str, limit_bytes: int | None) -> Target:
    return Target(name=name, kernels=CPU, capacity_bytes=limit_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Everything predicted of one config. Intervals are (low, high)."""

    config: TrainingConfig
    memory: MemoryForecast
    device_used_bytes: int  # as NVML would show it: the context and others' memory too
    step_time_s: float | None
    intervals: dict[str, tuple[float, float]]
    capacity_bytes: int | None
    fits: bool | None  # by tensors, what the allocator cannot give back, the context; None: capacity not known
    allowed_bytes: int | None = None  # what `device_used_bytes` may reach (`Target.allowed_bytes`)
    memory_factor: float = 1.0  # learned, and in the numbers above
    time_factor: float = 1.0

    @property
    def tokens_per_second(self) -> float | None:
        return self.config.tokens_per_step / self.step_time_s if self.step_time_s else None

    def prediction(self) -> Prediction:
        return Prediction(
            training_peak_allocated_bytes=self.memory.training_peak_allocated_bytes,
            peak_allocated_bytes=self.memory.peak_allocated_bytes,
            peak_reserved_bytes=self.memory.peak_reserved_bytes,
            device_used_bytes=self.device_used_bytes,
            step_time_s=self.step_time_s,
            memory_factor=self.memory_factor,
            time_factor=self.time_factor,
        )


def forecast(trace: Trace, config: TrainingConfig, target: Target, *, evaluation: Trace | None = None) -> Forecast:
    """Predict one config. Raises `NotAlike` for a trace that does not hold at its B and T.

    `evaluation`: the trace for its `eval_micro_batch_size`, where that is another batch size than the training's.
    """
    memory, fits = _memory_of(trace, config, target, evaluation)
    memory, (below, above) = _scaled(memory, target.memory_factor), target.memory_interval
    if target.kernels.kind == "cpu":  # malloc gives back what is freed
        memory = replace(memory, peak_reserved_bytes=memory.peak_allocated_bytes)
    context = target.context
    reserved = memory.peak_reserved_bytes
    outside = memory.paged_bytes + target.others_bytes
    likely = reserved + (context.likely_bytes if context else 0) + outside
    low = memory.peak_allocated_bytes * below + (context.low_bytes if context else 0) + target.others_bytes
    held = (  # what was learned of allocated memory, and fragmentation on top
        reserved * (1 - RESERVED_INTERVAL[0]) * below / (1 - ALLOCATED_INTERVAL),
        reserved * (1 + RESERVED_INTERVAL[1]) * above / (1 + ALLOCATED_INTERVAL),
    )
    high = held[1] + (context.high_bytes if context else 0) + outside
    intervals: dict[str, tuple[float, float]] = {
        name: (getattr(memory, name) * below, getattr(memory, name) * above)
        for name in ALLOCATOR_SIZES
        if name != "peak_reserved_bytes" and getattr(memory, name) is not None
    }
    intervals["peak_reserved_bytes"] = held
    intervals["device_used_bytes"] = (min(low, likely), max(high, likely))
    time = forecast_step(trace, config, target)
    if time is not None:
        intervals["step_time_s"] = (time.low_s, time.high_s)
        intervals["tokens_per_second"] = (config.tokens_per_step / time.high_s, config.tokens_per_step / time.low_s)
    return Forecast(
        config=config,
        memory=memory,
        device_used_bytes=likely,
        step_time_s=time.step_time_s if time else None,
        intervals={name: (int(a), int(b)) if name.endswith("_bytes") else (a, b) for name, (a, b) in intervals.items()},
        capacity_bytes=target.capacity_bytes,
        fits=fits,
        allowed_bytes=target.allowed_bytes,
        memory_factor=target.memory_factor,
        time_factor=target.time_factor,
    )


def forecast_step(trace: Trace, config: TrainingConfig, target: Target) -> TimeForecast | None:
    """The time alone, which is quick, with what was learned; None where the card is not known."""
    if target.card is None:
        return None
    time = forecast_time(trace, config, target.card, learned_factor=target.time_factor)
    if target.time_interval is None:
        return time
    low, high = target.time_interval
    return replace(time, low_s=time.step_time_s * low, high_s=time.step_time_s * high)


def _memory_of(
    trace: Trace, config: TrainingConfig, target: Target, evaluation: Trace | None
) -> tuple[MemoryForecast, bool | None]:
    """Memory on this target, and whether it fits: what the allocator would only cache it gives back at the limit."""
    memory = forecast_memory(trace, config, target.kernels, evaluation=evaluation)
    if target.allowed_bytes is None:
        return memory, None
    outside = memory.paged_bytes + target.others_bytes + (target.context.likely_bytes if target.context else 0)
    left = round((target.allowed_bytes - outside) / target.memory_factor)  # as predicted
    if target.kernels.kind == "cpu":
        return memory, memory.peak_allocated_bytes <= left
    if memory.peak_reserved_bytes <= left:
        return memory, True
    if memory.peak_allocated_bytes > left:
        return memory, False
    try:
        return forecast_memory(trace, config, target.kernels, limit_bytes=left, evaluation=evaluation), True
    except OutOfMemory:
        return memory, False


def _scaled(memory: MemoryForecast, factor: float) -> MemoryForecast:
    """All that the allocator holds, times what was learned; the parts still sum to the peak."""
    if factor == 1.0:
        return memory
    known = {name: size for name in ALLOCATOR_SIZES if (size := getattr(memory, name)) is not None}
    sizes = {name: round(size * factor) for name, size in known.items()}
    parts = {part: round(size * factor) for part, size in memory.parts.items()}
    if parts:
        largest = max(parts, key=lambda part: parts[part])
        parts[largest] += sizes["peak_allocated_bytes"] - sum(parts.values())
    return replace(memory, **sizes, parts=parts)


def cannot_fit(found: Forecast) -> bool:
    """Whether even the low end is above what is allowed: worth no probe."""
    return found.allowed_bytes is not None and found.intervals["device_used_bytes"][0] > found.allowed_bytes
