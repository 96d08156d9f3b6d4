"""`kill -9` of `autotune fit` at random moments: what outlives it, and what it loses.

`python -m benchmarks.kill_fit --moments 20 --output benchmarks/results`
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil

from autotune.cli.words import describe
from autotune.errors import ProbeFailed
from autotune.hardware.readers import read_machine
from autotune.hardware.select import select_device
from autotune.values import Device, Origin, TrialRecord, Verdict
from benchmarks.records import (
    circumstances,
    one_line_errors,
    plain_table,
    private_roots,
    record_path,
    shareable,
    write_record,
)
from gpu_db.store import database_path, open_store
from tests.tiny import CONFIG

SCHEMA = "autotune.kill_fit/1"
GRACE_S = 5.0  # for everything that a killed fit started to be gone
LONGEST_FIT_S = 300.0
MARK = "AUTOTUNE_HOME"  # in the environment of all that a fit starts; each home is used by one fit at a time
ENDED = (0, 3)  # exit codes of a fit that came to its end: fitted, nothing fits
_RECORDED = (Verdict.FITS, Verdict.DEVICE_OOM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the fits are asked: small, and tight enough that some probes and proofs run out of memory."""

    sequence_length: int = 256
    effective_batch_size: int = 8
    memory_limit: str = "96MiB"
    max_probes: int = 8

    def command(self, model: Path) -> list[str]:
        options = {
            "--model": model,
            "--sequence-length": self.sequence_length,
            "--effective-batch-size": self.effective_batch_size,
            "--memory-limit": self.memory_limit,
            "--max-probes": self.max_probes,
        }
        autotune = Path(sys.executable).with_name("autotune")
        return [str(autotune), "fit", "--gpu", "cpu", *(str(part) for pair in options.items() for part in pair)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One kill. Counts are of trials in the database of the killed fit's home."""

    seconds: float  # after the fit's start
    home: int
    phase: str  # which processes there were
    processes: int  # the fit's own included
    gone_after_s: float | None  # from the kill until nothing of it ran; None: something still did after GRACE_S
    alive: int  # after GRACE_S
    trials_before: int  # at this fit's start
    trials_shown: int  # by this fit, before the kill
    trials_after: int
    lost: int  # shown before the kill and not stored as shown, or stored before and changed
    intact: bool  # SQLite's integrity check


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The fit that followed the kills in one home, to its end."""

    home: int
    kills: int
    exit_code: int
    trials: int
    run_again: int  # trials of a config that was on record already, as a probe or as a failed proof


def tiny_model(folder: Path) -> Path:
    """The config of a model that trains in seconds, as a file in `folder`."""
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return path


@dataclass(slots=True)
class RunningFit:
    """`autotune fit` as a user starts it, with a home of its own, its output in files."""

    home: Path
    command: Sequence[str]
    process: subprocess.Popen[bytes] = field(init=False)
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.temporary.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, MARK: str(self.home), "TMPDIR": str(self.temporary)}
        self.began = time.monotonic()
        with (self.home / "stdout").open("wb") as stdout, (self.home / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment
            )

    @property
    def temporary(self) -> Path:
        """Its folder for temporary files."""
        return self.home / "temporary"

    @property
    def errors(self) -> str:
        """What it wrote to stderr so far."""
        return (self.home / "stderr").read_text(encoding="utf-8")

    def shown(self) -> list[str]:
        """The lines of finished trials on stderr, whole ones only."""
        lines = [line for line in self.errors.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line[:3].strip().isdecimal() and line[4:9] in (Origin.PROBE, Origin.PROOF)]

    def tree(self) -> list[psutil.Process]:
        """The fit's process and all below it, workers in sessions of their own included."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def wait(self, seconds: float = LONGEST_FIT_S) -> int | None:
        """Its exit code; None where it still runs after `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode

    def survivors(self, tree: Iterable[psutil.Process] = (), grace_s: float = GRACE_S) -> list[psutil.Process]:
        """What is alive of `tree`, or bears the mark of this home: at once when nothing is, else after `grace_s`.

        The mark finds what was started after `tree` was read.
        """
        deadline = time.monotonic() + grace_s
        while True:
            alive = {process for process in (*tree, *marked(self.home)) if is_alive(process)}
            if not alive or time.monotonic() > deadline:
                return list(alive)
            time.sleep(0.02)

    def end(self) -> None:
        """Kill all of it that is still alive."""
        for process in {*self.tree(), *marked(self.home)}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def marked(home: Path) -> list[psutil.Process]:
    """Every process whose environment names `home`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(home):
                found.append(process)
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs. A zombie does not: it waits for its new parent to take note."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_worker(process: psutil.Process) -> bool:
    """Whether it is a probe's worker, or a fork of one; not one that makes predictions."""
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        return any(part.endswith("bootstrap.py") for part in command) and "autotune.probe.dry_run_worker" not in command
    return False


def phase_of(tree: Sequence[psutil.Process]) -> str:
    """What the fit was doing, as far as its processes tell."""
    workers = sum(map(is_worker, tree[1:]))
    return ("no worker", "a worker, loading or proving", "a worker and its forked probe")[min(workers, 2)]


def stored(home: Path, device: Device) -> list[TrialRecord]:
    """All trials in `home`; none where there is no database yet. Raises StoreError."""
    if not database_path(home, device).exists():
        return []
    with open_store(home, device) as store:
        return store.trials()


def is_intact(home: Path, device: Device) -> bool:
    """SQLite's own check; a database that is not there yet is intact."""
    path = database_path(home, device)
    if not path.exists():
        return True
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return bool(connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])


