"""Where nothing fits: which consent would make it fit, by predictions corrected by what was measured. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from autotune.protocols import Predictor, Strategy
from autotune.search.belief import CPU_DOUBT, GPU_DOUBT, MemoryBelief
from autotune.search.climb import Observation
from autotune.search.remember import needed_bytes, remember
from autotune.search.space import SearchSpace, build_space, least_memory
from autotune.values import MIB, Consent, Device, FitRequest, TrainingConfig

SHORTEST = 64  # tokens that are offered, where more were asked for
_LIKELY_SD = 0.524  # of a normal: 70 % lie below its mean and so many standard deviations

Kind = Literal["shorter_sequence", "lower_rank", "fewer_modules", "near", "wider_search"]


def consents(
    request: FitRequest,
    device: Device,
    observations: Iterable[Observation],
    predictor: Predictor,
    *,
    ladder: Sequence[Strategy],
    installed: Collection[str] = (),
) -> tuple[Consent, ...]:
    """Each consent that is not given, the memory limit last.

    Nothing where nothing can be predicted, and where the request is likely to fit as it is (its probes ended). Of each
    kind the first config that is likely to fit, in the order of what a fit would give up; where none is, the
    one that needs least.
    """
    if predictor.allowed_bytes is None:
        return ()
    memory = _Memory(request, device, predictor, predictor.allowed_bytes)
    for observation in observations:
        memory.learn(observation)
    given = _levels(request, device, ladder, installed)
    least = memory.first_that_fits(given)
    if least is None or least[1] <= memory.allowed_bytes:
        return ()
    found = []
    for kind, wider in _ways(request):
        known = [level.start for level in given] if kind not in ("near", "wider_search") else []
        levels = [level for level in _levels(wider, device, ladder, installed) if level.start not in known]
        offer = memory.first_that_fits(levels)
        if offer is not None:
            config, needed = offer
            fits = needed <= memory.allowed_bytes
            found.append(
                Consent(kind=kind, option=_option(kind, config), config=config, needed_bytes=needed, fits=fits)
            )
    return (*found, *_more_memory(request, device, *least, memory.allowed_bytes))


def _ways(request: FitRequest) -> Iterator[tuple[Kind, FitRequest]]:
    """Each consent that is not given, with the request that has it too."""
    start = request.start
    shortest = min(SHORTEST, max(1, start.sequence_length // 2))
    if shortest < (request.min_sequence_length or start.sequence_length):
        yield "shorter_sequence", replace(request, min_sequence_length=shortest)
    if (request.min_lora_rank or start.lora_rank) > 1:
        yield "lower_rank", replace(request, min_lora_rank=1)
    if not request.allow_fewer_modules:
        yield "fewer_modules", replace(request, allow_fewer_modules=True)
    if not request.allow_near:
        yield "near", replace(request, allow_near=True)
    if request.fixed or request.excluded:
        yield "wider_search", replace(request, fixed=(), excluded=())


def _option(kind: Kind, config: TrainingConfig) -> str | None:
    return {
        "shorter_sequence": f"--min-sequence-length {config.sequence_length}",
        "lower_rank": f"--min-lora-rank {config.lora_rank}",
        "fewer_modules": "--allow-fewer-modules",
        "near": "--allow near",
        "wider_search": None,
    }[kind]


def _levels(
    request: FitRequest, device: Device, ladder: Sequence[Strategy], installed: Collection[str]
) -> list[SearchSpace]:
    space = build_space(request, device, installed=installed)
    return [space, *space.fallbacks(ladder)]


def _more_memory(
    request: FitRequest, device: Device, config: TrainingConfig, needed: int, allowed: int
) -> Iterator[Consent]:
    """The limit under which the config that needs least, with the consents given, is likely to fit."""
    limit = request.memory_limit_bytes or device.total_bytes
    if limit is not None:
        whole = math.ceil((limit + needed - allowed) / MIB)
        here = device.total_bytes is None or whole * MIB <= device.total_bytes
        option = f"--memory-limit {whole}MiB" if here else None
        yield Consent(kind="more_memory", option=option, config=config, needed_bytes=needed, fits=True)


@dataclass
class _Memory:
    """What configs are believed to need."""

    request: FitRequest
    device: Device
    predictor: Predictor
    allowed_bytes: int

    def __post_init__(self) -> None:
        doubt = CPU_DOUBT if self.device.kind == "cpu" else GPU_DOUBT
        self.belief = MemoryBelief(doubt, self.allowed_bytes)

    def learn(self, observation: Observation) -> None:
        """As a search does."""
        expected = self.predictor.expect(observation.config)
        if expected is not None:
            remember(self.belief, expected, observation, on_cpu=self.device.kind == "cpu")

    def first_that_fits(self, levels: Sequence[SearchSpace]) -> tuple[TrainingConfig, int] | None:
        """(config, bytes) of the first level with one that fits, else of the last: they fall from level to level."""
        low, high = 0, len(levels) - 1
        found = self.least(levels[high]) if levels else None
        if found is None or found[1] > self.allowed_bytes:
            return found
        while low < high:
            middle = (low + high) // 2
            offer = self.least(levels[middle])
            if offer is not None and offer[1] <= self.allowed_bytes:
                found, high = offer, middle
            else:
                low = middle + 1
        return found

    def least(self, space: SearchSpace) -> tuple[TrainingConfig, int] | None:
        """The config of a space that needs least, and the bytes it is likely to need; None: not to be predicted."""
        for config in least_memory(space):
            expected = self.predictor.expect(config)
            if expected is not None:
                mean, sd = self.belief.needs(config, needed_bytes(expected), expected.peak_allocated_bytes)
                return config, math.ceil(mean + _LIKELY_SD * sd)
        return None
