"""What supervision costs: a Trainer's steps bare and under `autotune run`, an idle daemon, `status` of a full queue.

`python -m benchmarks.run_overhead --pairs 6 --output benchmarks/results`
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import psutil

from autotune.errors import ProbeFailed
from autotune.recover.daemon_file import read_daemon
from autotune.recover.job import NewJob
from autotune.recover.jobs import open_jobs
from benchmarks.fault_run import AUTOTUNE, ROOT
from benchmarks.faults import new_path, versions
from benchmarks.records import one_line_errors, private_roots, shareable, usable_cores, write_record

SCHEMA = "autotune.run_overhead/1"
GATE_VARIABLE = "AUTOTUNE_BENCHMARK_GATE"  # set: the hook is heard at every second step
WARM_UP = 3  # steps left out at the start of each run
OVERHEAD_BAR = 0.005  # of a step's time
IDLE_RSS_BAR, IDLE_CPU_BAR = 40 << 20, 0.002  # bytes; of a core
STATUS_BAR_S = 0.3


@dataclass(frozen=True)
class Steps:
    """One run's, in seconds: by the clock, and of this process's own CPU time."""

    supervised: bool
    wall: tuple[float, ...]
    cpu: tuple[float, ...]


@dataclass(frozen=True)
class Idle:
    """A daemon with nothing to do."""

    rss_bytes: int
    cpu_fraction: float  # of one core
    seconds: float


@dataclass(frozen=True)
class Alternating:
    """One supervised run whose hook is heard at every second step."""

    hooked: tuple[bool, ...]
    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    inside: tuple[float, ...]  # within the hook's callback, of the steps at which it is heard


def alternate(folder: Path, steps: int) -> Alternating:
    """Raises `ProbeFailed`."""
    times = measured(folder, steps, supervised=True, gated=True)
    inside = tuple(one for one, hooked in zip(times["inside"], times["hooked"], strict=True) if hooked)
    return Alternating(tuple(times["hooked"]), tuple(times["wall"]), tuple(times["cpu"]), inside)


def paired_steps(run: Alternating, clock: str) -> dict[str, float]:
    """How much longer a step with the hook takes than the one beside it: the median of pairs, and its standard error.

    Each hooked step is set against the mean of its two neighbours, so that a slow drift of the machine cancels.
    """
    times = getattr(run, clock)
    inner = range(1, len(times) - 1)
    ratios = [2 * times[at] / (times[at - 1] + times[at + 1]) - 1 for at in inner if run.hooked[at]]
    quartiles = statistics.quantiles(ratios, n=4)
    deviation = (quartiles[2] - quartiles[0]) / 1.349  # of a normal distribution with these quartiles
    return {
        "median": statistics.median(ratios),
        "standard_error": 1.253 * deviation / len(ratios) ** 0.5,
        "pairs": len(ratios),
        "median_step_s": statistics.median(times),
    }


def train(folder: Path, steps: int, *, supervised: bool) -> Steps:
    """One run. Raises `ProbeFailed`."""
    times = measured(folder, steps, supervised=supervised)
    return Steps(supervised, tuple(times["wall"]), tuple(times["cpu"]))


def measured(folder: Path, steps: int, *, supervised: bool, gated: bool = False) -> dict[str, list[Any]]:
    """What the trainer wrote, the warm-up left out, of one run in an empty folder. Raises `ProbeFailed`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = {
        "output_dir": folder / "out",
        "max_steps": steps + WARM_UP + 1,
        "per_device_train_batch_size": 8,
        "save_strategy": "steps",
        "save_steps": steps + WARM_UP + 1,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 10,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.overhead_trainer", *words]
    if supervised:
        command = [str(AUTOTUNE), "run", "--gpu", "cpu", "--run-folder", str(folder / "run"), "--", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AUTOTUNE_HOME": str(folder / "home")}
    environment |= {GATE_VARIABLE: "1"} if gated else {}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no last words"])[-1]
        raise ProbeFailed(f"a {'supervised' if supervised else 'bare'} run failed: {last}")
    times = json.loads((folder / "out" / "times.json").read_text(encoding="utf-8"))
    return {name: values[WARM_UP:] for name, values in times.items()}


def pairs_of_runs(folder: Path, pairs: int, steps: int) -> list[tuple[Steps, Steps]]:
    """Bare and supervised, one after the other, the order turned round each time."""
    found = []
    for number in range(pairs):
        order = (False, True) if number % 2 == 0 else (True, False)
        runs = {supervised: train(folder / "pair", steps, supervised=supervised) for supervised in order}
        found.append((runs[False], runs[True]))
        ratio = statistics.median(runs[True].wall) / statistics.median(runs[False].wall)
        click.echo(f"pair {number + 1}: {100 * (ratio - 1):+.2f} % by the clock", err=True)
    return found


def overhead(pairs: Sequence[tuple[Steps, Steps]], clock: str) -> dict[str, float]:
    """Ratio of medians less one: over all steps of all runs, and per pair with its spread."""
    each = [
        statistics.median(getattr(with_, clock)) / statistics.median(getattr(bare, clock)) - 1 for bare, with_ in pairs
    ]
    all_bare = [one for bare, _ in pairs for one in getattr(bare, clock)]
    all_with = [one for _, with_ in pairs for one in getattr(with_, clock)]
    return {
        "pooled": statistics.median(all_with) / statistics.median(all_bare) - 1,
        "median_of_pairs": statistics.median(each),
        "lowest_pair": min(each),
        "highest_pair": max(each),
        "median_bare_s": statistics.median(all_bare),
    }


def idle_daemon(home: Path, seconds: float) -> Idle:
    """Of a daemon just started, after it has settled. Raises `ProbeFailed`."""
    autotune(home, "daemon", "start")
    facts = read_daemon(home)
    if facts is None:
        raise ProbeFailed(f"the daemon did not say who it is: look at {home / 'daemon.log'}")
    try:
        process = psutil.Process(facts.process.pid)
        time.sleep(5)
        before, began = process.cpu_times(), time.monotonic()
        time.sleep(seconds)
        after, rss, took = process.cpu_times(), process.memory_info().rss, time.monotonic() - began
        used = after.user + after.system - before.user - before.system
        return Idle(rss, used / took, took)
    finally:
        autotune(home, "daemon", "stop")


def status_times(home: Path, jobs: int, rounds: int = 10) -> list[float]:
    """Seconds that `daemon status` takes with so many jobs queued, as JSON."""
    with open_jobs(home) as store:
        for number in range(jobs):
            store.submit(NewJob(command=("python", "train.py", "--output_dir", f"out-{number}"), cwd=str(home)))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        autotune(home, "daemon", "status", "--json")
        times.append(time.perf_counter() - began)
    return times


def autotune(home: Path, *words: str) -> None:
    """Raises `ProbeFailed`."""
    done = subprocess.run(
        [str(AUTOTUNE), *words],
        env={**os.environ, "AUTOTUNE_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ProbeFailed(f"`autotune {' '.join(words)}` failed: {done.stderr.strip()}")


def promises(run: Alternating, idle: Idle, status: Sequence[float]) -> list[tuple[str, bool]]:
    """Each with what was measured, and whether it was held."""
    beside, inside = paired_steps(run, "cpu"), statistics.median(run.inside) / statistics.median(run.wall)
    error = f"standard error {100 * beside['standard_error']:.2f} % of {beside['pairs']} pairs"
    return [
        (f"the hook's callback is {100 * inside:.3f} % of a step", inside < OVERHEAD_BAR),
        (
            f"in one run, a step with the hook takes {100 * beside['median']:+.2f} % more CPU time ({error})",
            beside["median"] < OVERHEAD_BAR,
        ),
        (f"an idle daemon holds {idle.rss_bytes / 2**20:.1f} MiB", idle.rss_bytes < IDLE_RSS_BAR),
        (f"an idle daemon takes {100 * idle.cpu_fraction:.3f} % of a core", idle.cpu_fraction < IDLE_CPU_BAR),
        (f"status takes {statistics.median(status):.3f} s", statistics.median(status) < STATUS_BAR_S),
    ]


def whole_runs(steps: dict[str, dict[str, float]]) -> str:
    """Bare and supervised runs side by side, in a line: no bar where their own spread is wider than it."""
    parts = [
        f"{100 * one['median_of_pairs']:+.2f} % {clock} (pairs {100 * one['lowest_pair']:+.2f} to"
        f" {100 * one['highest_pair']:+.2f} %)"
        for clock, one in steps.items()
    ]
    return f"whole runs, supervised against bare: {', '.join(parts)}"


@click.command()
@click.option("--pairs", type=click.IntRange(min=1), default=6, show_default=True, help="Of runs, bare and supervised.")
@click.option("--steps", type=click.IntRange(min=5), default=30, show_default=True, help="Timed in each run.")
@click.option(
    "--alternating", type=click.IntRange(min=20), default=200, show_default=True, help="Steps of the run in one."
)
@click.option("--idle", "idle_s", default=60.0, show_default=True, help="Seconds to watch an idle daemon.")
@click.option("--jobs", type=click.IntRange(min=1), default=1000, show_default=True, help="Queued for `status`.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for the record.")
@click.option("--check", is_flag=True, help="Exit 1 where a bar was missed.")
def command(
    pairs: int, steps: int, alternating: int, idle_s: float, jobs: int, output: Path | None, check: bool
) -> None:
    """Measure what supervision costs a run's steps, what an idle daemon takes, and how long `status` does.

    \b
    Example:
      python -m benchmarks.run_overhead --pairs 6 --output benchmarks/results
    """
    now, load = datetime.now(UTC), os.getloadavg()
    with one_line_errors(), tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as folder:
        found = pairs_of_runs(Path(folder), pairs, steps)
        run = alternate(Path(folder, "alternating"), alternating)
        home = Path(folder, "home")
        home.mkdir(mode=0o700)
        idle = idle_daemon(home, idle_s)
        status = status_times(home, jobs)
    compared = {clock: overhead(found, clock) for clock in ("wall", "cpu")}
    held = promises(run, idle, status)
    click.echo("\n".join(f"{'pass' if good else 'FAIL'}  {promise}" for promise, good in held))
    click.echo(f"      {whole_runs(compared)}")
    if output:
        output.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "time_utc": now.isoformat(timespec="seconds"),
            "cores": usable_cores(),
            "load_average_at_start": list(load),
            "load_average_at_end": list(os.getloadavg()),
            "versions": versions(),
            "promises": [{"promise": promise, "held": good} for promise, good in held],
            "overhead": compared,
            "in_one_run": {clock: paired_steps(run, clock) for clock in ("wall", "cpu")},
            "alternating": asdict(run),
            "runs": [asdict(one) for pair in found for one in pair],
            "idle_daemon": asdict(idle),
            "status": {"jobs": jobs, "seconds": status},
        }
        write_record(new_path(output, "run-overhead", now.date().isoformat()), shareable(record, private_roots()))
    if check and not all(good for _, good in held):
        sys.exit(1)


if __name__ == "__main__":
    command()
