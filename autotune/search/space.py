"""The legal configs of a request on a device: micro batch sizes and the few discrete settings that matter."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from autotune.mix import packed_variant
from autotune.protocols import Strategy
from autotune.search.dimensions import (
    accumulation,
    climbed,
    divisors,
    is_near,
    joint,
    near_sizes,
    samples_of_one_gpu,
    unasked,
)
from autotune.search.narrow import check_left, check_sizes_left, kept, refusal
from autotune.search.runnable import unrunnable
from autotune.values import (
    AllocatorSetting,
    Attention,
    Device,
    FitRequest,
    LengthMix,
    LossPath,
    Preserves,
    TrainingConfig,
    Upcast,
)

#: Settings that trade memory for nothing that is learned, most memory first.
_MOST_MEMORY_FIRST: dict[str, tuple[Any, ...]] = {
    "attention": (Attention.EAGER, Attention.SDPA, Attention.FLASH_ATTENTION_2),
    "loss": (LossPath.FULL, LossPath.CHUNKED, LossPath.LIGER),
    "upcast": (Upcast.FP32, Upcast.NORMS, Upcast.NONE),
    "double_quant": (False, True),
    "allocator": (AllocatorSetting.DEFAULT, AllocatorSetting.EXPANDABLE_SEGMENTS),
}
_SIZES = ("micro_batch_size", "sequence_length", "lora_rank")
_ORDERED = {*_MOST_MEMORY_FIRST, *_SIZES, "gradient_checkpointing", "gradient_accumulation_steps"}
_UNORDERED = tuple(item.name for item in fields(TrainingConfig) if item.name not in _ORDERED)
_DEFAULTS = {item.name: item.default for item in fields(TrainingConfig)}  # of the settings below: legal everywhere
#: What no search and no consent changes.
_KEPT = ("quantization", "compute_dtype", "autocast", "lora_dropout", "adapter_dtype", "reentrant", "trainer")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """What a fit may try. Every config of it trains with the request's effective batch size, or near it if allowed."""

    request: FitRequest
    device: Device
    installed: frozenset[str]  # importable optional packages
    start: TrainingConfig  # the request's settings at the smallest micro batch size
    micro_batch_sizes: tuple[int, ...]  # divisors of effective batch ÷ world size, ascending
    near_sizes: tuple[int, ...]  # others that are allowed, ascending
    settings: Mapping[str, tuple[Any, ...]]  # field of TrainingConfig: values to climb over, the request's own first
    joint: Mapping[str, tuple[Any, ...]]  # field of TrainingConfig: all its values, the request's own first
    excluded: tuple[tuple[str, str], ...]  # ("field=value", why it is left out)

    @property
    def samples(self) -> int:
        """Of one GPU in an optimizer step, as asked."""
        return samples_of_one_gpu(self.request.start)

    @property
    def sizes(self) -> tuple[int, ...]:
        """All micro batch sizes, ascending."""
        return tuple(sorted({*self.micro_batch_sizes, *self.near_sizes}))

    def configs(self) -> Iterator[TrainingConfig]:
        """Every config of the joint space at the start's sequence length, rank and modules; each once."""
        found = dict.fromkeys(
            self._sized(replace(self.start, **dict(zip(self.joint, values, strict=True))), size)
            for values in itertools.product(*self.joint.values())
            for size in self.sizes
        )
        yield from (one for one in found if kept(self.request, "micro_batch_size", one.micro_batch_size))

    def fallbacks(self, ladder: Sequence[Strategy]) -> list[SearchSpace]:
        """The spaces that consent allows, in the order of what they give up, each move upon the one before."""
        found: list[SearchSpace] = []
        config = self.start
        for strategy in ladder:
            while strategy.preserves is Preserves.CONSENT:
                lower = strategy.apply(config, self.request, self.device)
                if lower is None or lower == config or self.legal(lower) is not None:
                    break
                found.append(replace(self, start=lower))
                config = lower
        return found

    def config_at(self, micro_batch_size: int, **settings: Any) -> TrainingConfig:
        """The start with these settings at this micro batch size, accumulation following.

        Raises ValueError for a micro batch size that does not divide the batch and is not near it.
        """
        return self.resize(replace(self.start, **settings), micro_batch_size)

    def resize(self, config: TrainingConfig, micro_batch_size: int) -> TrainingConfig:
        """`config` at another micro batch size, in fewer rows where it packs, with as many samples to a step.

        Raises ValueError as above.
        """
        if micro_batch_size not in self.sizes:
            raise ValueError(f"micro_batch_size must be one of {self.sizes}, not {micro_batch_size!r}")
        return self._sized(config, micro_batch_size)

    def legal(self, config: TrainingConfig) -> str | None:
        """Why `config` may not be tried, or None where it may."""
        return (
            self._other_batch(config)
            or _unasked(self.request, config)
            or unrunnable(self.request, self.device, self.installed, config)
            or self._left_out(config)
        )

    def given_up(self, config: TrainingConfig) -> tuple[int, int, int]:
        """What `config` takes from what is learned: tokens of length, LoRA rank, target modules changed.

        Compares as tuples do: a fit at the wanted length comes before any shorter one.
        """
        wanted = self.request.start
        return (
            wanted.sequence_length - config.sequence_length,
            wanted.lora_rank - config.lora_rank,
            int(wanted.target_modules != config.target_modules),
        )

    @property
    def _packs(self) -> bool:
        return any(self.joint["packing"]) and not self.request.start.packing

    def _sized(self, config: TrainingConfig, size: int) -> TrainingConfig:
        """At a micro batch size; where it packs and the request does not, with as many samples to a step."""
        steps = accumulation(self.samples, size)
        sized = replace(config, micro_batch_size=size, gradient_accumulation_steps=steps)
        if not config.packing or self.request.start.packing or self.request.lengths is None:
            return sized
        micro, steps = _packed_batch(
            self.request.lengths, config.sequence_length, config.attention, size, steps, config.world_size
        )
        return replace(sized, micro_batch_size=micro, gradient_accumulation_steps=steps)

    def _other_batch(self, config: TrainingConfig) -> str | None:
        """Whether the effective batch is another than the one asked for, or not near it where that is allowed."""
        wanted = self.request.start
        if config.packing and not wanted.packing and self._packs:
            same = (self._sized(config, size) for size in self.sizes)
            if any(_batch(config) == _batch(other) for other in same):
                return None
            return f"packed, {config.micro_batch_size} × {config.gradient_accumulation_steps} is another batch"
        if (config.effective_batch_size, config.world_size) == (wanted.effective_batch_size, wanted.world_size):
            return None
        near = self.request.allow_near and is_near(self.samples, config.micro_batch_size)
        same_steps = config.gradient_accumulation_steps == accumulation(self.samples, config.micro_batch_size)
        if near and same_steps and config.world_size == wanted.world_size:
            return None
        return f"effective_batch_size would be {config.effective_batch_size}, not {wanted.effective_batch_size}"

    def _left_out(self, config: TrainingConfig) -> str | None:
        """Which of its settings is none of this space."""
        if reason := refusal(self.request, "micro_batch_size", config.micro_batch_size):
            return reason
        for name, values in self.joint.items():
            value = getattr(config, name)
            if value not in values:
                return refusal(self.request, name, value) or unasked(self.request, self.device, name, value)
        return None


