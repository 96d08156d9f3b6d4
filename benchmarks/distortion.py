"""How a simulated card differs from what is predicted of it: drawn at random, in one of two families.

The drawn numbers' bounds stand here and nowhere else. Nobody sets a search's constants by `Other`: it is the check.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from autotune.predict.context import Context
from autotune.values import MIB, AllocatorSetting, TrainingConfig, to_json
from benchmarks.surfaces import MICRO_BATCHES, Point

CUT = 2.5  # standard deviations at which a drawn factor ends

# Of `Usual`:
SPEED_SD, KIND_SD = 0.25, 0.25  # of the logarithm of all seconds, and of those of one kind of operator
ODD = (1.2, 1.7)  # times the micro batch's seconds, where the odd kernel runs
ODD_SETTINGS = ("gradient_checkpointing", "loss", "micro_batch_size")
ALLOCATED, CONFIG = 0.08, 0.005  # of allocated bytes, either way: alike for a landscape, and of one config
CACHED = (0.5, 1.5)  # times what is predicted to be reserved beyond tensors
STUCK = (0.0, 0.25)  # of that, what cannot be given back at the limit, but for expandable segments
RETRIES = (1.15, 1.45)  # times the micro batch's seconds, where the allocator has to give its cache back
NOISE = 0.03  # of one sample of time, a standard deviation

# Of `Other`:
OTHER_SPEED_SD, OTHER_SETTING_SD, OTHER_ALLOCATOR_SD = 0.4, 0.1, 0.02
UNFILLED = (0.0, 0.6)  # of the seconds, that a micro batch of no tokens would take more
FILLED_TOKENS = (512, 4096)  # of a micro batch, where half of that is gone
BESIDE_MIB = (-100, 600)  # beside tensors and the context
GROWTH = (-0.03, 0.06)  # of allocated bytes at the largest micro batch, in proportion to it
FRAGMENTED = (0.0, 0.08)  # of allocated bytes at the largest micro batch, reserved beyond what is predicted
OTHER_STUCK = (0.2, 0.7)
OTHER_NOISE, LATE_SHARE, LATE = 0.02, 0.1, (1.1, 2.0)  # every tenth sample is late, by such a factor
_OTHER_SETTINGS = ("gradient_checkpointing", "loss", "upcast", "optimizer")


class Distortion(Protocol):
    """One simulated card with one model at one length."""

    @property
    def context_bytes(self) -> int:
        """What no tensor shows."""
        ...

    @property
    def retries(self) -> float:
        """Times a micro batch's seconds, where the allocator has to give its cache back."""
        ...

    def micro_batch_s(self, point: Point) -> float:
        """Of one micro batch, without noise."""
        ...

    def optimizer_s(self, point: Point) -> float: ...

    def allocated_share(self, point: Point) -> float:
        """Allocated bytes ÷ predicted ones."""
        ...

    def cached_bytes(self, point: Point) -> int:
        """Reserved beyond tensors where there is room."""
        ...

    def stuck(self, config: TrainingConfig) -> float:
        """Of these, the share that cannot be given back."""
        ...

    def sample(self, seconds: float, rng: random.Random) -> float:
        """One measurement of these seconds."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """Every kind of operator has its own efficiency, memory is off by a fraction, and one kernel is oddly slow."""

    key: str  # of all that is drawn
    speed: float  # times all seconds
    kinds: Mapping[str, float]  # times the seconds of these operators
    odd_setting: str
    odd_values: tuple[Any, ...]  # of that setting
    odd: float
    allocated: float
    cached: float
    stuck_share: float
    retries: float
    context_bytes: int

    def micro_batch_s(self, point: Point) -> float:
        config = point.config
        kinds = point.seconds_by_kind
        seconds = sum(s * self.kinds[kind] for kind, s in kinds.items() if kind != "optimizer") * self.speed
        odd = self.odd if getattr(config, self.odd_setting) in self.odd_values else 1.0
        return seconds * odd / config.gradient_accumulation_steps

    def optimizer_s(self, point: Point) -> float:
        return point.seconds_by_kind["optimizer"] * self.kinds["optimizer"] * self.speed

    def allocated_share(self, point: Point) -> float:
        tensors = replace(point.config, allocator=AllocatorSetting.DEFAULT)  # the same under either
        own = random.Random(f"{self.key}|{text_of(tensors)}").uniform(-CONFIG, CONFIG)
        return self.allocated * (1 + own)

    def cached_bytes(self, point: Point) -> int:
        return round(predicted_cache(point) * self.cached)

    def stuck(self, config: TrainingConfig) -> float:
        return 0.0 if config.allocator is AllocatorSetting.EXPANDABLE_SEGMENTS else self.stuck_share

    def sample(self, seconds: float, rng: random.Random) -> float:
        return seconds * _factor(rng, NOISE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """Small micro batches do not fill the card, settings have their own speeds, memory is off by a constant and grows
    otherwise, large batches fragment, and some samples come late."""

    speed: float
    settings: Mapping[tuple[str, str], float]  # times the seconds that this value of this setting decides
    unfilled: float
    filled_tokens: float
    growth: float
    fragmented: float
    stuck_share: float
    retries: float
    context_bytes: int

    def micro_batch_s(self, point: Point) -> float:
        config = point.config
        seconds = sum(s for kind, s in point.seconds_by_kind.items() if kind != "optimizer") * self.speed
        for name in (*_OTHER_SETTINGS, "allocator"):
            if name != "optimizer":  # which has no part in a micro batch
                seconds *= self.settings[name, str(getattr(config, name))]
        tokens = config.micro_batch_size * config.sequence_length
        unfilled = self.unfilled * self.filled_tokens / (self.filled_tokens + tokens)
        return seconds * (1 + unfilled) / config.gradient_accumulation_steps

    def optimizer_s(self, point: Point) -> float:
        return point.seconds_by_kind["optimizer"] * self.speed * self.settings["optimizer", point.config.optimizer]

    def allocated_share(self, point: Point) -> float:
        return 1 + self.growth * _of_largest(point.config)

    def cached_bytes(self, point: Point) -> int:
        extra = 0.0
        if point.config.allocator is AllocatorSetting.DEFAULT:
            extra = self.fragmented * _of_largest(point.config) * point.peak_allocated_bytes
        return round(predicted_cache(point) + extra)

    def stuck(self, config: TrainingConfig) -> float:
        return 0.0 if config.allocator is AllocatorSetting.EXPANDABLE_SEGMENTS else self.stuck_share

    def sample(self, seconds: float, rng: random.Random) -> float:
        late = rng.uniform(*LATE) if rng.random() < LATE_SHARE else 1.0
        return seconds * _factor(rng, OTHER_NOISE) * late


def draw_usual(key: str, points: Sequence[Point], context: Context) -> Usual:
    """The same for the same key, points and context."""
    rng = random.Random(f"usual|{key}")
    kinds = sorted({kind for point in points for kind in point.seconds_by_kind})
    speed, of_kinds = _factor(rng, SPEED_SD), {kind: _factor(rng, KIND_SD) for kind in kinds}
    setting = ODD_SETTINGS[int(rng.random() * len(ODD_SETTINGS))]
    values = MICRO_BATCHES if setting == "micro_batch_size" else _values(points, setting)
    first = int(rng.random() * len(values))
    many = 2 if setting == "micro_batch_size" and rng.random() < 0.5 else 1
    return Usual(
        key=key,
        speed=speed,
        kinds=of_kinds,
        odd_setting=setting,
        odd_values=tuple(values[first : first + many]),
        odd=rng.uniform(*ODD),
        allocated=1 + rng.uniform(-ALLOCATED, ALLOCATED),
        cached=rng.uniform(*CACHED),
        stuck_share=rng.uniform(*STUCK),
        retries=rng.uniform(*RETRIES),
        context_bytes=round(rng.uniform(context.low_bytes, context.high_bytes)),
    )


def draw_other(key: str, points: Sequence[Point], context: Context) -> Other:
    """The same for the same key, points and context."""
    rng = random.Random(f"other|{key}")
    speed = _factor(rng, OTHER_SPEED_SD)
    settings = {
        (name, str(value)): _factor(rng, OTHER_SETTING_SD)
        for name in _OTHER_SETTINGS
        for value in _values(points, name)
    }
    settings |= {("allocator", str(value)): _factor(rng, OTHER_ALLOCATOR_SD) for value in _values(points, "allocator")}
    return Other(
        speed=speed,
        settings=settings,
        unfilled=rng.uniform(*UNFILLED),
        filled_tokens=rng.uniform(*FILLED_TOKENS),
        growth=rng.uniform(*GROWTH),
        fragmented=rng.uniform(*FRAGMENTED),
        stuck_share=rng.uniform(*OTHER_STUCK),
        retries=rng.uniform(*RETRIES),
        context_bytes=max(0, context.likely_bytes + round(rng.uniform(*BESIDE_MIB) * MIB)),
    )


FAMILIES: dict[str, Callable[[str, Sequence[Point], Context], Distortion]] = {"usual": draw_usual, "other": draw_other}


def text_of(config: TrainingConfig) -> str:
    return json.dumps(to_json(config), sort_keys=True)


def predicted_cache(point: Point) -> int:
    """Reserved beyond tensors, as predicted where there is room."""
    return max(0, point.peak_reserved_bytes - point.peak_allocated_bytes)


def _of_largest(config: TrainingConfig) -> float:
    """The micro batch as a share of the largest there is."""
    return config.micro_batch_size / config.effective_batch_size


def _factor(rng: random.Random, sd: float) -> float:
    """A log-normal factor around 1, cut at `CUT` deviations."""
    return math.exp(sd * max(-CUT, min(CUT, rng.gauss(0.0, 1.0))))


def _values(points: Sequence[Point], setting: str) -> list[Any]:
    return sorted({getattr(point.config, setting) for point in points})
