"""Results of `benchmarks.search` as numbers, bars, Markdown and a plot."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from autotune.values import TrainingConfig
from benchmarks.records import markdown_table
from benchmarks.searchers import LABELS, OURS, Result

NEAR = 0.03  # regret within which a baseline counts as having found it

REGRET = (0.005, 0.03)  # median, worst
PROBES = (5, 10)
OUT_OF_MEMORY = 0.2  # a fit, in the mean
SECONDS = 1 / 3  # of the first baseline that is near


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One searcher over landscapes and seeds. Pairs are (median, worst); a loss is infinite where nothing ran."""

    searcher: str
    landscapes: int
    results: int
    probes: tuple[float, float]
    out_of_memory: tuple[float, float]
    mean_out_of_memory: float
    seconds: tuple[float, float]
    regret: tuple[float, float]
    near: float  # share of results within `NEAR`
    runs: float  # share that returned something that runs
    unrun: float  # share that returned something that it had not run, or that fails
    nothing: float  # share that said nothing fits, where something does
    returned: str  # in words


@dataclass(frozen=True, slots=True, kw_only=True)
class NothingFits:
    """One searcher on landscapes where nothing fits."""

    searcher: str
    landscapes: int
    said_so: float  # share
    probes: tuple[float, float]
    seconds: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Our seconds against a baseline's, (median, worst) over landscapes."""

    against_first: tuple[float, float]  # the quickest baseline that comes near on that landscape, else exhaustive
    firsts: dict[str, int]  # how often it was which
    overall: str | None  # the quickest baseline whose median regret is near
    against_overall: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A demand and what was found."""

    name: str
    found: float
    most: float

    @property
    def passed(self) -> bool:
        return self.found <= self.most


# Numbers


def summaries(results: Sequence[Result]) -> list[Summary]:
    """One for each searcher, over the landscapes where something fits."""
    return [_summary(name, found) for name, found in _by_searcher(r for r in results if r.anything_fits).items()]


def _summary(name: str, found: Sequence[Result]) -> Summary:
    return Summary(
        searcher=name,
        landscapes=len({result.landscape for result in found}),
        results=len(found),
        probes=_pair(result.probes for result in found),
        out_of_memory=_pair(result.out_of_memory for result in found),
        mean_out_of_memory=statistics.fmean(result.out_of_memory for result in found),
        seconds=_pair(result.seconds for result in found),
        regret=_pair(result.loss for result in found),
        near=_share(found, lambda result: result.loss <= NEAR),
        runs=_share(found, lambda result: result.runs),
        unrun=_share(found, lambda result: result.returned is not None and not (result.runs and result.was_run)),
        nothing=_share(found, lambda result: result.returned is None),
        returned=returned_words([result.returned for result in found]),
    )


def where_nothing_fits(results: Sequence[Result]) -> list[NothingFits]:
    return [
        NothingFits(
            searcher=name,
            landscapes=len({result.landscape for result in found}),
            said_so=_share(found, lambda result: result.returned is None),
            probes=_pair(result.probes for result in found),
            seconds=_pair(result.seconds for result in found),
        )
        for name, found in _by_searcher(r for r in results if not r.anything_fits).items()
    ]


def ratios(results: Sequence[Result]) -> Ratios | None:
    """None without a result of ours and of a baseline on one landscape."""
    cells = _cells(results)
    ours = {landscape: cell for (name, landscape), cell in cells.items() if name == OURS}
    others = {key: cell for key, cell in cells.items() if key[0] != OURS and key[1] in ours}
    firsts: dict[str, str] = {}
    for landscape in ours:
        here = {name: cell for (name, there), cell in others.items() if there == landscape}
        near = [name for name, (_, regret) in here.items() if regret <= NEAR]
        if not near and "exhaustive" in here:
            near = ["exhaustive"]
        if near:
            firsts[landscape] = min(near, key=lambda name: here[name][0])
    if not firsts:
        return None
    against = [ours[landscape][0] / others[name, landscape][0] for landscape, name in firsts.items()]
    overall = _overall(others)
    both = [(cell, others[overall, place]) for place, cell in ours.items() if overall and (overall, place) in others]
    return Ratios(
        against_first=_pair(against),
        firsts=dict(Counter(firsts.values()).most_common()),
        overall=overall,
        against_overall=_pair(mine[0] / theirs[0] for mine, theirs in both) if both else None,
    )


def _overall(others: Mapping[tuple[str, str], tuple[float, float]]) -> str | None:
    """The baseline with the least median seconds among those whose median regret is near."""
    by_name: dict[str, list[tuple[float, float]]] = {}
    for (name, _), cell in others.items():
        by_name.setdefault(name, []).append(cell)
    near = [name for name, cells in by_name.items() if statistics.median(regret for _, regret in cells) <= NEAR]
    return min(near, key=lambda name: statistics.median(seconds for seconds, _ in by_name[name]), default=None)


def _cells(results: Sequence[Result]) -> dict[tuple[str, str], tuple[float, float]]:
    """(searcher, landscape): its (seconds, loss), medians over seeds."""
    grouped: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.anything_fits:
            grouped.setdefault((result.searcher, result.landscape), []).append(result)
    return {
        key: (statistics.median(r.seconds for r in found), statistics.median(r.loss for r in found))
        for key, found in grouped.items()
    }


def bars(results: Sequence[Result]) -> list[Bar]:
    """What is demanded of our search; empty where it did not run."""
    ours = next((one for one in summaries(results) if one.searcher == OURS), None)
    if ours is None:
        return []
    found = [
        Bar(name="regret, median", found=ours.regret[0], most=REGRET[0]),
        Bar(name="regret, worst", found=ours.regret[1], most=REGRET[1]),
        Bar(name="probes, median", found=ours.probes[0], most=PROBES[0]),
        Bar(name="probes, worst", found=ours.probes[1], most=PROBES[1]),
        Bar(name="out of memory a fit, mean", found=ours.mean_out_of_memory, most=OUT_OF_MEMORY),
    ]
    against = ratios(results)
    if against is not None:
        name = "seconds ÷ the first baseline within 3 %, median"
        found.append(Bar(name=name, found=against.against_first[0], most=SECONDS))
    return found


def _by_searcher(results: Iterable[Result]) -> dict[str, list[Result]]:
    """In the order of `LABELS`."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.searcher, []).append(result)
    return {name: found[name] for name in LABELS if name in found}


