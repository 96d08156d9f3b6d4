"""Follows every storage of a dry run from birth to death, in order, with its operator, part, FLOPs and bytes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from autotune.predict.kernels import KernelSet

Label = tuple[str, int | None]  # a stretch of the step: its name, and the layer or chunk it belongs to


@dataclass(slots=True)
class Birth:
    storage: int
    size_bytes: int
    operator: str
    part: str


@dataclass(slots=True)
class Death:
    storage: int


@dataclass(slots=True)
class Work:
    """One kernel."""

    kind: str  # matmul | flash | efficient | masked (attention by kernel) | dequantise | transfer | memory
    dtype: str
    flops: int
    moved_bytes: tuple[int, ...]  # of every tensor that is read or written


@dataclass(slots=True)
class Stretch:
    label: Label
    events: list[Birth | Death | Work] = field(default_factory=list)


class Tracer(TorchDispatchMode):
    """While entered, writes births, deaths and work into `stretches`, the last of which is the current one.

    Storages known before (`see`) are outside of the count: they are neither born nor do they die here.
    """

    def __init__(self, kernels: KernelSet, *, vocab_size: int, hidden_temporaries: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stretches: list[Stretch] = []
        self._kernels = kernels
        self._vocab_size = vocab_size
        self._hidden = hidden_temporaries
        self._alive: dict[int, int] = {}  # storage's address → number given here
        self._outside: set[int] = set()
        self._births = 0
        self._open = True

    def see(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._outside:  # an address may be given out again once its storage is dead
                self._outside.add(key)
                weakref.finalize(storage, self._outside.discard, key).atexit = False

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._open = False

    def start(self, label: Label) -> None:
        self.stretches.append(Stretch(label))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return _answer(args[0])
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        temporary = self._temporary_bytes(func, args, kwargs) if self._hidden else 0
        before_output = func.name().startswith("bitsandbytes::")  # torch's kernels have their output made beforehand
        if temporary and before_output:
            number = self._begin_temporary(func, temporary)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in outputs:
            self._see_output(func, tensor)
        if temporary:
            self._log(Death(number if before_output else self._begin_temporary(func, temporary)))
        if not _is_view(func):
            self._log(_work(func, args, kwargs, result, inputs, outputs))
        return result

    def _begin_temporary(self, func: Any, size_bytes: int) -> int:
        self._births += 1
        self._log(Birth(self._births, size_bytes, str(func), _temporary_part(func)))
        return self._births

    def _log(self, event: Birth | Death | Work) -> None:
        self.stretches[-1].events.append(event)

    def _see_output(self, func: Any, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._outside:
            return
        self._births += 1
        self._alive[key] = self._births
        self._log(Birth(self._births, storage.nbytes(), str(func), self._part(func, tensor)))
        weakref.finalize(storage, self._died, key).atexit = False

    def _died(self, key: int) -> None:
        number = self._alive.pop(key)
        if self._open:
            self._log(Death(number))

    def _part(self, func: Any, tensor: torch.Tensor) -> str:
        name = func.name()
        if "dequantize" in name:
            return "dequantised weights"
        if tensor.ndim and tensor.shape[-1] == self._vocab_size:
            return "logits and loss"
        if "attention" in name or _is_square(tensor):
            return "attention"
        if name.startswith("aten::_to_copy"):
            return "casts"
        return ""  # by its stretch: see `distill`

    def _temporary_bytes(self, func: Any, args: Any, kwargs: Any) -> int:
        """What the device's kernel allocates for its own duration, which no tensor shows."""
        name = func.name()
        if name == "bitsandbytes::gemm_4bit":
            return _gemm_4bit_temporary(args, kwargs)
        if self._kernels.kind != "cuda":
            return 0
        if name in ("aten::_scaled_dot_product_flash_attention_backward", "aten::_flash_attention_backward"):
            heads_first = name.startswith("aten::_scaled")
            return _flash_backward_temporary(args[1], args[2], heads_first)
        if name == "aten::_softmax_backward_data":
            return int(args[0].numel() * args[0].element_size())  # gradient × output (SoftMax.cu)
        if name == "aten::_scaled_dot_product_efficient_attention_backward":
            query = args[1]  # (B, H, T, D): float32 sums of the queries' gradient, and one float32 a row
            return int(query.numel() * 4 + query.numel() // query.size(-1) * 4)
        return 0


def _answer(tensor: torch.Tensor) -> Any:
    """What a question about data is answered where there is none: masks are full, nothing is packed."""
    return True if tensor.dtype == torch.bool else 1


def _is_square(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.shape[-1] == tensor.shape[-2] and tensor.shape[-1] > 1


def _temporary_part(func: Any) -> str:
    return "dequantised weights" if "4bit" in func.name() else "attention"


def _gemm_4bit_temporary(args: Any, kwargs: Any) -> int:
    """bitsandbytes 0.50: above a few hundred tokens the product is made with the dequantised weight, in the input's
    dtype, after its scales became float32 (backends/cuda/ops.py)."""
    rows, columns = args[2]
    weight = rows * columns * args[0].element_size()
    nested = kwargs.get("absmax_8bit") is not None
    return int(weight + (rows * columns // args[4] * 4 if nested else 0))


def _flash_backward_temporary(query: torch.Tensor, key: torch.Tensor, heads_first: bool) -> int:
    """FlashAttention 2's backward (flash_api.cpp mha_bwd): float32 sums of dq with rows rounded up to 128 and heads to
    32, a float32 row sum, and with grouped heads dk and dv of every query head."""
    batch, heads, rows = (query.size(0), *((1, 2) if heads_first else (2, 1)))
    heads, rows = query.size(heads), query.size(rows)
    width, rounded = query.size(-1), -(-rows // 128) * 128
    total = batch * heads * rounded * (-(-width // 32) * 32 * 4 + 4)
    if key.size(1 if heads_first else 2) != heads:
        total += 2 * batch * heads * rows * width * query.element_size()
    return int(total)


#: Operator → (where its query is, FLOPs for each element of the query and key row): two products, five backward.
_FLASH_FLOPS = {"aten::_flash_attention_forward": (0, 4), "aten::_flash_attention_backward": (1, 10)}
_VIEWS: dict[Any, bool] = {}


def _is_view(func: Any) -> bool:
    if func not in _VIEWS:
        returns = func._schema.returns
        _VIEWS[func] = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return _VIEWS[func]


def _work(func: Any, args: Any, kwargs: Any, result: Any, inputs: list[Any], outputs: list[Any]) -> Work:
    name = func.name()
    flops = 0
    kind = "memory"
    if name in _FLASH_FLOPS:  # (B, T, H, D), which torch's formula takes for (B, H, T, D)
        kind = "flash"
        query = args[_FLASH_FLOPS[name][0]]
        flops = _FLASH_FLOPS[name][1] * query.numel() * query.size(1)
    elif func._overloadpacket in flop_registry:
        kind = _attention_kind(name, args) if "attention" in name else "matmul"
        flops = int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))
    elif name == "bitsandbytes::gemm_4bit":
        kind = "matmul"
        flops = 2 * args[0].numel() * args[2][0]
    elif "dequantize" in name:
        kind = "dequantise"
    elif name.startswith("autotune_host::"):
        kind = "transfer"
    elif "grouped_mm" in name:  # rows (S, K) first, and what they are multiplied by second
        kind = "matmul"
        products = 2 if name.endswith("_backward") else 1  # the loop's backward makes the weights' gradients too
        flops = 2 * products * args[0].numel() * args[1].size(-1)
    moved = tuple(_bytes(tensor) for tensor in (*inputs, *outputs))
    dtype = next((t.dtype for t in inputs if t.is_floating_point()), outputs[0].dtype if outputs else None)
    return Work(kind, str(dtype).removeprefix("torch."), flops, moved)


def _attention_kind(name: str, args: Any) -> str:
    """The kernel; with a mask (`attn_bias`) the efficient one skips nothing of what a causal one would."""
    if "efficient" not in name:
        return "flash"
    return "efficient" if args[4 if name.endswith("_backward") else 3] is None else "masked"


def _bytes(tensor: torch.Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
