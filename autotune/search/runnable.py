"""What of a config a device, its software or the model cannot do, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autotune.values import AllocatorSetting, Attention, Device, FitRequest, LossPath, Trainer, TrainingConfig
from strategies.allocator import ExpandableSegments
from strategies.paged_optimizer import PagedOptimizer

#: FlashAttention 2's kernels stop there (github.com/Dao-AILab/flash-attention, "NVIDIA CUDA Support").
_FLASH_MAX_HEAD_DIM = 256
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # Llama's name, GPT-2's, MPT's, GPT-Neo's


def unrunnable(request: FitRequest, device: Device, installed: frozenset[str], config: TrainingConfig) -> str | None:
    """What of `config` cannot be done here; None where all can. `installed` names optional packages."""
    if config.attention is Attention.FLASH_ATTENTION_2:
        return _no_flash(request, device, installed, config)
    return (
        _no_loss(request, device, installed, config)
        or _no_allocator(request, device, config)
        or _no_checkpointing(request, device, config)
        or _no_paging(request, device, config)
    )


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


def _no_loss(request: FitRequest, device: Device, installed: frozenset[str], config: TrainingConfig) -> str | None:
    if config.loss is request.start.loss and config.loss is not LossPath.LIGER:
        return None
    if config.loss is LossPath.LIGER and "liger_kernel" not in installed:
        return "liger_kernel is not installed"
    if config.loss is LossPath.LIGER and device.kind not in ("cuda", "rocm"):
        return f"Liger's kernels do not run on {device.kind}"
    if config.loss is not LossPath.CHUNKED and config.trainer is Trainer.TRL:
        return "trl from 1.15 computes its loss in chunks, whatever else is asked for"
    return None


def _no_allocator(request: FitRequest, device: Device, config: TrainingConfig) -> str | None:
    if config.allocator is not AllocatorSetting.EXPANDABLE_SEGMENTS:
        return None
    if device.kind not in ("cuda", "rocm"):
        return f"torch's caching allocator does not run on {device.kind}"
    plain = replace(config, allocator=AllocatorSetting.DEFAULT)
    if ExpandableSegments().apply(plain, request, device) is None:
        return "expandable segments need CUDA's virtual memory calls, which Windows, WSL2 and virtual GPUs may refuse"
    return None


def _no_checkpointing(request: FitRequest, device: Device, config: TrainingConfig) -> str | None:
    mode = config.gradient_checkpointing
    if mode == "offload" and (device.kind == "cpu" or device.unified_memory):
        return "activations are in the host's memory already"
    layers = _layers(request.model.config)
    if mode.startswith("every_") and mode != request.start.gradient_checkpointing and layers is not None:
        step = int(mode.removeprefix("every_"))
        if layers <= step:
            return f"{mode} needs more than {step} layers, the model has {layers}"
    return None


def _no_paging(request: FitRequest, device: Device, config: TrainingConfig) -> str | None:
    if not config.optimizer.startswith("paged_") or config.optimizer == request.start.optimizer:
        return None
    if PagedOptimizer().apply(replace(config, optimizer="adamw_torch"), request, device) is None:
        return f"bitsandbytes has no paged memory on {'a virtual GPU' if device.virtual else device.name}"
    return None


def _capability(device: Device) -> tuple[int, int]:
    """CUDA's compute capability as numbers; (0, 0) where the driver does not say."""
    major, _, minor = (device.compute_capability or "0.0").partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)


def _head_dim(config: Mapping[str, Any]) -> int | None:
    """Width of one attention head, from a model's config.json."""
    shape = _text_part(config)
    if isinstance(head := shape.get("head_dim"), int):
        return head
    hidden, heads = shape.get("hidden_size"), shape.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _layers(config: Mapping[str, Any]) -> int | None:
    shape = _text_part(config)
    return next((shape[name] for name in _LAYERS if isinstance(shape.get(name), int)), None)


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config