def _pair(values: Iterable[float]) -> tuple[float, float]:
    listed = [float(value) for value in values]
    return statistics.median(listed), max(listed)


def _share(found: Sequence[Result], holds: Callable[[Result], bool]) -> float:
    return sum(holds(result) for result in found) / len(found)


def returned_words(configs: Sequence[TrainingConfig | None]) -> str:
    """The checkpointing and losses that were returned most, and the micro batches' range."""
    found = [config for config in configs if config is not None]
    if not found:
        return "nothing"
    kept = Counter(f"{c.gradient_checkpointing}, {c.loss}" for c in found).most_common(2)
    words = [f"{name} {count / len(found):.0%}" for name, count in kept]
    sizes = sorted(config.micro_batch_size for config in found)
    span = f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[0]}–{sizes[-1]}, median {statistics.median_low(sizes)}"
    return f"{'; '.join(words)}; micro batch {span}"


# Text


def report(results: Sequence[Result]) -> str:
    """All of it as Markdown."""
    parts = [_table(summaries(results)), _nothing_text(where_nothing_fits(results)), _ratio_text(ratios(results))]
    return "\n\n".join(part for part in [*parts, bars_text(bars(results))] if part) + "\n"


def _table(found: Sequence[Summary]) -> str:
    header = (
        *("searcher", "landscapes", "probes", "out of memory", "its mean", "seconds", "regret", "within 3 %"),
        *("returned what runs", "unrun or failing", "what it returned"),
    )
    rows = [
        (
            LABELS[one.searcher],
            f"{one.landscapes}" + (f" × {one.results // one.landscapes}" if one.results > one.landscapes else ""),
            f"{one.probes[0]:g} / {one.probes[1]:g}",
            f"{one.out_of_memory[0]:g} / {one.out_of_memory[1]:g}",
            f"{one.mean_out_of_memory:.2f}",
            f"{one.seconds[0]:,.0f} / {one.seconds[1]:,.0f}",
            f"{_percent(one.regret[0])} / {_percent(one.regret[1])}",
            f"{one.near:.0%}",
            f"{one.runs:.0%}",
            f"{one.unrun:.0%}",
            one.returned,
        )
        for one in found
    ]
    return f"Median / worst over landscapes (× seeds).\n\n{markdown_table(header, rows)}" if rows else ""


def _nothing_text(found: Sequence[NothingFits]) -> str:
    if not found:
        return ""
    rows = [
        (
            LABELS[one.searcher],
            str(one.landscapes),
            f"{one.said_so:.0%}",
            f"{one.probes[0]:g} / {one.probes[1]:g}",
            f"{one.seconds[0]:,.0f} / {one.seconds[1]:,.0f}",
        )
        for one in found
    ]
    table = markdown_table(("searcher", "landscapes", "said so", "probes", "seconds"), rows)
    return f"Where nothing fits, and in no number above:\n\n{table}"


