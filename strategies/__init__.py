"""One memory-saving move a file: when it applies, what it changes, what it preserves; `LADDER` orders them.

A move proposes; what it saves and costs here is for predictions and probes to say. A new move is a new file and a line.
"""

from __future__ import annotations

from autotune.values import TrainingConfig
from strategies.allocator import ExpandableSegments
from strategies.attention import AttentionKernel
from strategies.double_quantization import DoubleQuantization
from strategies.fewer_modules import FewerModules
from strategies.fp32_copies import NoFp32Copies
from strategies.full_checkpointing import FullCheckpointing
from strategies.loss import FusedOrChunkedLoss
from strategies.lower_rank import LowerRank
from strategies.micro_batch import SmallerMicroBatch
from strategies.move import MemoryMove
from strategies.offloaded_checkpointing import OffloadedCheckpointing
from strategies.optimizer_8bit import Optimizer8bit
from strategies.paged_optimizer import PagedOptimizer
from strategies.partial_checkpointing import PartialCheckpointing
from strategies.shorter_sequence import ShorterSequence

#: Quality-preserving first, cheapest first among them; what needs consent last.
LADDER: tuple[MemoryMove, ...] = (
    ExpandableSegments(),
    FusedOrChunkedLoss(),
    AttentionKernel(),
    NoFp32Copies(),
    SmallerMicroBatch(),
    PartialCheckpointing(),
    FullCheckpointing(),
    OffloadedCheckpointing(),
    Optimizer8bit(),
    PagedOptimizer(),
    DoubleQuantization(),
    ShorterSequence(),
    LowerRank(),
    FewerModules(),
)


def moves_between(before: TrainingConfig, after: TrainingConfig) -> tuple[str, ...]:
    """Names of the moves that explain how `after` differs from `before`, in the ladder's order.

    A difference in the other direction (a larger micro batch, checkpointing switched off) is no move.
    """
    return tuple(move.name for move in LADDER if move.explains(before, after))


__all__ = ["LADDER", "MemoryMove", "moves_between"]
