"""Which kernels a device would run, where that decides memory: facts of the target that a trace depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSet:
    """What decides which operators run on a device, and what they allocate. Two cards with one set share traces."""

    kind: Literal["cuda", "cpu"] = "cuda"  # cuda: ROCm and XPU too, whose PyTorch runs the same operators
    sdpa_flash: bool = True  # torch's built-in FlashAttention: 16-bit, no mask, heads of at most 256
    sdpa_efficient: bool = True  # torch's memory-efficient attention
    grouped_mm: bool = True  # experts in one product (sm80 and later); else transformers' loop over them
    cublas_workspace_bytes: int = 8_519_680  # per handle: 2 × 4 MiB + 8 × 16 KiB; 32 MiB on sm90 and sm100

    @property
    def slug(self) -> str:
        """Names the set in a file name."""
        if self.kind == "cpu":
            return "cpu"
        kernels = (("f", self.sdpa_flash), ("e", self.sdpa_efficient), ("g", self.grouped_mm))
        return "cuda-" + "".join(letter for letter, runs in kernels if runs)


CPU = KernelSet(kind="cpu", sdpa_flash=False, sdpa_efficient=False, cublas_workspace_bytes=0)
