"""What a search may vary: the values of each setting, and the micro batch sizes of an effective batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from autotune.values import (
    AllocatorSetting,
    Attention,
    Device,
    FitRequest,
    LossPath,
    Quantization,
    TrainingConfig,
    Upcast,
)
from strategies.optimizer_8bit import Optimizer8bit
from strategies.paged_optimizer import PagedOptimizer

#: Fields of TrainingConfig that a search sets by itself; accumulation follows the micro batch.
SEARCHED = (
    "micro_batch_size",
    "gradient_checkpointing",
    "attention",
    "loss",
    "optimizer",
    "upcast",
    "allocator",
    "double_quant",
    "packing",
)
_ASKED = ("gradient_checkpointing", "attention", "loss", "upcast", "allocator")  # --fix may set these to any value
_ASKED_NEAR = ("double_quant",)  # and these with --allow near
NEAR_BATCH = 0.125  # that an effective batch may be off with --allow near, a fraction
_ALL_UPTO = 16  # near sizes; beyond, speed and memory change little between neighbours


def joint(request: FitRequest, device: Device) -> dict[str, tuple[Any, ...]]:
    """The values of each setting in the joint space, the request's own first; what cannot run here is among them."""
    wanted, near = request.start, request.allow_near
    nf4 = wanted.quantization is Quantization.NF4
    upcasts = [Upcast.NONE] * (wanted.compute_dtype != "float32")
    kernels = [Attention.SDPA, Attention.FLASH_ATTENTION_2]
    settings: dict[str, list[Any]] = {
        "gradient_checkpointing": ["off", "every_2", "every_3", "every_4", "full", "offload"],
        "attention": kernels[: 1 if device.kind == "rocm" else 2],
        "loss": list(LossPath),
        "optimizer": list(_optimizers(request, device)),
        "upcast": upcasts,
        "allocator": list(AllocatorSetting),
        "double_quant": [True] * (near and nf4),
        "packing": [True] * (near and request.lengths is not None),
    }
    return {
        name: tuple(dict.fromkeys([getattr(wanted, name), *values, *_fixed(request, name)]))
        for name, values in settings.items()
    }


def _fixed(request: FitRequest, name: str) -> list[Any]:
    """What the request fixes a setting to, where asking for it is enough: its other values are no approximation."""
    if name not in _ASKED and not (name in _ASKED_NEAR and request.allow_near):
        return []
    kind = type(getattr(request.start, name))
    return [kind(value) for field, value in request.fixed if field == name]


def unasked(request: FitRequest, device: Device, name: str, value: Any) -> str:
    """Why a setting that can run here is in no space of this request."""
    if name == "packing" and request.lengths is None:
        return "packing needs the lengths of your samples (--dataset) and --allow near"
    if value in joint(replace(request, allow_near=True), device)[name]:
        return f"{name}={value} changes the mathematics a little: it needs --allow near"
    instead = f", so give --optimizer {value}" if name == "optimizer" else ""
    return f"{name}={value} is another {name} than the {getattr(request.start, name)} asked for{instead}"


def climbed(request: FitRequest, device: Device) -> dict[str, tuple[Any, ...]]:
    """The values that `climb` compares one by one, the request's own first. Others come to it through the ladder."""
    wanted = request.start
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


def _optimizers(request: FitRequest, device: Device) -> Iterable[str]:
    """The request's own, its paged variant, and with consent to near moves those with 8-bit states."""
    moves = (Optimizer8bit(), PagedOptimizer())
    config, paged = request.start, replace(device, kind="cuda", unified_memory=False, virtual=False)
    found = [config.optimizer]
    for move in moves:
        further = [move.apply(replace(config, optimizer=name), request, paged) for name in found]
        found += [one.optimizer for one in further if one is not None]
    return found


def samples_of_one_gpu(config: TrainingConfig) -> int:
    """Samples that one GPU takes in an optimizer step."""
    return config.micro_batch_size * config.gradient_accumulation_steps


def divisors(number: int) -> tuple[int, ...]:
    """The divisors of a positive number, ascending."""
    return tuple(size for size in range(1, number + 1) if number % size == 0)


def accumulation(samples: int, micro_batch_size: int) -> int:
    """Micro batches to an optimizer step whose samples come nearest to `samples`."""
    return max(1, round(samples / micro_batch_size))


def is_near(samples: int, micro_batch_size: int) -> bool:
    """Whether a micro batch size keeps the effective batch, exactly or as near as --allow near admits."""
    real = micro_batch_size * accumulation(samples, micro_batch_size)
    return micro_batch_size <= samples and abs(real - samples) <= NEAR_BATCH * samples


def near_sizes(samples: int) -> tuple[int, ...]:
    """Micro batch sizes that do not divide `samples` and stay near it, ascending.

    All of them up to 16, then up to eight between a power of two and the next.
    """
    sizes = (size for size in range(2, samples) if samples % size and is_near(samples, size))
    return tuple(size for size in sizes if size <= _ALL_UPTO or size % 2 ** (size.bit_length() - 4) == 0)