def build_space(request: FitRequest, device: Device, *, installed: Collection[str] = ()) -> SearchSpace:
    """The space of `request` on `device`; `installed` names the optional packages that can be imported.

    Raises `InvalidRequest` where its narrowing leaves nothing.
    """
    packages, wanted = frozenset(installed), request.start
    values, excluded = _that_run(request, device, packages)
    for name, run in values.items():
        values[name] = tuple(value for value in run if kept(request, name, value))
        check_left(request, device, name, values[name], dict(excluded))
    samples = samples_of_one_gpu(wanted)
    exact, near = divisors(samples), near_sizes(samples)
    sizes = tuple(size for size in exact if kept(request, "micro_batch_size", size))
    others = tuple(size for size in near if request.allow_near and kept(request, "micro_batch_size", size))
    check_sizes_left(request, (*sizes, *others), exact, near)
    climbs = {name: tuple(v for v in own if v in values[name]) for name, own in climbed(request, device).items()}
    settings = {name: climb or values[name][:1] for name, climb in climbs.items()}
    own: dict[str, Any] = {name: settings.get(name, of_it)[0] for name, of_it in values.items()}
    sizes = sizes or others  # a climber then goes over those
    space = SearchSpace(
        request=request,
        device=device,
        installed=packages,
        start=replace(wanted, **own),
        micro_batch_sizes=sizes,
        near_sizes=others,
        settings=settings,
        joint=values,
        excluded=excluded,
    )
    return replace(space, start=space.resize(space.start, sizes[0]))


