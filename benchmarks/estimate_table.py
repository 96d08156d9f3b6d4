"""Every built-in model on every card of the catalogue as a page, `docs/estimates.md`: predicted, nothing was run.

`python -m benchmarks.estimate_table --output docs/estimates.md`
"""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import click

from autotune.cli.estimate_question import Question, start_of, with_headroom
from autotune.cli.estimate_run import fastest_for, with_its_attention
from autotune.hardware.cards import Card, cards
from autotune.predict.forecast import Forecast, target_of_card
from autotune.predict.store import TraceStore, library_versions
from autotune.probe.dry_run import DryRunner
from autotune.search.quickest import least
from autotune.values import GIB, AllocatorSetting, ModelSource
from autotune.workload.models import catalogue
from benchmarks.records import markdown_table, one_line_errors

TOKENS, EFFECTIVE_BATCH = 2048, 16
COLUMNS = 7  # models side by side

_INTRO = """# Every model on every card

What `autotune estimate` says of {tokens:,} tokens and an effective batch of {batch} samples, for each of the {models}
shapes among the {names} built-in models on each of the {cards} cards. **Predicted, nothing was run**, with
{versions}.
Written by `python -m benchmarks.estimate_table`.

A cell is tokens/s and the micro batch size that is fastest with what takes least memory: full gradient checkpointing
and the chunked loss (`autotune estimate` itself finds faster configs where there is room for them); `e` where only
expandable segments make it fit. A cell in brackets does not fit: the least memory in use, in GiB. NF4 with double
quantisation, LoRA rank 16 on all linear layers, SDPA attention (eager where the installed transformers has none: Gemma
2, gpt-oss), no float32 copies, `adamw_torch_fused`, float16 where a card has no bfloat16, 2 % of the card (at least
256 MiB) kept free. Speeds order cards and configs better than they hit the second: the interval is −20 % to +50 % of
step time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One shape and the built-in ids that have it."""

    source: ModelSource
    names: tuple[str, ...]


def shapes() -> list[Shape]:
    """Every shape once, in the catalogue's order."""
    named: dict[str, list[ModelSource]] = defaultdict(list)
    for entry in catalogue().values():
        source = ModelSource(name=entry.id, config=entry.config)
        named[source.fingerprint].append(source)
    return [Shape(source=same[0], names=tuple(one.name for one in same)) for same in named.values()]


def cells(shape: Shape, folder: Path) -> dict[str, str]:
    """Of each card, by name, what `estimate --gpu CARD --model MODEL` says, in a few characters."""
    runner = _runner(folder)
    return {card.name: cell(estimated(shape.source, card, runner)) for card in cards()}


@functools.cache
def _runner(folder: Path) -> DryRunner:
    """One for all models of this process: its workers import the training libraries once."""
    runner = DryRunner(TraceStore(folder))
    atexit.register(runner.close)
    return runner


def estimated(source: ModelSource, card: Card, runner: DryRunner) -> Forecast:
    """The search of `autotune estimate` among the configs that take least, without what was learned here of a card."""
    start = start_of(
        card,
        sequence_length=min(TOKENS, source.max_positions or TOKENS),
        effective_batch_size=EFFECTIVE_BATCH,
    )
    question = Question(model=source, config=start, given=False, target=with_headroom(target_of_card(card)))
    question = with_its_attention(question, runner)
    return fastest_for(question, runner, [least(question.config)])[0]


def cell(best: Forecast) -> str:
    """Tokens/s and how; in brackets the least GiB of a model that does not fit."""
    if best.fits is False:
        return f"({best.device_used_bytes / GIB:,.0f})"
    config = best.config
    mark = "e" if config.allocator is AllocatorSetting.EXPANDABLE_SEGMENTS else ""
    return f"{best.tokens_per_second:,.0f} {config.micro_batch_size}{mark}"


def page(found: Sequence[tuple[Shape, dict[str, str]]]) -> str:
    """The whole page, in Markdown."""
    names = sum(len(shape.names) for shape, _ in found)
    libraries = ", ".join(f"{name} {version}" for name, version in library_versions().items() if name != "trl")
    parts = [
        _INTRO.format(
            tokens=TOKENS,
            batch=EFFECTIVE_BATCH,
            models=len(found),
            names=names,
            cards=len(cards()),
            versions=libraries,
        )
    ]
    for at in range(0, len(found), COLUMNS):
        part = found[at : at + COLUMNS]
        rows = [[card.name, *(of[card.name] for _, of in part)] for card in cards()]
        head = ["card", *(short(shape.names[0]) for shape, _ in part)]
        parts += [f"## {short(part[0][0].names[0])} to {short(part[-1][0].names[0])}", markdown_table(head, rows)]
    same = [shape.names for shape, _ in found if len(shape.names) > 1]
    listed = "\n".join(f"- {names[0]}: {', '.join(names[1:])}" for names in same)
    return "\n\n".join([*parts, f"## Models of one shape\n\n{listed}"]) + "\n"


def short(name: str) -> str:
    """An id without its owner."""
    return name.split("/")[-1]


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The page to write.")
@click.option("--traces", type=click.Path(path_type=Path, file_okay=False), help="Folder that keeps traces for later.")
@click.option("--processes", type=click.IntRange(1, 64), default=2, show_default=True)
def main(output: Path, traces: Path | None, processes: int) -> None:
    """Minutes for each model: half an hour on two cores in all."""
    todo = shapes()
    found: dict[str, dict[str, str]] = {}
    with one_line_errors(), tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes) as pool:
        made = {pool.submit(cells, shape, traces or Path(folder)): shape for shape in todo}
        for done in as_completed(made):
            found[made[done].source.fingerprint] = done.result()
            click.echo(f"{len(found)}/{len(todo)} {made[done].source.name}", err=True)
    output.write_text(page([(shape, found[shape.source.fingerprint]) for shape in todo]), encoding="utf-8")
    click.echo(f"written: {output}", err=True)


if __name__ == "__main__":
    main()
