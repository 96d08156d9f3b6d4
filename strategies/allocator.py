"""Let the caching allocator grow its segments, so that memory is not lost between them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from autotune.values import AllocatorSetting, Device, FitRequest, Preserves, TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandableSegments:
    """Needs CUDA's virtual memory calls: torch ignores the setting on Windows, and vGPU and WSL2 may refuse it."""

    name: str = "expandable_segments"
    preserves: Preserves = Preserves.EXACT
    why: str = "saves memory lost to fragmentation, most where batches differ in length; costs nothing measurable"
    platform: str = sys.platform

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        possible = device.kind in ("cuda", "rocm") and not device.wsl and not device.virtual
        if self.platform == "win32" or not possible or config.allocator is AllocatorSetting.EXPANDABLE_SEGMENTS:
            return None
        return replace(config, allocator=AllocatorSetting.EXPANDABLE_SEGMENTS)

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        return before.allocator != after.allocator and after.allocator is AllocatorSetting.EXPANDABLE_SEGMENTS
