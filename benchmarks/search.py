"""Our search and other tools' on recorded landscapes, with no device: probes, out of memory, seconds, regret.

`python -m benchmarks.search --landscape FILE…`
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from autotune.cli.parameters import Whole
from autotune.errors import UsageError
from autotune.hardware.sizes import format_bytes, parse_bytes
from autotune.landscape import Landscape, limited, problems, read_landscape
from autotune.values import to_json
from benchmarks.distortion import FAMILIES
from benchmarks.records import one_line_errors, usable_cores, write_record
from benchmarks.replay import Recorded, seconds_of
from benchmarks.search_report import bars, numbers, report, summaries, svg_of
from benchmarks.searchers import LABELS, SEEDED, TOOLS, Result, closest_settings, search

SCHEMA = "autotune.search_benchmark/1"
MEASURED = Path(__file__).parent / "landscapes"
GP_LANDSCAPES = 12  # of all, evenly: seconds a suggestion, where the others take milliseconds


@dataclass(frozen=True, slots=True)
class Task:
    """One landscape and who searches it, with which seeds."""

    landscape: Landscape
    searches: tuple[tuple[str, int], ...]
    cold: bool = False  # samplers start a process for each config


def run_task(task: Task) -> tuple[dict[str, Any], list[Result]]:
    """What the landscape is, and every result on it. Raises `NotInLandscape`."""
    recorded = Recorded(task.landscape)
    return about(recorded), [search(name, recorded, seed, cold=task.cold) for name, seed in task.searches]


def about(recorded: Recorded) -> dict[str, Any]:
    """A landscape in a record: its size, its best row, the settings that other tools were given."""
    settings, differs = closest_settings(recorded)
    best = recorded.best
    return {
        "name": recorded.header.name,
        "origin": recorded.header.origin,
        "rows": len(recorded.rows),
        "fit": sum(row.verdict.value == "fits" for row in recorded.rows.values()),
        "allowed_bytes": recorded.allowed_bytes,
        "best": to_json(best.config) if best else None,
        "best_step_time_s": seconds_of(best) if best else None,
        "tools_settings": to_json(settings),
        "tools_settings_differ_from_defaults": list(differs),
    }


# Landscapes and tasks


def all_landscapes(
    files: Sequence[Path], limits: Sequence[int | None], seed: int, distortion: str = "usual"
) -> Iterator[Landscape]:
    """Of the files, else all kept here and simulated ones; one for each length and limit (None: as recorded).

    Raises `InvalidRequest`.
    """
    for landscape in _read(files, seed, distortion):
        for one in problems(landscape):
            for limit in limits:
                yield one if limit is None else _under(one, limit)


def _under(landscape: Landscape, limit: int) -> Landscape:
    within = limited(landscape, limit)
    return replace(within, header=replace(within.header, name=f"{landscape.header.name} under {format_bytes(limit)}"))


def limit_of(text: str) -> int | None:
    """Bytes; None for "card", the limit that the landscape has. Raises `InvalidSize`."""
    return None if text == "card" else parse_bytes(text)


def _read(files: Sequence[Path], seed: int, distortion: str) -> Iterator[Landscape]:
    if files:
        yield from map(read_landscape, files)
        return
    from benchmarks.simulated import landscapes

    yield from map(read_landscape, sorted(MEASURED.glob("*.jsonl")))
    yield from landscapes(seed, distortion=distortion)


def tasks_of(
    landscapes: Iterable[Landscape], searchers: Sequence[str], seeds: int, gp_landscapes: int, *, cold: bool = False
) -> list[Task]:
    """Those without rows are left out. Landscapes of one name are told apart by a number."""
    named = _named([landscape for landscape in landscapes if Recorded(landscape).rows])
    if not named:
        raise UsageError("no landscape has rows that answer its own request: give one with --landscape FILE")
    with_gp = (
        {i * len(named) // gp_landscapes for i in range(gp_landscapes)} if gp_landscapes else set(range(len(named)))
    )
    return [
        Task(
            landscape,
            tuple(
                (name, seed)
                for name in searchers
                if name != "gp" or number in with_gp
                for seed in range(seeds if name in SEEDED else 1)
            ),
            cold,
        )
        for number, landscape in enumerate(named)
    ]


def _named(landscapes: Sequence[Landscape]) -> list[Landscape]:
    seen: Counter[str] = Counter()
    found = []
    for landscape in landscapes:
        seen[landscape.header.name] += 1
        number = seen[landscape.header.name]
        name = landscape.header.name if number == 1 else f"{landscape.header.name} ({number})"
        found.append(replace(landscape, header=replace(landscape.header, name=name)))
    return found


def run_tasks(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[dict[str, Any], list[Result]]]:
    """In the order of the tasks."""
    if jobs == 1 or len(tasks) == 1:
        yield from map(run_task, tasks)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each: the GP's torch would take every core
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context) as pool:
        yield from pool.map(run_task, tasks)


# Command


def searchers_of(text: str | None) -> list[str]:
    """Names as given, or all that can run here. Raises `UsageError`."""
    if text is None:
        names = [name for name in LABELS if name != "gp" or find_spec("scipy")]
        if "gp" not in names:
            click.echo("Optuna's GP is left out: it needs scipy (pip install -e '.[bench]')", err=True)
        return names
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in LABELS]
    if unknown or not names:
        raise UsageError(f"--searcher: {', '.join(unknown) or 'nothing'} is none of {', '.join(LABELS)}")
    if "gp" in names and not find_spec("scipy"):
        raise UsageError("--searcher gp: Optuna's GP needs scipy: pip install -e '.[bench]'")
    return names


def new_path(folder: Path, day: str) -> Path:
    """A new JSON of this day; a plot and a page get the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    stems = [f"search-{day}", *(f"search-{day}-{number}" for number in range(2, 1000))]
    return next(folder / f"{stem}.json" for stem in stems if not (folder / f"{stem}.json").exists())


