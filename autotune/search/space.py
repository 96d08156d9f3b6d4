"""The legal configs of a request on a device: micro batch sizes and the few discrete settings that matter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from autotune.values import AllocatorSetting, Attention, Device, FitRequest, LossPath, TrainingConfig, Upcast

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

#: FlashAttention 2's kernels stop there (github.com/Dao-AILab/flash-attention, "NVIDIA CUDA Support").
_FLASH_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """What a fit may try. Every config of it trains with the request's effective batch size."""

    request: FitRequest
    device: Device
    installed: frozenset[str]  # importable optional packages
    start: TrainingConfig  # the request's settings at the smallest micro batch size
    micro_batch_sizes: tuple[int, ...]  # divisors of effective batch ÷ world size, ascending
    settings: Mapping[str, tuple[Any, ...]]  # field of TrainingConfig: its values, the request's own first
    excluded: tuple[tuple[str, str], ...]  # ("field=value", why it is left out)

    def config_at(self, micro_batch_size: int, **settings: Any) -> TrainingConfig:
        """The start with these settings at this micro batch size, accumulation following.

        Raises ValueError for a micro batch size that does not divide the batch.
        """
        return self.resize(replace(self.start, **settings), micro_batch_size)

    def resize(self, config: TrainingConfig, micro_batch_size: int) -> TrainingConfig:
        """`config` at another micro batch size and the same effective batch size. Raises ValueError as above."""
        if micro_batch_size not in self.micro_batch_sizes:
            raise ValueError(f"micro_batch_size must be one of {self.micro_batch_sizes}, not {micro_batch_size!r}")
        accumulation = self.micro_batch_sizes[-1] // micro_batch_size
        return replace(config, micro_batch_size=micro_batch_size, gradient_accumulation_steps=accumulation)

    def legal(self, config: TrainingConfig) -> str | None:
        """Why `config` may not be tried, or None where it may."""
        return _unasked(self.request, config) or _unrunnable(self.request, self.device, self.installed, config)

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


