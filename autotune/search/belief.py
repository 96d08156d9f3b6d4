"""What is believed of configs before and after probes: step time and memory, each with its uncertainty. Pure.

Both begin at the dry run's prediction and are corrected by Gaussian regression from what was measured, so that one
probe says something of every other config.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.search.space import kept_layers
from autotune.values import MIB, LossPath, TrainingConfig

Vector = NDArray[np.float64]

#: Settings whose kernels may be off by a factor of their own, and by how much (standard deviation of the logarithm).
_OF_SETTING = {
    "gradient_checkpointing": 0.06,
    "attention": 0.07,
    "loss": 0.06,
    "upcast": 0.05,
    "optimizer": 0.02,
    "double_quant": 0.01,
    "packing": 0.05,
    "allocator": 0.005,
}


#: Values whose time is predicted by a stand-in that no card has confirmed: Triton kernels, copies over the bus.
_UNCONFIRMED = {("loss", LossPath.LIGER): 0.1, ("gradient_checkpointing", "offload"): 0.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """How far predictions may be off before anything is measured: standard deviations."""

    time: float = 0.3  # of the logarithm of step time, alike for all configs: it moves no order
    kind: float = 0.25  # of each kind of operator, by its share of the step
    size: float = 0.09  # smooth along the logarithm of the micro batch size
    both: float = 0.02  # of a setting at a size
    config: float = 0.01  # of one config
    memory: float = 0.05  # of allocated bytes, a fraction alike for all configs
    memory_bytes: float = 100.0 * MIB  # beside tensors
    token_bytes: float = 8192.0  # beside tensors, of each token of a micro batch
    memory_config: float = 0.006  # of one config's allocated bytes
    expected_bytes: float = 0.0  # beside tensors, more than is predicted
    expected_token_bytes: float = 0.0  # of each token of a micro batch


#: On a GPU the predicted peak was within 1 % on published rows; other stacks and contexts differ (benchmarks/).
GPU_DOUBT = Doubt()
#: A processor's rates are assumed, and what is held against its limit is more than tensors, for products' buffers:
#: SmolLM2-135M's probes held 0.2, 0.3, 0.5 and 1.0 GiB more with 256, 512, 1,024 and 2,048 tokens in a micro batch
#: (torch 2.13, AMD EPYC, 2 threads).
CPU_DOUBT = Doubt(
    time=0.8,
    kind=0.3,
    size=0.12,
    both=0.03,
    config=0.015,
    memory=0.05,
    memory_bytes=40.0 * MIB,
    token_bytes=0.15 * MIB,
    memory_config=0.03,
    expected_bytes=75.0 * MIB,
    expected_token_bytes=0.44 * MIB,
)

#: Probability, before anything is measured, that some setting is oddly slow on a card: a kernel that falls back, a
#: shape that a library handles badly. One in two searches meets one or none; which, two or three probes tell.
ODD = 0.5
ODD_SHIFTS = (math.log(1.25), math.log(1.5), math.log(1.8), math.log(0.8))
ODD_SETTINGS = ("gradient_checkpointing", "attention", "loss", "upcast", "micro_batch_size")

LEAST_SHARE = 0.8  # of predicted tensors: no config is believed to need less, whatever others left unused

#: Of what the allocator keeps beside tensors, measured ÷ predicted: before any probe, of one config, never less.
CACHE, CACHE_CONFIG, CACHE_LEFT = 0.35, 0.15, 0.05

NOISE = 0.03  # of one timed micro batch, before its own spread is known: a fraction
_PRIOR_SAMPLES = 2.0  # that this counts for


def noise_of(times_s: Sequence[float]) -> float:
    """Uncertainty of the median of these times, a fraction: from their own scatter and what is usual.

    Scatter is the median absolute deviation, which one disturbed sample does not move.
    """
    if not times_s:
        return NOISE
    middle = float(np.median(times_s))
    scatter = 1.4826 * float(np.median([abs(time / middle - 1.0) for time in times_s]))
    samples = len(times_s) - 1
    variance = (samples * scatter**2 + _PRIOR_SAMPLES * NOISE**2) / (samples + _PRIOR_SAMPLES)
    return 1.25 * math.sqrt(variance / len(times_s))  # 1.25: of a median against a mean


@dataclass(frozen=True, slots=True)
class Oddity:
    """A setting that may be oddly slow, or quick, on this card: these values of it, by this factor's logarithm."""

    name: str
    values: frozenset[object]
    shift: float

    def of(self, config: TrainingConfig) -> float:
        return self.shift if getattr(config, self.name) in self.values else 0.0


