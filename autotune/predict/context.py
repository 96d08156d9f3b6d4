"""What a CUDA or HIP context and its loaded modules take on a card, before anything was measured on it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from autotune.hardware.cards import Card, cards
from autotune.values import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a CUDA or HIP context and its loaded modules take: (low, likely, high) bytes and where that is from."""

    low_bytes: int
    likely_bytes: int
    high_bytes: int
    source: str


#: Threads that a multiprocessor holds at once (CUDA C++ Programming Guide, specifications per compute capability).
_RESIDENT_THREADS = {
    **dict.fromkeys(("6.0", "6.1", "7.0", "8.0", "9.0", "10.0", "10.3"), 2048),
    **dict.fromkeys(("8.6", "8.9", "12.0", "12.1"), 1536),
    "7.5": 1024,
}
#: A context holds local memory for every thread that the card can hold at once (an NVIDIA engineer, developer forum,
#: "Local memory management", 289339), and modules: a fixed part. Both are fitted to 49 out-of-memory messages from
#: 17 cards, sm70 to sm120, torch 2.1 to 2.8 and later, in benchmarks/data/contexts.csv: memory of the process less
#: what PyTorch had reserved, ±15 MiB. Of a card that the fit has not seen, nor another with as many threads, the
#: median lies 16 % below (RTX 6000 Ada) to 14 % above (RTX 3090), within 3 % in the median of the 17; 47
#: messages lie within `SPREAD`, one of a T4 below and one of a RTX 3090 above: `python -m benchmarks.contexts`.
_FIXED_BYTES = 60 * MIB
_BYTES_PER_THREAD = 2150  # 2.1 MiB for 1,024 threads
SPREAD = (0.75, 1.35)

#: Measured, where better than fitted; AMD by target, NVIDIA by name.
_MEASURED: dict[str, Context] = {
    "Tesla T4": Context(
        low_bytes=100 * MIB,
        likely_bytes=147_718_144,
        high_bytes=300 * MIB,
        source="measured on a T4, torch 2.10-2.14: 140.875 MiB after the first kernels (fitcheck-llm 0.3.1's data);"
        " 100 to 164 MiB in 4 out-of-memory messages",
    ),
    "NVIDIA RTX 6000 Ada Generation": Context(
        low_bytes=380 * MIB,
        likely_bytes=426 * MIB,
        high_bytes=560 * MIB,
        source="measured on an RTX 6000 Ada: 426 MiB, torch 2.10 cu130; 429 MiB in an out-of-memory message",
    ),
    "gfx942": Context(
        low_bytes=250 * MIB,
        likely_bytes=460 * MIB,
        high_bytes=700 * MIB,
        source="460 MiB of an MI300X in use that PyTorch had not reserved, in 1 out-of-memory message; HIP names no"
        " process, so others' memory is in it",
    ),
    "gfx1100": Context(
        low_bytes=150 * MIB,
        likely_bytes=304 * MIB,
        high_bytes=700 * MIB,
        source="304 MiB of an RX 7900 XTX in use that PyTorch had not reserved, in 1 out-of-memory message; HIP names"
        " no process, so others' memory is in it",
    ),
}
_USUAL = Context(
    low_bytes=250 * MIB,
    likely_bytes=450 * MIB,
    high_bytes=700 * MIB,
    source="usual of lazily loaded modules: 300-500 MiB on data-centre cards; not measured for this architecture",
)


def resident_threads(card: Card) -> int | None:
    """Threads that the card can hold at once; None where its architecture's limit is not known here."""
    threads = _RESIDENT_THREADS.get(card.compute_capability or "")
    return threads and threads * card.sm_count


def context_of(card: Card) -> Context:
    """Measured on such a card, or as its resident threads say, or the usual."""
    capability = card.compute_capability or ""
    known = _MEASURED.get(card.name) or _MEASURED.get(capability)
    if known:
        return known
    threads = resident_threads(card)
    if threads is None:
        return _USUAL
    likely = _FIXED_BYTES + _BYTES_PER_THREAD * threads
    return Context(
        low_bytes=round(likely * SPREAD[0]),
        likely_bytes=likely,
        high_bytes=round(likely * SPREAD[1]),
        source=f"fitted to out-of-memory messages of 17 cards: 60 MiB and 2.1 KiB for each of"
        f" {threads:,} resident threads",
    )


def context_of_capability(capability: str | None) -> Context:
    """Of a GPU that the catalogue does not have: as its cards of that compute capability, or AMD target, or the usual.

    It may be far smaller than they are, as a MIG slice is: its low end is what a context takes on any card.
    """
    alike = [context_of(card) for card in cards() if capability is not None and card.compute_capability == capability]
    if not alike:
        return _USUAL
    return Context(
        low_bytes=round(_FIXED_BYTES * SPREAD[0]),
        likely_bytes=round(statistics.median(context.likely_bytes for context in alike)),
        high_bytes=max(context.high_bytes for context in alike),
        source=f"not in the catalogue: as its {len(alike)} cards of {capability}",
    )