def build_space(request: FitRequest, device: Device, *, installed: Collection[str] = ()) -> SearchSpace:
    """The space of `request` on `device`; `installed` names the optional packages that can be imported."""
    packages, wanted = frozenset(installed), request.start
    settings: dict[str, tuple[Any, ...]] = {}
    excluded: list[tuple[str, str]] = []
    alternatives = _alternatives(wanted, device)
    defaults: dict[str, Any] = {name: _DEFAULTS[name] for name in alternatives}
    plain = replace(wanted, **defaults)  # so that what cannot run is left out alone
    for name, values in alternatives.items():
        reasons = {value: _unrunnable(request, device, packages, with_setting(plain, name, value)) for value in values}
        legal = tuple(value for value, reason in reasons.items() if reason is None)
        excluded += [(f"{name}={value}", reason) for value, reason in reasons.items() if reason is not None]
        settings[name] = legal or (_DEFAULTS[name],)
    sizes = divisors(wanted.effective_batch_size // wanted.world_size)
    own: dict[str, Any] = {name: values[0] for name, values in settings.items()}
    return SearchSpace(
        request=request,
        device=device,
        installed=packages,
        start=replace(wanted, micro_batch_size=sizes[0], gradient_accumulation_steps=sizes[-1], **own),
        micro_batch_sizes=sizes,
        settings=settings,
        excluded=tuple(excluded),
    )


def with_setting(config: TrainingConfig, name: str, value: Any) -> TrainingConfig:
    """`config` with the field `name` at `value`."""
    change: dict[str, Any] = {name: value}
    return replace(config, **change)


def divisors(number: int) -> tuple[int, ...]:
    """The divisors of a positive number, ascending."""
    return tuple(size for size in range(1, number + 1) if number % size == 0)


def needs_at_least(config: TrainingConfig, other: TrainingConfig) -> bool:
    """Whether `config` surely takes as much memory as `other` or more.

    So it does where no setting saves memory against the other's and the rest is equal. False: not known.
    """
    same = all(getattr(config, name) == getattr(other, name) for name in _UNORDERED)
    return same and all(mine >= theirs for mine, theirs in zip(_memory(config), _memory(other), strict=True))


def _memory(config: TrainingConfig) -> tuple[int, ...]:
    """One number a setting, rising with the memory it takes. Not comparable between settings."""
    ranks = [-order.index(getattr(config, name)) for name, order in _MOST_MEMORY_FIRST.items()]
    return (*ranks, *(getattr(config, name) for name in _SIZES), _kept_layers(config.gradient_checkpointing))


def _kept_layers(checkpointing: str) -> int:
    """Rising with the layers whose activations are kept: offload, full, every 2nd layer checkpointed, … off."""
    fixed = {"offload": 0, "full": 1, "off": 10**9}
    return fixed[checkpointing] if checkpointing in fixed else int(checkpointing.removeprefix("every_"))


def _alternatives(wanted: TrainingConfig, device: Device) -> dict[str, tuple[Any, ...]]:
    """The values of each setting that a fit compares, the request's own first. Others come through the ladder."""
    attention = [wanted.attention, Attention.SDPA]
    if device.kind == "cuda":
        attention.append(Attention.FLASH_ATTENTION_2)
    upcast = [wanted.upcast] + [Upcast.NONE] * (wanted.upcast is Upcast.FP32)
    return {
        "attention": tuple(dict.fromkeys(attention)),
        "upcast": tuple(upcast),
        "loss": (wanted.loss,),
        "allocator": (wanted.allocator,),
        "gradient_checkpointing": tuple(dict.fromkeys([wanted.gradient_checkpointing, "off", "full"])),
    }


def _unasked(request: FitRequest, config: TrainingConfig) -> str | None:
    """What `config` changes of the training without consent."""
    wanted = request.start
    if (config.effective_batch_size, config.world_size) != (wanted.effective_batch_size, wanted.world_size):
        return f"effective_batch_size would be {config.effective_batch_size}, not {wanted.effective_batch_size}"
    if config.sequence_length > wanted.sequence_length:
        return f"sequence_length {config.sequence_length} is above the {wanted.sequence_length} asked for"
    shortest = request.min_sequence_length or (wanted.sequence_length if request.sequence_length_stated else 1)
    if config.sequence_length < shortest:
        return f"sequence_length {config.sequence_length} is below {shortest}, the shortest allowed"
    if not (request.min_lora_rank or wanted.lora_rank) <= config.lora_rank <= wanted.lora_rank:
        return f"lora_rank {config.lora_rank} is not allowed: {wanted.lora_rank} was asked for"
    if config.target_modules != wanted.target_modules and not request.allow_fewer_modules:
        return "target_modules may not change"
    return None


def _unrunnable(request: FitRequest, device: Device, installed: frozenset[str], config: TrainingConfig) -> str | None:
    """What of `config` the device or its software cannot do."""
    if config.attention is Attention.FLASH_ATTENTION_2:
        return _no_flash(request, device, installed, config)
    if config.loss is LossPath.LIGER and "liger_kernel" not in installed:
        return "liger_kernel is not installed"
    if config.allocator is AllocatorSetting.EXPANDABLE_SEGMENTS and device.kind not in ("cuda", "rocm"):
        return f"torch's caching allocator does not run on {device.kind}"
    if config.gradient_checkpointing == "offload" and device.kind == "cpu":
        return "activations are in the host's memory already"
    return None


def _no_flash(request: FitRequest, device: Device, installed: frozenset[str], config: TrainingConfig) -> str | None:
    if device.kind not in ("cuda", "rocm"):
        return f"FlashAttention 2 does not run on {device.kind}"
    if "flash_attn" not in installed:
        return "flash_attn is not installed"
    if device.kind == "cuda" and _capability(device) < (8, 0):
        return f"FlashAttention 2 needs compute capability 8.0, not {device.compute_capability or 'unknown'}"
    if config.compute_dtype == "float32":
        return "FlashAttention 2 needs a 16-bit compute_dtype"
    if (head := _head_dim(request.model.config)) is not None and head > _FLASH_MAX_HEAD_DIM:
        return f"FlashAttention 2 stops at heads of {_FLASH_MAX_HEAD_DIM}, the model's are {head}"
    return None


def _capability(device: Device) -> tuple[int, int]:
    """CUDA's compute capability as numbers; (0, 0) where the driver does not say."""
    major, _, minor = (device.compute_capability or "0.0").partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)


def _head_dim(config: Mapping[str, Any]) -> int | None:
    """Width of one attention head, from a model's config.json."""
    text = config.get("text_config")
    shape = text if isinstance(text, dict) else config
    if isinstance(head := shape.get("head_dim"), int):
        return head
    hidden, heads = shape.get("hidden_size"), shape.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
