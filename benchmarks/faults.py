"""The fault table: hundreds of injected faults, each run checked against what it comes to undisturbed.

`python -m benchmarks.faults --seed 0 --count 300 --real 40 --output benchmarks/results`
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from autotune.errors import ProbeFailed
from benchmarks.fault_check import Truth
from benchmarks.fault_daemon import DaemonPlay
from benchmarks.fault_inject import Fault
from benchmarks.fault_ledger import read_ledger
from benchmarks.fault_list import Case, cases
from benchmarks.fault_run import Outcome, Play, environ_of, from_json, to_json, words_of
from benchmarks.records import (
    markdown_table,
    one_line_errors,
    plain_table,
    private_roots,
    shareable,
    usable_cores,
    write_record,
)

SCHEMA = "autotune.faults/1"
PARALLEL = 3  # a run mostly waits: for its pause before a retry, for its trainer
_HEADER = (
    "fault",
    "runs",
    "faults",
    "finished",
    "steps lost",
    "orphans",
    "wrong recoveries",
    "recovery, median s",
    "worst s",
)


def build_clock(folder: Path) -> Path:
    """The library that makes a wall clock wrong. Raises `ProbeFailed` without a C compiler."""
    library = folder / "fault_clock.so"
    source = Path(__file__).with_name("fault_clock.c")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise ProbeFailed("there is no C compiler for the clock jumps: install gcc, or leave them out with --only")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(source)], check=True)
    return library


def real_truth(folder: Path, case: Case) -> Truth:
    """A real Trainer's undisturbed run. Raises `ProbeFailed`."""
    calm = Case(number=case.number, kind=case.kind, real=True, max_steps=case.max_steps)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(_calm_spec(folder), encoding="utf-8")
    done = subprocess.run(
        words_of(calm, folder / "out"), env=environ_of(folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ProbeFailed(f"the undisturbed run failed: {done.stderr.strip().splitlines()[-1]}")
    return Truth.of_run(read_ledger(folder))


def _calm_spec(folder: Path) -> str:
    return Case(number=0, kind=Fault.BUG).spec_in(folder).to_json()


class Table:
    """Plays cases, keeps each outcome the moment it is there."""

    def __init__(self, folder: Path, kept: Path | None) -> None:
        self.folder, self.kept = folder, kept
        self.lock = threading.Lock()
        self.outcomes: dict[int, Outcome] = {}
        if kept and kept.exists():
            lines = kept.read_text(encoding="utf-8").splitlines(keepends=True)
            known = (from_json(json.loads(line)) for line in lines if line.endswith("\n"))
            self.outcomes = {outcome.number: outcome for outcome in known}

    def play(self, wanted: Sequence[Case]) -> None:
        left = [case for case in wanted if case.number not in self.outcomes]
        self.truths: dict[bool, Truth] = {}
        if any(case.real for case in left):
            self.truths[True] = real_truth(self.folder / "undisturbed", next(case for case in left if case.real))
        self.clock = build_clock(self.folder) if any(case.kind is Fault.CLOCK_JUMP for case in left) else None
        with ThreadPoolExecutor(PARALLEL) as pool:
            for case, outcome in zip(left, pool.map(self.play_one, left), strict=True):
                self.keep(outcome)
                click.echo(line_of(case, outcome), err=True)

    def play_one(self, case: Case) -> Outcome:
        truth = self.truths[True] if case.real else Truth.of_task(case.task)
        folder = self.folder / f"case-{case.number}"
        play = (DaemonPlay if case.daemon else Play)(case, truth, folder, clock=self.clock)
        outcome = play.run()
        if outcome.good:
            shutil.rmtree(folder)
        return outcome

    def keep(self, outcome: Outcome) -> None:
        self.outcomes[outcome.number] = outcome
        if self.kept:
            with self.kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(to_json(outcome)) + "\n")


def line_of(case: Case, outcome: Outcome) -> str:
    parts = [f"{outcome.number}: {case.kind}", "real" if case.real else "", "daemon" if case.daemon else ""]
    state = "ok" if outcome.good else f"BAD {json.dumps(to_json(outcome))}"
    return f"{', '.join(part for part in parts if part)}: {state} ({outcome.seconds:.1f} s)"


def rows(outcomes: Iterable[Outcome]) -> Iterator[list[str]]:
    """The table's, one a kind, and their sum."""
    every = list(outcomes)
    for kind in Fault:
        if of_kind := [outcome for outcome in every if outcome.kind is kind]:
            yield [kind.value, *cells(of_kind)]
    yield ["all", *cells(every)]


def cells(outcomes: Sequence[Outcome]) -> list[str]:
    times = [one for outcome in outcomes for one in outcome.recoveries_s]
    return [
        str(len(outcomes)),
        str(sum(outcome.faults for outcome in outcomes)),
        str(sum(outcome.finished and outcome.same for outcome in outcomes)),
        str(sum(outcome.steps_lost for outcome in outcomes)),
        str(sum(outcome.orphans for outcome in outcomes)),
        str(sum(len(outcome.wrong) + (outcome.stopped_rightly is False) for outcome in outcomes)),
        f"{statistics.median(times):.2f}" if times else "–",
        f"{max(times):.2f}" if times else "–",
    ]


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "accelerate", "psutil")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def record(outcomes: Sequence[Outcome], wanted: Sequence[Case], seed: int, seconds: float) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": usable_cores(),
        "versions": versions(),
        "seed": seed,
        "seconds": round(seconds, 1),
        "table": [dict(zip(_HEADER, row, strict=True)) for row in rows(outcomes)],
        "cases": [
            {"case": case.to_json(), "outcome": to_json(outcome)}
            for case, outcome in zip(wanted, outcomes, strict=True)
        ],
    }


