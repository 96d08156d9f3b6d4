"""Autocast for tensors on `meta`, which torch's own leaves alone: the same casts at the same level of dispatch.

torch wraps operators under one dispatch key a device; a meta tensor has none. Here wrappers of the same policies are
registered under the spare key of out-of-tree devices and switched on for the thread. Lists: aten/src/ATen/
autocast_mode.{h,cpp}, torch 2.13. Operators that no causal language model calls are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import library
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard

Target = Literal["cuda", "cpu"]

_KEY: Any = DispatchKey.AutocastPrivateUse1  # type: ignore[attr-defined]
_LOWER = (
    "linear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "mv", "addmv", "addr", "linalg_vecdot",
    "chain_matmul", "prelu", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention",
)  # fmt: skip
_FP32_CUDA = (
    "acos", "asin", "cosh", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh", "tan",
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "group_norm", "cosine_similarity", "nll_loss", "nll_loss2d", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss",
    "mse_loss", "binary_cross_entropy_with_logits", "cdist", "logsumexp",
)  # fmt: skip
_FP32_CPU = (
    "prod", "prod.dim_int", "cdist", "trace", "view_as_complex", "mse_loss", "nll_loss", "nll_loss2d",
    "smooth_l1_loss", "cross_entropy_loss", "l1_loss", "huber_loss", "kl_div", "binary_cross_entropy_with_logits",
)  # fmt: skip
_SET_DTYPE_CUDA = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm", "sum",
    "sum.dim_IntList",
)  # fmt: skip
_PROMOTE_CUDA = ("addcdiv", "addcmul", "atan2", "dot", "vdot", "index_put", "tensordot", "scatter_add")
_PROMOTE_CPU = ("stack", "cat", "index_copy")
_NOT_ON_CPU = {"einsum", "mv", "addmv", "addr", "chain_matmul", "_scaled_dot_product_flash_attention"}


class _State:
    """What is on in this process; a dry run is one thread."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        self.target: Target = "cuda"
        self.depth = 0
        self.casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # leaf and its cast, by id of the leaf


_state = _State()
_libraries: list[library.Library] = []


def is_on() -> bool:
    return _state.depth > 0


def current_dtype() -> torch.dtype | None:
    """The lower precision of the autocast that is on, or None."""
    return _state.dtype if _state.depth else None


@contextlib.contextmanager
def autocast(dtype: torch.dtype, target: Target) -> Iterator[None]:
    """As `torch.autocast(target, dtype)`, for meta tensors: casts of trainable leaves are kept until the outermost
    one ends."""
    _register()
    before = (_state.dtype, _state.target)
    flag, flag_dtype = torch.is_autocast_enabled(target), torch.get_autocast_dtype(target)
    _state.dtype, _state.target = dtype, target
    _state.depth += 1
    _switch(True)
    torch.set_autocast_enabled(target, True)  # peft and transformers ask for the flag of the device
    torch.set_autocast_dtype(target, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(target, flag)
        torch.set_autocast_dtype(target, flag_dtype)
        _state.depth -= 1
        _state.dtype, _state.target = before
        if not _state.depth:
            _switch(False)
            _state.casts.clear()


def lower(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the lower precision, as an operator of that list would see it."""
    return _cast(tensor, _state.dtype) if _state.depth and _state.dtype else tensor


def _switch(on: bool) -> None:
    torch._C._dispatch_tls_set_dispatch_key_included(_KEY, on)
    torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY, not on)


def _register() -> None:
    if _libraries:
        return
    fallback = library.Library("_", "IMPL", _KEY.name)
    fallback.fallback(library.fallthrough_kernel)
    aten = library.Library("aten", "IMPL", _KEY.name)
    for names, policy in (
        (_LOWER, _lower_policy),
        (_FP32_CUDA, _float32_policy),
        (_FP32_CPU, _float32_policy),
        (_SET_DTYPE_CUDA, _set_dtype_policy),
        (_PROMOTE_CUDA + _PROMOTE_CPU, _promote_policy),
    ):
        for name in names:
            _wrap(aten, name, policy)
    _libraries.extend((fallback, aten))


_wrapped: set[str] = set()


def _wrap(registry: library.Library, name: str, policy: Callable[..., Any]) -> None:
    if name in _wrapped:
        return
    _wrapped.add(name)
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, base), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _ExcludeDispatchKeyGuard(DispatchKeySet(_KEY)):
            return policy(name, operator, args, kwargs)

    registry.impl(name, kernel)


def _lower_policy(name: str, operator: Any, args: Any, kwargs: Any) -> Any:
    if _state.target == "cpu" and name in _NOT_ON_CPU:
        return operator(*args, **kwargs)
    return operator(*_cast_all(args, _state.dtype), **_cast_all(kwargs, _state.dtype))


def _float32_policy(name: str, operator: Any, args: Any, kwargs: Any) -> Any:
    if name not in (_FP32_CUDA if _state.target == "cuda" else _FP32_CPU):
        return operator(*args, **kwargs)
    return operator(*_cast_all(args, torch.float32), **_cast_all(kwargs, torch.float32))


def _set_dtype_policy(name: str, operator: Any, args: Any, kwargs: Any) -> Any:
    """Float32 out of 16 bits in, by the operator's own `dtype` argument: no cast copy is made."""
    if _state.target == "cpu":
        return _float32_policy(name, operator, args, kwargs)
    first = args[0]
    given = kwargs.get("dtype") is not None or any(isinstance(a, torch.dtype) for a in args[1:])
    if not given and first.dtype in (torch.float16, torch.bfloat16):
        kwargs = {**kwargs, "dtype": torch.float32}
        args = tuple(args[: _positional_before_dtype(operator)])
    return operator(*args, **kwargs)


def _positional_before_dtype(operator: Any) -> int:
    names = [argument.name for argument in operator._schema.arguments]
    return names.index("dtype") if "dtype" in names else len(names)


def _promote_policy(name: str, operator: Any, args: Any, kwargs: Any) -> Any:
    if name not in (_PROMOTE_CUDA if _state.target == "cuda" else _PROMOTE_CPU):
        return operator(*args, **kwargs)
    floats = [t.dtype for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _eligible(t)]
    widest = torch.float32 if torch.float32 in floats else _state.dtype
    return operator(*_cast_all(args, widest), **_cast_all(kwargs, widest))


def _eligible(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _cast_all(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return value
    if isinstance(value, torch.Tensor):
        return _cast(value, dtype)
    if isinstance(value, dict):
        return {key: _cast_all(item, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast_all(item, dtype) for item in value)
    return value


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not _eligible(tensor) or tensor.dtype == dtype or tensor.device.type != "meta":
        return tensor
    caches = dtype == _state.dtype and tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf
    if not caches or tensor._is_view():
        return tensor.to(dtype)
    kept = _state.casts.get(id(tensor))
    if kept is None:
        kept = _state.casts[id(tensor)] = (tensor, tensor.to(dtype))
    return kept[1]


def current_target() -> Target:
    return _state.target


@contextlib.contextmanager
def off() -> Iterator[None]:
    """As `torch.autocast(device, enabled=False)`, for meta tensors."""
    if not _state.depth:
        yield
        return
    _switch(False)
    before, _state.depth = _state.depth, 0
    try:
        yield
    finally:
        _state.depth = before
        _switch(True)