def lost(before: Sequence[TrialRecord], shown: Sequence[str], after: Sequence[TrialRecord]) -> int:
    """Trials stored `before` that `after` has not as they were, and lines `shown` since that no new trial answers."""
    new = after[len(before) :]
    changed = sum(one != other for one, other in zip(before, after, strict=False)) + max(0, len(before) - len(after))
    told = zip(new, shown, strict=False)
    wrong = sum(not (line[4:9] == trial.origin and describe(trial.config) in line) for trial, line in told)
    return changed + wrong + max(0, len(shown) - len(new))


def run_again(trials: Iterable[TrialRecord]) -> int:
    """How many of `trials`, all of one request and environment, repeat one that was on record."""
    known = Counter((trial.config, trial.origin) for trial in trials if trial.judgement.verdict in _RECORDED)
    return sum(count - 1 for count in known.values())


@dataclass(slots=True)
class Killing:
    """A series of kills: fits go on in one home until one ends by itself, then in a new one."""

    folder: Path
    device: Device
    settings: Settings
    tell: Callable[[str], None]
    moments: list[Moment] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    kills: int = 0  # in the present home

    @property
    def home(self) -> Path:
        return self.folder / f"home{len(self.endings)}"

    def start(self) -> RunningFit:
        return RunningFit(self.home, self.settings.command(tiny_model(self.folder)))

    def undisturbed_s(self) -> float:
        """Seconds that a whole fit takes. Raises `ProbeFailed`."""
        began = time.monotonic()
        self.finish()
        return time.monotonic() - began

    def run(self, count: int, seed: int, whole_s: float) -> None:
        """Kill `count` fits, each at a random moment of a whole one. Raises `ProbeFailed`."""
        chance = random.Random(seed)
        for number in range(count):
            seconds = chance.uniform(0, whole_s)
            while (moment := self.kill_at(seconds)) is None:
                if not self.kills:  # even a whole fit was over by then
                    seconds = chance.uniform(0, whole_s)
                self.finish()
            self.moments.append(moment)
            self.kills += 1
            self.tell(f"{number + 1}: killed after {moment.seconds:.1f} s ({moment.phase})")
        self.finish()

    def kill_at(self, seconds: float) -> Moment | None:
        """Start a fit and kill it; None where it was over before. Raises `ProbeFailed`."""
        before = stored(self.home, self.device)
        fit = self.start()
        if fit.wait(seconds) is not None:
            check_ended(fit)
            return None
        tree = fit.tree()
        phase = phase_of(tree)
        killed = time.monotonic()
        fit.process.kill()
        fit.process.wait()
        alive = fit.survivors(tree)
        taken = time.monotonic() - killed
        fit.end()
        after, shown = stored(self.home, self.device), fit.shown()
        return Moment(
            seconds=seconds,
            home=len(self.endings),
            phase=phase,
            processes=len(tree),
            gone_after_s=None if alive else taken,
            alive=len(alive),
            trials_before=len(before),
            trials_shown=len(shown),
            trials_after=len(after),
            lost=lost(before, shown, after),
            intact=is_intact(self.home, self.device),
        )

    def finish(self) -> None:
        """Fit to the end in the present home; the next is a new one. Raises `ProbeFailed`."""
        fit = self.start()
        code = fit.wait()
        if code is None:
            fit.end()
            raise ProbeFailed(f"a fit was not over after {LONGEST_FIT_S:g} s: look at what else runs here")
        check_ended(fit)
        trials = stored(self.home, self.device)
        self.endings.append(
            Ending(
                home=len(self.endings),
                kills=self.kills,
                exit_code=code,
                trials=len(trials),
                run_again=run_again(trials),
            )
        )
        self.kills = 0


