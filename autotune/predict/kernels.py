"""Which kernels a device would run, where that decides memory: facts of the target that a trace depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autotune.hardware.cards import AttentionKernels, cards
from autotune.values import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSet:
    """What decides which operators run on a device, and what they allocate. Two cards with one set share traces."""

    kind: Literal["cuda", "cpu"] = "cuda"  # cuda: ROCm and XPU too, whose PyTorch runs the same operators
    sdpa_flash: bool = True  # torch's built-in FlashAttention: 16-bit, no mask, heads of at most 256
    sdpa_efficient: bool = True  # torch's memory-efficient attention
    grouped_mm: bool = True  # experts in one product (sm80 and later); else transformers' loop over them
    cublas_workspace_bytes: int = 8_519_680  # per handle: 2 × 4 MiB + 8 × 16 KiB; 32 MiB on sm90 and sm100


CPU = KernelSet(kind="cpu", sdpa_flash=False, sdpa_efficient=False, cublas_workspace_bytes=0)


def kernels_of(vendor: str, capability: str | None, attention: AttentionKernels | None = None) -> KernelSet:
    """Of a GPU of this compute capability or AMD target (None: unknown, a recent one is assumed).

    `attention`: what the catalogue says of the card; None: of another card of the same target, or else NVIDIA's
    kernels as its compute capability says, and none on others. cuBLAS keeps 32 MiB a handle on sm90 and sm100 and
    8.125 MiB elsewhere (CUDABlas.cpp); hipBLAS is taken alike.
    """
    if attention is None and capability is not None:
        alike = (card for card in cards() if (card.vendor, card.compute_capability) == (vendor, capability))
        attention = next((card.attention for card in alike), None)
    is_nvidia = vendor == "nvidia"
    is_recent = is_nvidia and float(capability or "8.0") >= 8
    large = capability in ("9.0", "10.0", "10.3")
    return KernelSet(
        sdpa_flash=attention.sdpa_flash if attention else is_recent,
        sdpa_efficient=attention.sdpa_efficient if attention else is_nvidia,
        grouped_mm=is_recent or not is_nvidia,
        cublas_workspace_bytes=32 * MIB if large else KernelSet().cublas_workspace_bytes,
    )
