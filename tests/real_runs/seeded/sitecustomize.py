"""Seeds torch before a trainer is there: trl 0.24 (not 1.16) and axolotl draw another adapter for each run.

A user's environment may have such a file too, and autotune's hook must let it run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import Any

_MODULES = {"trl.trainer.sft_trainer", "axolotl.loaders.adapter"}


class SeedsBeforeTrainer(MetaPathFinder):
    """Finds nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name in _MODULES:
            import torch

            torch.manual_seed(0)


sys.meta_path.insert(0, SeedsBeforeTrainer())
