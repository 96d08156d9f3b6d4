"""What every move of the ladder has: the seam `Strategy`, why it is worth it, and whether it explains a difference."""

from __future__ import annotations

from typing import Protocol

from autotune.protocols import Strategy
from autotune.values import TrainingConfig


class MemoryMove(Strategy, Protocol):
    """A strategy that can say what it does and recognise its own work."""

    @property
    def why(self) -> str:
        """What it saves and what it costs, in one line."""
        ...

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        """Whether `after` differs from `before` by this move (others may have been taken too)."""
        ...