def write(folder: Path, landscapes: Sequence[dict[str, Any]], results: Sequence[Result], now: datetime) -> Path:
    """Raw results, the table and the plot, side by side."""
    path = new_path(folder, f"{now:%Y-%m-%d}")
    record = {
        "schema": SCHEMA,
        "time_utc": now.isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("autotune-qlora", "optuna", "torch", "scipy")},
        **numbers(results),
        "landscapes": list(landscapes),
        "results": list(results),
    }
    write_record(path, to_json(record))
    path.with_suffix(".md").write_text(f"# search, {now:%Y-%m-%d}\n\n{report(results)}", encoding="utf-8")
    if summed := summaries(results):
        path.with_suffix(".svg").write_text(svg_of(summed), encoding="utf-8")
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@click.command(help=__doc__)
@click.argument("more", nargs=-1, type=click.Path(path_type=Path))
@click.option("--landscape", multiple=True, type=click.Path(path_type=Path), help="File to replay; more may follow it.")
@click.option(
    "--limit",
    "limits",
    multiple=True,
    default=("card",),
    help="12GiB, …: as if under this limit; card: as recorded; repeatable.",
)
@click.option("--searcher", help=f"Only these, with commas between: {', '.join(LABELS)}.")
@click.option("--seeds", type=Whole(1, 1000), default=3, show_default=True, help="Of the searchers that draw.")
@click.option("--simulated-seed", type=int, default=0, show_default=True, help="Of the simulated landscapes.")
@click.option(
    "--distortion",
    type=click.Choice(tuple(FAMILIES)),
    default="usual",
    show_default=True,
    help="How simulated cards differ from what is predicted.",
)
@click.option(
    "--gp-landscapes",
    type=Whole(0, 10**6),
    default=GP_LANDSCAPES,
    show_default=True,
    help="How many of the landscapes Optuna's GP, which is slow, searches; 0: all.",
)
@click.option("--cold", is_flag=True, help="Samplers start a process for each config, as a script of theirs does.")
@click.option("--jobs", type=Whole(1, 1024), default=usable_cores() or 1, help="Processes. Default: the cores here.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for JSON, Markdown and SVG.")
@click.option("--check", is_flag=True, help="Exit 1 where a bar is missed.")
def main(
    more: tuple[Path, ...],
    landscape: tuple[Path, ...],
    limits: tuple[str, ...],
    searcher: str | None,
    seeds: int,
    simulated_seed: int,
    distortion: str,
    gp_landscapes: int,
    cold: bool,
    jobs: int,
    output: Path | None,
    check: bool,
) -> None:
    """A Markdown table on stdout, progress on stderr."""
    known: list[dict[str, Any]] = []
    results: list[Result] = []
    with one_line_errors():
        names = searchers_of(searcher)
        found = all_landscapes([*landscape, *more], [limit_of(limit) for limit in limits], simulated_seed, distortion)
        tasks = tasks_of(found, names, seeds, gp_landscapes, cold=cold)
        for number, (what, some) in enumerate(run_tasks(tasks, jobs), 1):
            click.echo(f"{number}/{len(tasks)} {what['name']}", err=True)
            known.append(what)
            results += some
    click.echo(report(results), nl=False)
    click.echo(settings_line(known), nl=False)
    if output is not None:
        click.echo(f"written: {write(output, known, results, datetime.now(UTC))}", err=True)
    sys.exit(1 if check and not all(bar.passed for bar in bars(results)) else 0)


def settings_line(landscapes: Sequence[dict[str, Any]]) -> str:
    """Where other tools could not be given their own defaults."""
    differing = Counter(
        ", ".join(f"{name}={what['tools_settings'][name]}" for name in what["tools_settings_differ_from_defaults"])
        for what in landscapes
        if what["tools_settings_differ_from_defaults"]
    )
    if not differing:
        return ""
    each = "; ".join(f"{words} in {count}" for words, count in differing.most_common())
    return f"\nWhere no row has the {len(TOOLS)} tools' defaults they were given the nearest: {each}.\n"


if __name__ == "__main__":
    main()