def _ratio_text(found: Ratios | None) -> str:
    if found is None:
        return ""
    firsts = ", ".join(f"{LABELS[name]} {count}" for name, count in found.firsts.items())
    lines = [
        "autotune's seconds ÷ those of the quickest baseline within 3 % on the same landscape (exhaustive where none"
        f" is): {_ratio(found.against_first)}. It was: {firsts}."
    ]
    if found.overall is not None and found.against_overall is not None:
        lines.append(
            f"÷ those of {LABELS[found.overall]}, the quickest whose median regret is within 3 %:"
            f" {_ratio(found.against_overall)}."
        )
    else:
        lines.append("No baseline's median regret is within 3 %.")
    return "\n\n".join(lines)


def bars_text(found: Sequence[Bar]) -> str:
    lines = [f"- {bar.name}: {bar.found:.4g}, at most {bar.most:.4g}: {_verdict(bar)}" for bar in found]
    return "\n".join(lines)


def _verdict(bar: Bar) -> str:
    return "pass" if bar.passed else "FAIL"


def _ratio(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.2f} / {pair[1]:.2f}"


def _percent(value: float) -> str:
    return "nothing ran" if math.isinf(value) else f"{value * 100:.1f} %"


# The plot

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT = 1000, 420, 70, 40, 320
_LINE = 13  # between words that would cover each other
_MARKS = (0.0, 0.005, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the axis of regret; above them: nothing ran


def svg_of(found: Sequence[Summary]) -> str:
    """Median regret over median seconds, each with a line to the worst regret; the best is at the lower left."""
    seconds = [one.seconds[0] for one in found]
    low, high = math.log10(max(1.0, min(seconds))) - 0.1, math.log10(max(2.0, *seconds)) + 0.1
    wide = _WIDTH - _LEFT - _RIGHT

    def across(value: float) -> float:
        return _LEFT + wide * (math.log10(max(1.0, value)) - low) / (high - low)

    shapes = _grid(across, low, high)
    taken: list[tuple[float, float]] = []
    for number, one in enumerate(found):
        x, colour = across(one.seconds[0]), "#c00" if one.searcher == OURS else "#4e79a7"
        middle, worst = _up(one.regret[0]), _up(one.regret[1])
        word = middle
        while any(abs(x - other) < 2 * _LINE and abs(word - height) < _LINE for other, height in taken):
            word += _LINE
        taken.append((x, word))
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{middle:.1f}" y2="{worst:.1f}" stroke="{colour}" opacity="0.4"/>'
            f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="6" fill="{colour}"/>'
            f'<text x="{x + 8:.1f}" y="{word + 4:.1f}" fill="{colour}">{number + 1}</text>'
            f'<text x="{_WIDTH - _RIGHT + 15}" y="{_TOP + 11 + 22 * number}" fill="{colour}">'
            f"{number + 1} {escape(LABELS[one.searcher])}</text>"
        )
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT + 90}" font-family="sans-serif"'
        f' font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{_LEFT}" y="18" font-size="15">Regret over seconds of searching</text>\n{body}\n'
        f'<text x="{_LEFT}" y="{_TOP + _HEIGHT + 40}">'
        "median seconds; dots: median regret; lines: to the worst</text>\n"
        "</svg>\n"
    )


def _up(regret: float) -> float:
    """Even steps between the marks."""
    steps = len(_MARKS)
    above = next((i for i, mark in enumerate(_MARKS) if mark >= regret), None)
    if above is None:
        place = float(steps - 1) + (1.0 if math.isinf(regret) else 0.5)
    elif above == 0:
        place = 0.0
    else:
        place = above - (_MARKS[above] - regret) / (_MARKS[above] - _MARKS[above - 1])
    return _TOP + _HEIGHT * (1 - place / steps)


def _grid(across: Callable[[float], float], low: float, high: float) -> list[str]:
    right = _WIDTH - _RIGHT
    levels = [(_up(mark), f"{mark * 100:g} %") for mark in _MARKS] + [(_up(math.inf), "fails")]
    lines = [
        f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{words}</text>'
        for y, words in levels
    ]
    for power in range(math.ceil(low), math.floor(high) + 1):
        x = across(10.0**power)
        lines.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + _HEIGHT}" stroke="#ddd"/>'
            f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{10**power:,} s</text>'
        )
    return lines


def numbers(results: Sequence[Result]) -> dict[str, Any]:
    """The same for a record, plain data; what is infinite is null."""
    against = ratios(results)
    return {
        "summaries": summaries(results),
        "where_nothing_fits": where_nothing_fits(results),
        "ratios": against,
        "bars": [
            {"name": bar.name, "found": bar.found, "most": bar.most, "passed": bar.passed} for bar in bars(results)
        ],
    }
