"""Predicted speed beside published tokens/s: does the prediction order the settings of one card and model?

`python -m benchmarks.speed_rank`
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from autotune.hardware.cards import find_card
from autotune.predict.steptime import INTERVAL, forecast_time
from autotune.predict.store import TraceStore
from autotune.values import TrainingConfig
from benchmarks.memory_accuracy import PUBLISHED, Case, LeftOut, case_of, read_published, trace_of
from benchmarks.records import one_line_errors, plain_table

SMALLEST_GROUP = 5  # rows
BAR = 0.8  # Spearman's coefficient

_CARDS = {"Tesla T4": "T4", "1x A100-80GB": "A100 SXM 80GB"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One config of a card and model in tokens/s. `published`: the mean of `rows` rows."""

    card: str
    model: str
    label: str
    published: float
    predicted: float
    rows: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The configs of one card and model. `spearman` is None below `SMALLEST_GROUP` and where all are equal."""

    card: str
    model: str
    speeds: tuple[Speed, ...]
    spearman: float | None

    @property
    def has_bar(self) -> bool:
        return len(self.speeds) >= SMALLEST_GROUP

    @property
    def passed(self) -> bool:
        return not self.has_bar or (self.spearman is not None and self.spearman >= BAR)


# Ranks


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the least; equal values share the mean of their ranks."""
    order = sorted(values)
    first = {value: order.index(value) for value in set(values)}
    return [first[value] + (order.count(value) + 1) / 2 for value in values]


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where either side is all equal or shorter than two."""
    try:
        found = statistics.correlation(ranks(one), ranks(other))
    except statistics.StatisticsError:
        return None
    return None if math.isnan(found) else found


def groups(speeds: Iterable[Speed]) -> list[Group]:
    """By card and model, in order of appearance."""
    held: dict[tuple[str, str], list[Speed]] = {}
    for speed in speeds:
        held.setdefault((speed.card, speed.model), []).append(speed)
    return [
        Group(
            card=card,
            model=model,
            speeds=tuple(found),
            spearman=spearman([s.predicted for s in found], [s.published for s in found])
            if len(found) >= SMALLEST_GROUP
            else None,
        )
        for (card, model), found in held.items()
    ]


# Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A case with the speeds that were published of it."""

    card: str  # as the catalogue names it
    case: Case
    tokens_per_s: tuple[float, ...]


def timed_rows(rows: Iterable[dict[str, str]]) -> tuple[list[Timed], list[LeftOut]]:
    """Rows with a speed; those of one config are one. The others that have a speed, with the reason."""
    found: dict[tuple[str, str, TrainingConfig], tuple[Case, list[float]]] = {}
    left: list[LeftOut] = []
    for row in rows:
        if not row["tokens_per_s"]:
            continue
        case = case_of(row)
        if isinstance(case, LeftOut):
            left.append(case)
        elif row["gpu"] not in _CARDS:
            left.append(LeftOut(source=case.source, label=case.label, reason=f"which card is {row['gpu']}?"))
        elif "Mixtral" in case.model:
            why = "the installed transformers leaves its experts in 16 bits: another program than was timed"
            left.append(LeftOut(source=case.source, label=case.label, reason=why))
        else:
            card = find_card(_CARDS[row["gpu"]]).card.name
            kept = found.setdefault((card, case.model, case.config), (case, []))
            kept[1].append(float(row["tokens_per_s"]))
    timed = [Timed(card=card, case=case, tokens_per_s=tuple(speeds)) for (card, _, _), (case, speeds) in found.items()]
    return timed, left


def predict(timed: Timed, store: TraceStore) -> Speed:
    """Both speeds of a config, from a trace in the store or a new one."""
    case = timed.case
    forecast = forecast_time(trace_of(case, store), case.config, find_card(timed.card).card)
    upcast = f"upcast={case.config.upcast.value}"
    return Speed(
        card=timed.card,
        model=case.model,
        label=f"{case.config.quantization.value} {upcast} {case.label.split(' ', 3)[-1]}",
        published=statistics.fmean(timed.tokens_per_s),
        predicted=case.config.tokens_per_step / forecast.step_time_s,
        rows=len(timed.tokens_per_s),
    )


# Report


def report(found: Sequence[Group], left: Sequence[LeftOut]) -> str:
    """Every group's table and coefficient, the spread of all rows, and what was left out."""
    parts = [_group_text(group) for group in found]
    times = [speed.predicted / speed.published for group in found for speed in group.speeds]
    if times:
        inside = sum(INTERVAL[0] <= ratio <= INTERVAL[1] for ratio in times)
        parts.append(
            f"Published step time is {min(times):.2f} to {max(times):.2f} times the predicted, median"
            f" {statistics.median(times):.2f}; {inside} of {len(times)} inside {INTERVAL[0]:g} to {INTERVAL[1]:g}."
        )
    reasons = [f"left out: {out.label}: {out.reason}" for out in left]
    return "\n\n".join([*parts, *(["\n".join(reasons)] if reasons else [])]) + "\n"


def _group_text(group: Group) -> str:
    rows = [("config", "rows", "published", "predicted", "predicted/published")]
    rows += [
        (s.label, str(s.rows), f"{s.published:,.0f}", f"{s.predicted:,.0f}", f"{s.predicted / s.published:.2f}")
        for s in sorted(group.speeds, key=lambda s: s.published)
    ]
    if not group.has_bar:
        verdict = f"{len(group.speeds)} configs: fewer than {SMALLEST_GROUP}, no bar"
    elif group.spearman is None:
        verdict = "Spearman undefined: all equal: FAILED"
    else:
        verdict = f"Spearman {group.spearman:.3f}, bar {BAR}: {'passed' if group.passed else 'FAILED'}"
    return f"{group.card}, {group.model}: tokens/s\n{plain_table(rows)}\n{verdict}"


@click.command(help=__doc__)
@click.option(
    "--published", type=click.Path(path_type=Path), default=PUBLISHED, help="Table of measurements (CSV); its [A] rows."
)
@click.option("--traces", type=click.Path(path_type=Path, file_okay=False), help="Folder that keeps traces for later.")
def main(published: Path, traces: Path | None) -> None:
    """Exit 1 if a group is under the bar, or none has one."""
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        timed, left = timed_rows(read_published(published))
        store = TraceStore(traces or Path(folder))
        speeds = []
        for number, one in enumerate(timed, 1):
            click.echo(f"{number}/{len(timed)} {one.case.label}", err=True)
            speeds.append(predict(one, store))
    found = groups(speeds)
    click.echo(report(found, left), nl=False)
    sys.exit(0 if any(group.has_bar for group in found) and all(group.passed for group in found) else 1)


if __name__ == "__main__":
    main()
