"""CUDA contexts in published out-of-memory messages beside what is taken for their cards: the fit's evidence.

`python -m benchmarks.contexts`

A message of torch 2.1 or later says what its process held of the card, what of that
was allocated by PyTorch and what reserved and not allocated; the rest is the context and its modules, to ±15 MiB for
sizes of a GiB. Gathered were messages whose card is named, or follows from its capacity, and whose process is the one
that died. Not in the table: 13 that give 1.0 to 12.8 GiB, of runs over several GPUs, of vLLM and of convolution plans.
"""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import click

from autotune.hardware.cards import Card, cards
from autotune.predict.context import context_of
from autotune.values import MIB
from autotune.verdict.numbers import parse_bytes
from benchmarks.records import plain_table

MESSAGES = Path(__file__).parent / "data" / "contexts.csv"


def read_contexts(path: Path) -> dict[Card, list[int]]:
    """Card → bytes of its contexts, smallest first."""
    named = {card.name: card for card in cards()}
    found: dict[Card, list[int]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            process, allocated, rest = (parse_bytes(*row[n].split()) for n in ("process", "allocated", "unallocated"))
            found.setdefault(named[row["card"]], []).append(process - allocated - rest)
    return {card: sorted(values) for card, values in found.items()}


@click.command(help=__doc__)
def main() -> None:
    rows: list[tuple[str, ...]] = [
        ("card", "sm", "SMs", "messages", "low", "median", "high", "taken", "median ÷ taken")
    ]
    for card, values in read_contexts(MESSAGES).items():
        taken, usual = context_of(card).likely_bytes, statistics.median(values)
        sizes = [f"{size / MIB:.0f}" for size in (values[0], usual, values[-1], taken)]
        rows.append((card.name, card.compute_capability or "", str(card.sm_count), str(len(values)), *sizes,
                     f"{usual / taken:.2f}"))  # fmt: skip
    click.echo(plain_table(rows))


if __name__ == "__main__":
    main()
