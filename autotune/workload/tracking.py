"""Live tensor bytes, seen as tensors are born and die: the CPU has no `max_memory_allocated` of its own."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDING = 512  # bytes; as the CUDA caching allocator rounds (c10/cuda/CUDACachingAllocator.cpp kMinBlockSize)


class LiveBytes(TorchDispatchMode):
    """While entered, follows every storage that an operator returns until it is released.

    `live_bytes` and `peak_bytes` are rounded up to 512 B a storage. What lived before is told with `see`. With a
    `device_type` ("cpu", "meta") storages elsewhere do not count.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._device_type = device_type
        self._alive: set[int] = set()

    def see(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before this was entered."""
        for tensor in tensors:
            self._see(tensor)

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or self._device_type not in (None, tensor.device.type):
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self._alive.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._released, key, size).atexit = False

    def _released(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live_bytes -= size


def model_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Every tensor that a model holds: parameters, buffers, gradients and the parts of 4-bit quantisation states."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor)]
            state = state.state2
    return tensors
