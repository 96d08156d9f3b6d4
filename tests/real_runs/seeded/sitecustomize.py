"""Seeds torch before trl is there: trl 0.24 draws a new adapter each time (1.16 does not), and no run equals another.

A user's environment may have such a file too, and autotune's hook must let it run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import Any


class SeedsBeforeTrl(MetaPathFinder):
    """Finds nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name == "trl.trainer.sft_trainer":
            sys.meta_path.remove(self)
            import torch

            torch.manual_seed(0)


sys.meta_path.insert(0, SeedsBeforeTrl())