def markdown(outcomes: Sequence[Outcome], seed: int, day: str) -> str:
    """The table as a page."""
    real = sum(outcome.real for outcome in outcomes)
    lines = [
        f"# Injected faults, {day}",
        "",
        f"`python -m benchmarks.faults --seed {seed} --count {len(outcomes)} --real {real}`: {len(outcomes)} runs,"
        f" {real} of them on transformers' Trainer, the rest on a stand-in with the same checkpoints."
        f" {', '.join(f'{name} {number}' for name, number in versions().items())}.",
        "",
        markdown_table(_HEADER, list(rows(outcomes))),
        "",
        "*finished*: came to its end with the samples, order, steps and learning rates of the undisturbed run.",
        "*steps lost*: executed again although a complete checkpoint held them. *orphans*: processes of a run alive",
        "10 s after its supervisor had ended or was killed. *wrong recoveries*: another config where memory was not",
        "the cause, the same one where it was, a retried bug, another effective batch, a stop that was none.",
        "*recovery*: from the last thing a trainer did to the next attempt's first finished step; after a kill of the",
        "supervisor, from its next start.",
        "",
    ]
    return "\n".join(lines)


def new_path(folder: Path, benchmark: str, day: str) -> Path:
    """A new file of this benchmark and day: earlier runs of the day are kept."""
    names = [f"{benchmark}-{day}.json", *(f"{benchmark}-{day}-{number}.json" for number in range(2, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())


@contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@click.command()
@click.option("--seed", default=0, show_default=True, help="Of the faults.")
@click.option("--count", type=click.IntRange(min=1), default=300, show_default=True, help="Runs.")
@click.option("--real", type=click.IntRange(min=0), default=40, show_default=True, help="Of them on a real Trainer.")
@click.option("--only", multiple=True, help="Only faults whose name has this in it.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Folder for runs that went wrong.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for record and table.")
@click.option("--check", is_flag=True, help="Exit 1 where any promise was broken.")
def command(
    seed: int, count: int, real: int, only: tuple[str, ...], keep: Path | None, output: Path | None, check: bool
) -> None:
    """Inject faults into supervised runs; check that each comes to what it comes to undisturbed.

    A run that is cut short goes on where it was, given the same --output.

    \b
    Example:
      python -m benchmarks.faults --count 20 --real 0 --only memory
    """
    began = datetime.now(UTC)
    wanted = [case for case in cases(seed, count, real) if not only or any(part in case.kind for part in only)]
    kept = output / f"faults-{seed}-{count}-{real}.part.jsonl" if output else None
    if output:
        output.mkdir(parents=True, exist_ok=True)
    with one_line_errors(), working_folder(keep) as folder:
        table = Table(folder, kept)
        table.play(wanted)
    outcomes = [table.outcomes[case.number] for case in wanted]
    click.echo(plain_table([list(_HEADER), *rows(outcomes)]))
    if output and kept:
        day = began.date().isoformat()
        path = new_path(output, "faults", day)
        found = record(outcomes, wanted, seed, (datetime.now(UTC) - began).total_seconds())
        write_record(path, shareable(found, private_roots(folder)))
        path.with_suffix(".md").write_text(markdown(outcomes, seed, day), encoding="utf-8")
        kept.unlink()
    if check and not all(outcome.good for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    command()
