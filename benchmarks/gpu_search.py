"""The search on this card: landscapes measured, replayed under limits, fits live, and what others' settings give.

`python -m benchmarks.gpu_search --output benchmarks/results`
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from autotune.cli import sweep
from autotune.cli.bench import optional_packages
from autotune.cli.sweep_run import request_of
from autotune.errors import Interrupted, InvalidRequest
from autotune.grid import Plan, parse_grid, plan_of_grid
from autotune.landscape import read_begun, read_landscape
from autotune.search.dimensions import divisors
from autotune.values import Device, Verdict, to_json
from benchmarks.gpu_fit import (
    INTERRUPTED,
    WHOLE_CARD,
    Limit,
    autotune_command,
    choose_device,
    parse_limits,
    passing_signals_to,
    say,
)
from benchmarks.records import (
    circumstances,
    model_folder,
    one_line_errors,
    private_roots,
    record_path,
    shareable,
    usable_cores,
    write_record,
)
from benchmarks.search import all_landscapes, run_tasks, searchers_of, tasks_of
from benchmarks.search_report import numbers, report
from benchmarks.searchers import Result

SCHEMA = "autotune.gpu_search/1"
PARTS = ("sweep", "replay", "fit", "compare")
SEEDS = 3  # of a searcher that draws
_LAST_PROBE_S = 90.0  # that a sweep may take to end after it is told to

_SETTINGS = ("upcast=none", "gradient_checkpointing=off,every_2,every_4,full", "loss=full,chunked,liger")
#: Of each length, in turn; micro batches are all divisors: 90 configs at an effective batch of 16, 130 with Liger.
#: Other tools leave the trainer's float32 copies. Segments that grow need another worker, so they come last, together.
GRIDS: tuple[tuple[str, ...], ...] = (
    _SETTINGS,
    ("upcast=fp32", "gradient_checkpointing=off,full"),
    ("allocator=expandable_segments", *_SETTINGS),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One run of this benchmark. Landscapes are found again by their names."""

    device: Device
    gpu: str  # as it was written
    model: str
    lengths: tuple[int, ...]
    effective_batch_size: int
    folder: Path
    deadline: float | None  # of the monotonic clock; None: there is none

    def landscape(self, length: int) -> Path:
        return self.folder / f"gpu_search-{self.device.slug}-{length}.jsonl"

    def options(self, length: int) -> list[str]:
        """Those that a sweep and a fit share."""
        asked = ["--gpu", self.gpu, "--model", self.model, "--sequence-length", str(length)]
        return [*asked, "--effective-batch-size", str(self.effective_batch_size)]

    def seconds_left(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def is_over(self) -> bool:
        return self.seconds_left() == 0.0


class Keeper:
    """The record of one part, written anew whenever there is more of it."""

    def __init__(self, asked: Asked, part: str) -> None:
        facts = circumstances(asked.device)
        self._roots = private_roots(model_folder(asked.model), asked.folder)
        self.path = record_path(asked.folder, f"gpu_search-{part}", asked.device, facts["time_utc"][:10])
        options = {"model": asked.model, "lengths": asked.lengths, "effective_batch_size": asked.effective_batch_size}
        self._record = {"schema": SCHEMA, "part": part, **facts, "options": options}

    def keep(self, found: dict[str, Any]) -> None:
        write_record(self.path, shareable(to_json({**self._record, **found}), self._roots))

    def said(self) -> None:
        say(f"Written to {self.path}.")


# The landscapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """How far a length's landscape is."""

    landscape: str
    sequence_length: int
    planned: int
    measured: int
    fits: int
    failed: tuple[dict[str, Any], ...]  # in this run, of something other than memory: they are no rows
    is_whole: bool  # every config was tried


def run_sweep(asked: Asked) -> list[Swept]:
    """Each length's grids until its share of the time is over; the same again goes on from there.

    Raises `InvalidRequest` where a sweep fails.
    """
    keeper = Keeper(asked, "sweep")
    found: list[Swept] = []
    for number, length in enumerate(asked.lengths):
        left = asked.seconds_left()
        until = None if left is None else time.monotonic() + left / (len(asked.lengths) - number)
        plans = list(plans_of(asked, length))
        documents = [measure(arguments, until) for arguments, _ in plans]
        found.append(swept(asked, length, [plan for _, plan in plans], documents))
        keeper.keep({"landscapes": found})
        say(f"{length:,} tokens: {found[-1].measured} of {found[-1].planned} configs, {found[-1].fits} fit.")
    keeper.said()
    return found


def plans_of(asked: Asked, length: int) -> Iterator[tuple[list[str], Plan]]:
    """The arguments of each sweep with what it measures, without those of which nothing can run here."""
    sizes = ",".join(map(str, divisors(asked.effective_batch_size)))
    installed = optional_packages(None)
    for settings in GRIDS:
        declared = [*settings, f"micro_batch_size={sizes}"]
        arguments = [*asked.options(length), "--output", str(asked.landscape(length))]
        arguments += [part for one in declared for part in ("--set", one)]
        options = sweep.command.make_context("sweep", list(arguments)).params
        grid = parse_grid(declared, "--set")
        request, _ = request_of(options, grid, asked.device)
        try:
            yield arguments, plan_of_grid(grid, request, asked.device, installed)
        except InvalidRequest as error:
            say(f"Left out: {error}")


def measure(arguments: Sequence[str], until: float | None) -> dict[str, Any] | None:
    """What `autotune sweep --json` prints; None where that moment of the monotonic clock ended it: rows are kept.

    Raises `InvalidRequest` where it fails, `Interrupted` where the user ends it.
    """
    if until is not None and time.monotonic() >= until:
        return None
    command_line = [*autotune_command(), "sweep", *arguments, "--json"]
    with (
        subprocess.Popen(command_line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process,
        passing_signals_to(process),
    ):
        try:
            printed, _ = process.communicate(timeout=None if until is None else until - time.monotonic())
        except subprocess.TimeoutExpired:
            say("The time for this length is over.")
            end(process)
            return None
    if process.returncode == INTERRUPTED:
        raise Interrupted("interrupted; what was measured is kept")
    if process.returncode != 0:
        raise InvalidRequest(f"a sweep ended with exit code {process.returncode}, its reason is above: correct that")
    return dict(json.loads(printed))


def end(process: subprocess.Popen[str]) -> None:
    """As a user would; one that does not end by itself is killed."""
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=_LAST_PROBE_S)
    except subprocess.TimeoutExpired:
        process.kill()


def swept(asked: Asked, length: int, plans: Iterable[Plan], documents: Sequence[dict[str, Any] | None]) -> Swept:
    """What of the plans is in the file, and what each sweep said."""
    begun = read_begun(asked.landscape(length))
    planned = dict.fromkeys(config for plan in plans for config in plan.configs)
    rows = [row for row in begun.rows if row.config in planned] if begun else []
    return Swept(
        landscape=asked.landscape(length).name,
        sequence_length=length,
        planned=len(planned),
        measured=len(rows),
        fits=sum(row.verdict is Verdict.FITS for row in rows),
        failed=tuple(failed for document in documents if document for failed in document["failed"]),
        is_whole=all(documents),
    )


# Replayed


def run_replay(asked: Asked, limits: Sequence[Limit], searcher: str | None) -> None:
    """Every search on every landscape under every limit. Raises `InvalidRequest`, `UsageError`."""
    keeper, known, results = Keeper(asked, "replay"), list[dict[str, Any]](), list[Result]()
    found = [
        landscape
        for path in landscapes_of(asked)
        for landscape in all_landscapes([path], limits_within(path, limits), seed=0)
    ]
    tasks = tasks_of(found, searchers_of(searcher), SEEDS, len(found))
    for number, (what, some) in enumerate(run_tasks(tasks, usable_cores() or 1), 1):
        say(f"{number}/{len(tasks)} {what['name']}")
        known.append(what)
        results += some
    keeper.keep({**numbers(results), "landscapes": known, "results": results})
    click.echo(report(results), nl=False)
    keeper.said()


def landscapes_of(asked: Asked) -> list[Path]:
    """The files that are there. Raises `InvalidRequest` where none is."""
    paths = [asked.landscape(length) for length in asked.lengths if asked.landscape(length).exists()]
    if not paths:
        raise InvalidRequest(f"no landscape of this card is in {asked.folder}: --part sweep measures them")
    return paths


def limits_within(path: Path, limits: Sequence[Limit]) -> list[int | None]:
    """Without those above what a landscape was measured under: it says nothing of them."""
    header = read_landscape(path).header
    most = header.memory_limit_bytes or header.device.total_bytes
    sizes = [limit.memory_limit_bytes for limit in limits]
    return [size for size in sizes if size is None or most is None or size < most]


# The command


@click.command()
@click.option("--part", type=click.Choice(["all", *PARTS]), default="all", show_default=True)
@click.option("--gpu", default="auto", show_default=True, help="auto, cuda:N or a name; cpu rehearses the benchmark.")
@click.option("--model", default="meta-llama/Meta-Llama-3-8B", show_default=True, help="A public id or a config.json.")
@click.option("--lengths", default="1024,4096", show_default=True, help="Tokens, with commas.")
@click.option("--effective-batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--limits", default="12GiB,16GiB,24GiB,48GiB,card", show_default=True, help="Of the replay.")
@click.option("--fit-limits", default="24GiB,card", show_default=True, help="Of the live fits.")
@click.option("--searcher", help="Only these in the replay, with commas between; autotune is ours.")
@click.option(
    "--minutes", type=click.FloatRange(min=0), help="Start nothing later. The sweep goes on in the next call."
)
@click.option("--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of all files.")
def command(
    part: str,
    gpu: str,
    model: str,
    lengths: str,
    effective_batch_size: int,
    limits: str,
    fit_limits: str,
    searcher: str | None,
    minutes: float | None,
    output: Path,
) -> None:
    """Measure, replay, fit, compare: each part by itself, or all in turn once the landscapes are whole.

    \b
    Example:
      python -m benchmarks.gpu_search --part sweep --minutes 9 --output benchmarks/results
    """
    from benchmarks.gpu_search_live import run_compare, run_fits

    began = time.monotonic()
    with one_line_errors():
        asked = Asked(
            device=choose_device(gpu),
            gpu=gpu,
            model=model,
            lengths=lengths_of(lengths),
            effective_batch_size=effective_batch_size,
            folder=output,
            deadline=None if minutes is None else began + 60 * minutes,
        )
        replayed, live = parse_limits(limits), parse_limits(fit_limits)
        output.mkdir(parents=True, exist_ok=True)
        parts: tuple[str, ...] = PARTS if part == "all" else (part,)
        code = 0
        if "sweep" in parts and not all(one.is_whole for one in run_sweep(asked)) and part == "all":
            say("Not all is measured yet: the same command goes on. --part replay replays what is there.")
            parts = ()
        if "replay" in parts:
            run_replay(asked, replayed, searcher)
        if "fit" in parts:
            code = run_fits(asked, live)
        if "compare" in parts:
            code = max(code, run_compare(asked, Limit(text=WHOLE_CARD, memory_limit_bytes=None)))
    sys.exit(code)


def lengths_of(text: str) -> tuple[int, ...]:
    """Raises `InvalidRequest`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 1 for part in parts):
        raise InvalidRequest(f"--lengths {text[:80]}: write tokens with commas, like 1024,4096")
    return tuple(dict.fromkeys(map(int, parts)))


if __name__ == "__main__":
    command()