def _that_run(
    request: FitRequest, device: Device, installed: frozenset[str]
) -> tuple[dict[str, tuple[Any, ...]], tuple[tuple[str, str], ...]]:
    """(the values of each setting that can run here, "field=value" of the others with why they cannot)."""
    values = joint(request, device)
    defaults: dict[str, Any] = {name: _DEFAULTS[name] for name in climbed(request, device)}
    plain = replace(request.start, **defaults)  # so that what cannot run is left out alone
    excluded: list[tuple[str, str]] = []
    found: dict[str, tuple[Any, ...]] = {}
    for name, each in values.items():
        reasons = {value: unrunnable(request, device, installed, with_setting(plain, name, value)) for value in each}
        legal = tuple(value for value, reason in reasons.items() if reason is None)
        excluded += [(f"{name}={value}", reason) for value, reason in reasons.items() if reason is not None]
        found[name] = legal or (_DEFAULTS[name],)
    return found, tuple(excluded)


@functools.lru_cache(maxsize=4096)
def _packed_batch(
    mix: LengthMix, length: int, attention: Attention, micro: int, steps: int, world_size: int
) -> tuple[int, int]:
    """(micro batch size, accumulation) of these samples packed: the rows of a long mix are costly to count."""
    config = TrainingConfig(
        sequence_length=length,
        micro_batch_size=micro,
        gradient_accumulation_steps=steps,
        world_size=world_size,
        attention=attention,
    )
    return _batch(packed_variant(config, mix))


def _batch(config: TrainingConfig) -> tuple[int, int]:
    return config.micro_batch_size, config.gradient_accumulation_steps


def with_setting(config: TrainingConfig, name: str, value: Any) -> TrainingConfig:
    """`config` with the field `name` at `value`."""
    change: dict[str, Any] = {name: value}
    return replace(config, **change)


def needs_at_least(config: TrainingConfig, other: TrainingConfig) -> bool:
    """Whether `config` surely takes as much memory as `other` or more.

    So it does where no setting saves memory against the other's and the rest is equal. False: not known.
    """
    same = all(getattr(config, name) == getattr(other, name) for name in _UNORDERED)
    return same and all(mine >= theirs for mine, theirs in zip(_memory(config), _memory(other), strict=True))


def least_memory(space: SearchSpace) -> tuple[TrainingConfig, ...]:
    """The config that takes least by the order above, then plainer ones, for where it cannot be predicted."""
    joint = space.joint
    least: dict[str, Any] = {name: max(joint[name], key=order.index) for name, order in _MOST_MEMORY_FIRST.items()}
    least["gradient_checkpointing"] = min(joint["gradient_checkpointing"], key=kept_layers)
    least["optimizer"] = next((name for name in joint["optimizer"] if "8bit" in name), joint["optimizer"][0])
    found = [space.config_at(space.sizes[0], **least)]
    for name, plain in (("gradient_checkpointing", "full"), ("loss", LossPath.CHUNKED)):
        if plain in joint[name]:
            found.append(with_setting(found[-1], name, plain))
    return tuple(dict.fromkeys(found))


def _memory(config: TrainingConfig) -> tuple[int, ...]:
    """One number a setting, rising with the memory it takes. Not comparable between settings."""
    ranks = [-order.index(getattr(config, name)) for name, order in _MOST_MEMORY_FIRST.items()]
    return (*ranks, *(getattr(config, name) for name in _SIZES), kept_layers(config.gradient_checkpointing))


def kept_layers(checkpointing: str) -> int:
    """Rising with the layers whose activations are kept: offload, full, every 2nd layer checkpointed, … off."""
    fixed = {"offload": 0, "full": 1, "off": 10**9}
    return fixed[checkpointing] if checkpointing in fixed else int(checkpointing.removeprefix("every_"))


def _unasked(request: FitRequest, config: TrainingConfig) -> str | None:
    """What `config` changes of the training without consent."""
    wanted = request.start
    if config.sequence_length > wanted.sequence_length:
        return f"sequence_length {config.sequence_length} is above the {wanted.sequence_length} asked for"
    shortest = request.min_sequence_length or (wanted.sequence_length if request.sequence_length_stated else 1)
    if config.sequence_length < shortest:
        return f"sequence_length {config.sequence_length} is below {shortest}, the shortest allowed"
    if not (request.min_lora_rank or wanted.lora_rank) <= config.lora_rank <= wanted.lora_rank:
        return f"lora_rank {config.lora_rank} is not allowed: {wanted.lora_rank} was asked for"
    if config.target_modules != wanted.target_modules and not request.allow_fewer_modules:
        return "target_modules may not change"
    return next((f"{name} may not change" for name in _KEPT if getattr(config, name) != getattr(wanted, name)), None)
