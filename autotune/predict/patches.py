"""What a device does differently from `meta`, put in place for the length of a dry run.

Attention kernels by name, dropout's fused kernel, FlashAttention without its package, checkpoints on the host,
questions that only data could answer.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.fx.experimental._config
from torch import library
from torch.nn import functional

from autotune.predict import autocast
from autotune.predict.kernels import KernelSet

FLASH_HEAD_LIMIT = 256  # of head dimensions: torch's and the flash-attn package's kernels


@contextlib.contextmanager
def device_behaviour(kernels: KernelSet) -> Iterator[None]:
    """While it lasts, operators on meta tensors run as they would on a device with these kernels."""
    import transformers.modeling_flash_attention_utils as flash_utils
    import transformers.modeling_utils as modeling_utils

    enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    with contextlib.ExitStack() as stack:
        patch = functools.partial(_patch, stack)
        patch(functional, "scaled_dot_product_attention", functools.partial(_attention, kernels))
        patch(torch, "is_autocast_enabled", lambda *kind: autocast.is_on() if kind == ("meta",) else enabled(*kind))
        patch(
            torch,
            "get_autocast_dtype",
            lambda kind: (autocast.current_dtype() or torch.bfloat16) if kind == "meta" else dtype_of(kind),
        )
        patch(torch, "autocast", functools.partial(_autocast, kernels, torch.autocast))
        patch(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True)  # trl picks learned tokens
        with contextlib.suppress(ImportError):  # transformers before 5
            import transformers.integrations.moe as experts

            _let_products_be_grouped()
            if hasattr(experts, "_can_use_grouped_mm"):
                patch(experts, "_can_use_grouped_mm", lambda *_: kernels.grouped_mm)
        patch(flash_utils, "lazy_import_flash_attention", _flash_functions)
        if hasattr(modeling_utils, "save_on_cpu"):
            patch(modeling_utils, "save_on_cpu", _saved_on_host)
        if kernels.kind == "cuda":
            patch(functional, "dropout", _fused_dropout)
            patch(functional, "softmax", functools.partial(_fused_softmax, functional.softmax))
        allowed = {"_get_fused_kernels_supported_devices": kernels.kind}
        if kernels.kind == "cuda":  # on the CPU torch's optimizers go tensor by tensor
            allowed["_get_foreach_kernels_supported_devices"] = kernels.kind
        for name, kind in allowed.items():
            for module in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
                if hasattr(sys.modules[module], name):
                    patch(sys.modules[module], name, lambda kind=kind: [kind, "meta"])
        yield


_grouped: list[library.Library] = []


def _let_products_be_grouped() -> None:
    """torch's grouped product on meta takes bfloat16 alone, on devices the other dtypes too (aten .../GroupedBlas)."""
    if not _grouped and hasattr(torch.ops.aten, "_grouped_mm"):
        _grouped.append(library.Library("aten", "IMPL", "Meta"))
        _grouped[0].impl("_grouped_mm", _grouped_mm, allow_override=True)


