"""The catalogue of cards as a page, `docs/cards.md`, with where each number is from.

`python -m benchmarks.card_table > docs/cards.md`
"""

from __future__ import annotations

from collections.abc import Sequence

from autotune.hardware.cards import AttentionKernels, Card, cards
from autotune.values import GIB
from benchmarks.records import markdown_table

_INTRO = """# Cards

{count} GPU cards that `autotune estimate --gpu NAME` knows, whether they are here or not. Written by
`python -m benchmarks.card_table` from `autotune/hardware/cards.json`; a test holds the two together.

Memory is what a program sees as total on Linux under a recent driver ({measured} read from a public log or message
of the card itself; ≈ marks the {derived} derived from others). A driver keeps some for itself, newer ones more, so a
number can be 1 % too high; on Windows it is the sold size less a few MiB. Rates are dense TFLOPS of a matrix product
that accumulates in float32, at the boost clock; on a dash there are no units for it. Kernels run forward and backward
in 16 bits with torch's defaults; SDPA's math kernel runs everywhere. bnb: bitsandbytes."""
_NUMBERS = (
    *("card", "memory GiB", "sold as", "GB/s", "float16", "bfloat16", "TF32", "float32", "architecture", "target"),
    *("SDPA kernels", "FlashAttention 2", "bnb"),
)
_ORIGINS = ("card", "memory", "rates", "kernels", "rest")
_KERNELS = ("attention", "bitsandbytes", "dtypes")


def card_table() -> str:
    """The whole page, in Markdown."""
    catalogue = cards()
    notes: dict[str, int] = {}
    origins = [_origin_row(card, notes) for card in catalogue]
    measured = sum(card.memory_is_measured for card in catalogue)
    intro = _INTRO.format(count=len(catalogue), measured=measured, derived=len(catalogue) - measured)
    listed = "\n".join(f"{number}. {text}" for text, number in notes.items())
    parts = (
        intro,
        markdown_table(_NUMBERS, [_number_row(card) for card in catalogue]),
        "## Where the numbers are from\n\nNumbers in brackets are the notes below.",
        markdown_table(_ORIGINS, origins),
        f"## Notes\n\n{listed}",
    )
    return "\n\n".join(parts) + "\n"


def _number_row(card: Card) -> list[str]:
    return [
        card.name,
        f"{'' if card.memory_is_measured else '≈ '}{card.memory_bytes / GIB:.2f}",
        f"{card.memory_nominal_gib} GB",
        f"{card.bandwidth_bytes_per_s / 1e9:,.0f}",
        _tera(card.fp16_flops_per_s),
        _tera(card.bf16_flops_per_s),
        _tera(card.tf32_flops_per_s),
        _tera(card.fp32_flops_per_s),
        card.architecture,
        card.compute_capability or "–",
        _sdpa(card.attention),
        "yes" if card.attention.flash_attention_2 else "no",
        "yes" if card.bitsandbytes else "no",
    ]


def _tera(rate: float | None) -> str:
    return "–" if rate is None else f"{rate / 1e12:,.1f}"


def _sdpa(kernels: AttentionKernels) -> str:
    fused = (
        ("cuDNN", kernels.sdpa_cudnn_first),
        ("flash", kernels.sdpa_flash),
        ("efficient", kernels.sdpa_efficient),
    )
    return ", ".join(name for name, runs in fused if runs) or "math"


def _origin_row(card: Card, notes: dict[str, int]) -> list[str]:
    """Its memory's source in full, of the others the numbers of their notes."""
    rates = [key for key in card.sources if key.endswith("_flops_per_s")]
    rest = [key for key in card.sources if key not in ("memory_bytes", *rates, *_KERNELS)]
    columns = ([card.sources[key] for key in keys] for keys in (rates, _KERNELS, rest))
    return [card.name, card.sources["memory_bytes"], *(_numbered(texts, notes) for texts in columns)]


def _numbered(texts: Sequence[str], notes: dict[str, int]) -> str:
    numbers = {notes.setdefault(text, len(notes) + 1) for text in texts}
    return " ".join(f"[{number}]" for number in sorted(numbers))


if __name__ == "__main__":
    print(card_table(), end="")
