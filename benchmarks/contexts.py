"""CUDA contexts in published out-of-memory messages beside what is taken for their cards: the fit's evidence.

`python -m benchmarks.contexts`

A message of torch 2.1 or later says what its process held of the card, what of that
was allocated by PyTorch and what reserved and not allocated; the rest is the context and its modules, to ±15 MiB for
sizes of a GiB. Gathered were messages whose card is named, or follows from its capacity, and whose process is the one
that died. Not in the table: 13 that give 1.0 to 12.8 GiB, of runs over several GPUs, of vLLM and of convolution plans.

*unseen* is what the rule, a fixed part and so much for each resident thread, says of a card when it is fitted without
it and without the cards of as many threads: the rule's error on a card that nobody has measured.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from autotune.hardware.cards import Card, cards
from autotune.predict.context import SPREAD, context_of, resident_threads
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


def unseen_bytes(card: Card, published: Mapping[Card, Sequence[int]]) -> float:
    """The card's context, by the rule fitted to the medians of the published cards with other numbers of threads."""
    threads = resident_threads(card)
    if threads is None:
        raise ValueError(f"{card.name}: its resident threads are not known")
    seen = [(resident_threads(other) or 0, statistics.median(values)) for other, values in published.items()]
    seen = [(of, size) for of, size in seen if of not in (0, threads)]
    rule = statistics.linear_regression([of for of, _ in seen], [size for _, size in seen])
    return rule.intercept + rule.slope * threads


def unseen_text(published: Mapping[Card, Sequence[int]]) -> str:
    """How far the rule is from cards that it was not fitted to."""
    unseen = {card: unseen_bytes(card, published) for card in published}
    ratios = {card.name: statistics.median(published[card]) / size for card, size in unseen.items()}
    low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    messages = [value / size for card, size in unseen.items() for value in published[card]]
    inside = sum(SPREAD[0] <= ratio <= SPREAD[1] for ratio in messages)
    return (
        f"Medians of cards that the rule has not seen are {ratios[low]:.2f} ({low})\nto {ratios[high]:.2f} ({high})"
        f" times what it says, {statistics.median(abs(r - 1) for r in ratios.values()):.0%} off in the median;"
        f" {inside} of {len(messages)} messages lie inside {SPREAD[0]:g} to {SPREAD[1]:g}."
    )


@click.command(help=__doc__)
def main() -> None:
    rows: list[tuple[str, ...]] = [
        ("card", "sm", "SMs", "messages", "low", "median", "high", "taken", "÷ taken", "unseen", "÷ unseen")
    ]
    published = read_contexts(MESSAGES)
    for card, values in published.items():
        taken, unseen, usual = context_of(card).likely_bytes, unseen_bytes(card, published), statistics.median(values)
        sizes = [f"{size / MIB:.0f}" for size in (values[0], usual, values[-1], taken)]
        rows.append((card.name, card.compute_capability or "", str(card.sm_count), str(len(values)), *sizes,
                     f"{usual / taken:.2f}", f"{unseen / MIB:.0f}", f"{usual / unseen:.2f}"))  # fmt: skip
    click.echo(f"{plain_table(rows)}\n\nMiB; ÷: the median, divided by.\n{unseen_text(published)}")


if __name__ == "__main__":
    main()