def _grouped_mm(
    rows: torch.Tensor,
    weights: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(S, K) rows in groups by (E, K, N) weights: (S, N); the weights' gradient, (K, S) by (S, N) in groups of S:
    (E, K, N). Rows are padded to 16 bytes as the kernel's."""
    groups = () if weights.dim() == 3 or offs is None else (offs.numel(),)
    shape = (*groups, rows.size(-2), weights.size(-1))
    dtype = out_dtype or rows.dtype
    padded = -(-shape[-1] * dtype.itemsize // 16) * 16 // dtype.itemsize
    strides = (*((shape[-2] * padded,) if groups else ()), padded, 1)
    return torch.empty_strided(shape, strides, dtype=dtype, device=rows.device)


def _patch(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.enter_context(mock.patch.object(owner, name, value))


def _attention(
    kernels: KernelSet,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's scaled_dot_product_attention on the kernel that the device would pick (aten .../transformers/
    attention.cpp and sdp_utils.cpp). (B, H, T, D) in and out."""
    query, key, value = autocast.lower(query), autocast.lower(key), autocast.lower(value)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = autocast.lower(attn_mask)
    half = query.dtype in (torch.float16, torch.bfloat16)
    small_heads = max(query.size(-1), value.size(-1)) <= FLASH_HEAD_LIMIT
    one_width = query.size(-1) == value.size(-1)
    if kernels.kind == "cpu" and not dropout_p and one_width:
        return _cpu_flash(query, key, value, attn_mask, is_causal, scale)
    if kernels.sdpa_flash and half and small_heads and attn_mask is None and one_width:
        width = query.size(-1)
        if width % 8:
            query, key, value = (functional.pad(t, [0, 8 - width % 8]) for t in (query, key, value))
            scale = scale or 1 / math.sqrt(width)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out: torch.Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :width]
    if kernels.sdpa_efficient:
        return _efficient_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
    plain = torch.ops.aten._scaled_dot_product_attention_math
    attended: torch.Tensor
    with autocast.off():  # as inside any operator that autocast lowers
        attended, _ = plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return attended


def _efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    groups = query.size(1) // key.size(1)
    if groups > 1:  # this kernel has no grouped heads: keys and values are repeated
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = _added(mask, query)
    if bias is not None:
        if bias.size(-1) % 16:  # the kernel wants rows of a multiple of 16
            bias = functional.pad(bias, [0, 16 - bias.size(-1) % 16])[..., : key.size(2)]
        bias = bias.expand(query.size(0), query.size(1), query.size(2), key.size(2))
    saves = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out: torch.Tensor = efficient(query, key, value, bias, saves, dropout, causal, scale=scale)[0]
    return out


def _cpu_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: torch.Tensor = flash(query, key, value, 0.0, causal, attn_mask=_added(mask, query), scale=scale)[0]
    return out


def _added(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """A mask of truths as one that is added to the scores: these kernels take no other."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)


def _fused_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:  # torch's own argument names
    """CUDA's dropout: one kernel that keeps a mask of one byte an element."""
    if not training or p == 0 or input.numel() == 0:
        return input
    out: torch.Tensor = torch.native_dropout(input, p, True)[0]
    return out


def _autocast(kernels: KernelSet, plain: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
    """torch.autocast, which refuses meta."""
    if device_type != "meta":
        return plain(device_type, *args, **kwargs)
    if kwargs.get("enabled") is False or not autocast.is_on():
        return autocast.off()
    return autocast.autocast(autocast.current_dtype() or torch.bfloat16, kernels.kind)


def _fused_softmax(
    plain: Any, input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """CUDA's softmax of float16 into float32: one kernel, no cast copy (aten .../SoftMax.cpp)."""
    if input.dtype == torch.float16 and dtype == torch.float32 and dim is not None:
        return torch._softmax(input, dim, True)
    out: torch.Tensor = plain(input, dim=dim, dtype=dtype)
    return out


_FLASH_OPTIONS = ("is_causal", "softmax_scale", "max_seqlen_q")


def _flash_functions(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    """What transformers imports of the flash-attn package, with its kernels named and not run."""

    def process(**options: Any) -> dict[str, Any]:
        return {key: options[key] for key in _FLASH_OPTIONS if options.get(key) is not None}

    return (_flash, _flash_varlen, None, None, None), (process, process)


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """(B, T, H, D): flash_attn_func. Saves its inputs, its output and one float32 a row of scores."""
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, None, None, query.size(1), key.size(1), 0.0, bool(options.get("is_causal", True)), False
    )[0]
    return out


def _flash_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """(tokens, H, D): flash_attn_varlen_func, of sequences of one length."""
    length = int(options.get("max_seqlen_q") or query.size(0))
    query, key, value = (part.view(-1, length, *part.shape[1:]) for part in (query, key, value))
    return _flash(query, key, value, **options).flatten(0, 1)


#: Copies to the host and back, which no operator on meta would show: one kernel each, of so many bytes.
_host = library.Library("autotune_host", "DEF")
_host.define("keep(Tensor x) -> ()")
_host.define("give_back(Tensor like, int[] size, ScalarType dtype) -> Tensor")
_host.impl("keep", lambda x: None, "Meta")
_host.impl("give_back", lambda like, size, dtype: torch.empty(size, dtype=dtype, device="meta"), "Meta")


def _saved_on_host(**_: Any) -> Any:
    """`torch.autograd.graph.save_on_cpu`: what is saved leaves the device, and comes back as a new tensor."""
    anchor = torch.empty(0, device="meta")

    def pack(tensor: torch.Tensor) -> Any:
        if tensor.device.type != "meta":
            return tensor
        torch.ops.autotune_host.keep(tensor)
        return (tuple(tensor.size()), tensor.dtype)

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        back: torch.Tensor = torch.ops.autotune_host.give_back(anchor, packed[0], packed[1])
        return back

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