def check_ended(fit: RunningFit) -> None:
    """Raises `ProbeFailed` where a fit that nobody killed did not come to its end."""
    if fit.process.returncode not in ENDED:
        last = (fit.errors.strip().splitlines() or ["no last words"])[-1]
        raise ProbeFailed(f"a fit ended with exit code {fit.process.returncode}: {last}")


@click.command()
@click.option("--moments", type=click.IntRange(min=1), default=20, show_default=True, help="Kills.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for the record of all kills.")
@click.option("--check", is_flag=True, help="Exit 1 where anything outlived a kill or was lost.")
def command(moments: int, seed: int, output: Path | None, check: bool) -> None:
    """Kill fits of a tiny model on the CPU at random moments; count what still runs and what was lost.

    \b
    Example:
      python -m benchmarks.kill_fit --moments 20 --output benchmarks/results
    """
    with one_line_errors(), tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as folder:
        device, _ = select_device("cpu", read_machine().devices)
        facts = circumstances(device)
        killing = Killing(Path(folder), device, Settings(), say)
        whole_s = killing.undisturbed_s()
        say(f"A whole fit takes {whole_s:.1f} s and {killing.endings[0].trials} trials.")
        killing.run(moments, seed, whole_s)
    click.echo(report(killing))
    if output:
        path = record_path(output, "kill_fit", device, facts["time_utc"][:10])
        write_record(path, shareable({"schema": SCHEMA, **facts, **record(killing, seed, whole_s)}, private_roots()))
        say(f"Written to {path}.")
    if check and not all(held for _, held in promises(killing)):
        sys.exit(1)


def record(killing: Killing, seed: int, whole_s: float) -> dict[str, Any]:
    return {
        "settings": asdict(killing.settings),
        "seed": seed,
        "whole_fit_s": whole_s,
        "grace_s": GRACE_S,
        "promises": [{"promise": promise, "held": held} for promise, held in promises(killing)],
        "moments": [asdict(moment) for moment in killing.moments],
        "endings": [asdict(ending) for ending in killing.endings],
    }


def promises(killing: Killing) -> list[tuple[str, bool]]:
    """Each promise with what was counted, and whether it was held."""
    moments, endings = killing.moments, killing.endings
    alive, missing = sum(moment.alive for moment in moments), sum(moment.lost for moment in moments)
    broken, again = sum(not moment.intact for moment in moments), sum(ending.run_again for ending in endings)
    slowest = max((moment.gone_after_s for moment in moments if moment.gone_after_s is not None), default=0.0)
    shown = sum(moment.trials_shown for moment in moments)
    reruns = [ending.exit_code in ENDED for ending in endings if ending.kills]
    return [
        (
            f"{alive} processes alive {GRACE_S:g} s after {len(moments)} kills (the last gone after {slowest:.2f} s)",
            not alive,
        ),
        (f"{missing} of {shown} trials lost that were shown before a kill", not missing),
        (f"{broken} databases damaged", not broken),
        (f"{sum(reruns)} of {len(reruns)} reruns in a home with kills came to their end", all(reruns)),
        (f"{again} recorded trials run again", not again),
    ]


def report(killing: Killing) -> str:
    """The kills, the reruns and the promises, as tables."""
    kills = [
        {
            "kill": str(number),
            "home": str(moment.home),
            "after, s": f"{moment.seconds:.1f}",
            "processes": str(moment.processes),
            "gone, s": "–" if moment.gone_after_s is None else f"{moment.gone_after_s:.2f}",
            "alive": str(moment.alive),
            "trials before": str(moment.trials_before),
            "shown": str(moment.trials_shown),
            "after": str(moment.trials_after),
            "lost": str(moment.lost),
            "doing": moment.phase,
        }
        for number, moment in enumerate(killing.moments, 1)
    ]
    ends = [{name: str(value) for name, value in asdict(ending).items()} for ending in killing.endings]
    lines = [f"{'pass' if held else 'FAIL'}  {promise}" for promise, held in promises(killing)]
    return "\n".join([table(kills), "", table(ends), "", *lines])


def table(rows: Sequence[dict[str, str]]) -> str:
    return plain_table([list(rows[0]), *(list(row.values()) for row in rows)])


def say(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    command()