@dataclass(frozen=True, slots=True)
class Believed:
    """Logarithm of true ÷ predicted seconds of n configs under h hypotheses: nothing odd, and one for each oddity."""

    weights: Vector  # (h,), of the hypotheses; they sum to 1
    means: Vector  # (h, n)
    deviations: Vector  # (n,), of each mean, alike under all

    @property
    def mean(self) -> Vector:
        """(n,), over the hypotheses."""
        mean: Vector = self.weights @ self.means
        return mean


@dataclass
class TimeBelief:
    """Logarithm of measured ÷ predicted seconds, over configs: a Gaussian process, and at most one oddity beside it."""

    doubt: Doubt
    oddities: Sequence[Oddity] = ()
    configs: list[TrainingConfig] = field(default_factory=list)
    shares: list[Mapping[str, float]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    noises: list[float] = field(default_factory=list)

    def observe(self, config: TrainingConfig, seconds: Mapping[str, float], measured_s: float, noise: float) -> None:
        """A measured step time beside what was predicted of it by kind of operator; `noise`: a fraction."""
        predicted = sum(seconds.values())
        self.configs.append(config)
        self.shares.append(shares_of(seconds))
        self.ratios.append(math.log(measured_s / predicted))
        self.noises.append(noise)

    def of(self, configs: Sequence[TrainingConfig], shares: Sequence[Mapping[str, float]]) -> Believed:
        """What is believed of these, with their predicted shares of the step by kind of operator."""
        variance = self._variances(configs, shares)
        priors = self._priors()
        means = self._shifts(configs)
        if not self.configs:
            return Believed(priors, means, np.sqrt(variance))
        known = self._covariance(self.configs, self.shares, self.configs, self.shares)
        known += np.diag(np.square(self.noises) + 1e-9)
        across = self._covariance(configs, shares, self.configs, self.shares)
        weights = np.linalg.solve(known, across.T)
        left = np.asarray(self.ratios) - self._shifts(self.configs)  # (h, k): what the process has to explain
        likely = -0.5 * np.einsum("hk,kh->h", left, np.linalg.solve(known, left.T))
        posterior = priors * np.exp(likely - likely.max())
        rest = variance - np.einsum("ij,ji->i", across, weights)
        return Believed(posterior / posterior.sum(), means + left @ weights, np.sqrt(np.maximum(rest, 1e-10)))

    def _priors(self) -> Vector:
        """(h,): every setting is as likely to be odd as any other, then each of its oddities."""
        of_setting = Counter(odd.name for odd in self.oddities)
        each = [ODD / len(of_setting) / of_setting[odd.name] for odd in self.oddities]
        return np.array([1 - sum(each), *each])

    def _shifts(self, configs: Sequence[TrainingConfig]) -> Vector:
        """(h, n): what each hypothesis adds to the logarithm of each config's seconds."""
        return np.array([[0.0] * len(configs), *([odd.of(config) for config in configs] for odd in self.oddities)])

    def _variances(self, configs: Sequence[TrainingConfig], shares: Sequence[Mapping[str, float]]) -> Vector:
        doubt = self.doubt
        fixed = doubt.time**2 + doubt.size**2 + doubt.both**2 + doubt.config**2
        fixed += sum(sd**2 for sd in _OF_SETTING.values())
        kinds = np.array([doubt.kind**2 * sum(s * s for s in share.values()) for share in shares])
        for (name, value), sd in _UNCONFIRMED.items():
            kinds += sd**2 * np.array([getattr(config, name) == value for config in configs])
        found: Vector = fixed + kinds
        return found

    def _covariance(
        self,
        ones: Sequence[TrainingConfig],
        their: Sequence[Mapping[str, float]],
        others: Sequence[TrainingConfig],
        of_others: Sequence[Mapping[str, float]],
    ) -> Vector:
        doubt = self.doubt
        kinds = sorted({kind for share in (*their, *of_others) for kind in share})
        left = np.array([[share.get(kind, 0.0) for kind in kinds] for share in their])
        right = np.array([[share.get(kind, 0.0) for kind in kinds] for share in of_others])
        sizes = [np.log2([c.micro_batch_size * c.sequence_length for c in group]) for group in (ones, others)]
        near = np.exp(-0.5 * np.square(sizes[0][:, None] - sizes[1][None, :]))
        same_all = np.ones_like(near)
        found: Vector = doubt.time**2 + doubt.kind**2 * (left @ right.T) + doubt.size**2 * near
        for name, sd in _OF_SETTING.items():
            same = _same(name, ones, others)
            found = found + sd**2 * same
            same_all = same_all * same
        for (name, value), sd in _UNCONFIRMED.items():
            mine, other = (np.array([getattr(c, name) == value for c in group]) for group in (ones, others))
            found = found + sd**2 * (mine[:, None] & other[None, :])
        same_config = same_all * (sizes[0][:, None] == sizes[1][None, :])
        found += doubt.both**2 * same_all * near + doubt.config**2 * same_config
        return found


def oddities(configs: Sequence[TrainingConfig]) -> list[Oddity]:
    """Each value of each setting that these differ in, and each range of an ordered one, by each factor."""
    found: list[Oddity] = []
    for name in ODD_SETTINGS:
        values: list[Any] = list(dict.fromkeys(getattr(config, name) for config in configs))
        groups = [frozenset([value]) for value in values]
        if name in _ORDERED:
            ordered = sorted(values, key=_ORDERED[name])
            pairs = itertools.combinations(range(len(ordered) + 1), 2)
            groups += [frozenset(ordered[i:j]) for i, j in pairs if 1 < j - i < len(ordered)]
        if len(values) > 1:
            found += [Oddity(name, group, shift) for group in groups for shift in ODD_SHIFTS]
    return found


_ORDERED: dict[str, Callable[[Any], int]] = {"micro_batch_size": int, "gradient_checkpointing": kept_layers}


def shares_of(seconds: Mapping[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    return {kind: value / total for kind, value in seconds.items()}


def _same(name: str, ones: Sequence[TrainingConfig], others: Sequence[TrainingConfig]) -> Vector:
    codes: dict[object, int] = {}
    left, right = ([codes.setdefault(getattr(c, name), len(codes)) for c in group] for group in (ones, others))
    same: Vector = (np.array(left)[:, None] == np.array(right)[None, :]).astype(np.float64)
    return same


@dataclass
class MemoryBelief:
    """Bytes that a config needs beyond what is predicted: a fraction of its tensors, a constant, a part by tokens.

    `allowed_bytes` is what they must stay within.
    """

    doubt: Doubt
    allowed_bytes: float

    def __post_init__(self) -> None:
        self.cache, self.cache_sd = 1.0, CACHE  # measured ÷ predicted bytes that the allocator keeps beside tensors
        doubt = self.doubt
        self.mean = np.array([0.0, doubt.expected_bytes, doubt.expected_token_bytes])
        self.variance = np.diag(np.square([doubt.memory, doubt.memory_bytes, doubt.token_bytes]))

    def fits(
        self, config: TrainingConfig, predicted_bytes: float, allocated_bytes: float, cached_bytes: float = 0.0
    ) -> float:
        """Probability that a config fits that is predicted to need so much, of it so much in tensors.

        `cached_bytes`: with what the allocator is predicted to keep beside them.
        """
        middle, sd = self.needs(config, predicted_bytes, allocated_bytes)
        middle, sd = middle + self.cache * cached_bytes, math.hypot(sd, self.cache_sd * cached_bytes)
        return normal_below((self.allowed_bytes - middle) / sd)

    def observe_cache(self, ratio: float) -> None:
        """The allocator kept so many times what was predicted beside the tensors."""
        share = self.cache_sd**2 / (self.cache_sd**2 + CACHE_CONFIG**2)
        self.cache += share * (min(max(ratio, 0.0), 3.0) - self.cache)
        self.cache_sd = math.sqrt((1 - share) * self.cache_sd**2 + CACHE_LEFT**2)

    def needs(self, config: TrainingConfig, predicted_bytes: float, allocated_bytes: float) -> tuple[float, float]:
        """(mean, standard deviation) of the bytes that it needs."""
        row = self._row(config, allocated_bytes)
        own = self.doubt.memory_config * allocated_bytes
        middle = max(predicted_bytes + float(row @ self.mean), LEAST_SHARE * allocated_bytes)
        return middle, math.sqrt(float(row @ self.variance @ row) + own**2)

    def observe(
        self, config: TrainingConfig, predicted_bytes: float, allocated_bytes: float, measured_bytes: float
    ) -> None:
        """It needed so much."""
        own = self.doubt.memory_config * allocated_bytes
        self._update(self._row(config, allocated_bytes), measured_bytes - predicted_bytes, own**2)

    def observe_at_least(
        self, config: TrainingConfig, predicted_bytes: float, allocated_bytes: float, bound_bytes: float
    ) -> None:
        """It ran out of memory: it needed more than this. The belief's moments are matched to the cut normal's."""
        row = self._row(config, allocated_bytes)
        middle, sd = self.needs(config, predicted_bytes, allocated_bytes)
        cut = (bound_bytes - middle) / sd
        if cut < 6:
            hazard = _density(cut) / (1.0 - normal_below(cut))
            share = 1 - hazard * (hazard - cut)
        else:  # where rounding leaves nothing of the tail: its series' first terms
            hazard, share = cut + 1 / cut, 1 / cut**2
        mean = middle + sd * hazard
        variance = max(share, 1e-4) * sd**2
        precision = 1 / variance - 1 / sd**2
        if precision <= 0:
            return
        value = (mean / variance - middle / sd**2) / precision
        own = self.doubt.memory_config * allocated_bytes
        self._update(row, value - predicted_bytes, 1 / precision + own**2)

    def _row(self, config: TrainingConfig, allocated_bytes: float) -> Vector:
        tokens = config.micro_batch_size * config.sequence_length
        return np.array([allocated_bytes, 1.0, float(tokens)])

    def _update(self, row: Vector, residual: float, noise: float) -> None:
        spread = self.variance @ row
        gain = spread / (float(row @ spread) + noise)
        self.mean = self.mean + gain * (residual - float(row @ self.mean))
        self.variance = self.variance - np.outer(gain, spread)


def normal_below(value: float) -> float:
    """Probability of a standard normal below `value`."""
    return 0.5 * math.erfc(-value / math.sqrt(2))


def _density(value: float) -> float:
    return math.exp(-0.5 * value * value) / math.sqrt(2 * math.pi)


def expected_gains(believed: Believed, best: float) -> Vector:
    """(n,): by how much each is expected to be below `best`, over the hypotheses; what is above counts as nothing."""
    ratios = (best - believed.means) / believed.deviations
    density = np.exp(-0.5 * np.square(ratios)) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.tanh(ratios * (0.7978845608 + 0.0356774081 * np.square(ratios))))  # Page (1977), to 2e-4
    gains: Vector = believed.weights @ (believed.deviations * (ratios * below + density))
    return np.maximum(gains, 0.0)
