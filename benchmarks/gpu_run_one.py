"""One run of `gpu_run`'s command, bare or supervised: started, watched, ended in time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from autotune.errors import Interrupted, InvalidRequest
from autotune.values import GIB, MIB
from benchmarks.gpu_run_facts import Ran, read_steps
from benchmarks.gpu_run_plan import TRAINER, Plan
from benchmarks.memory_watch import MemoryWatch, watch_of, within

ROOT = Path(__file__).parent.parent
BETWEEN = 0.75  # of the way from what short samples hold to what the long one does: half its micro batch fits
LEAST_APART = 32 * MIB  # of the CPU's two peaks, for a limit between them
_STOP_S = 30.0  # from SIGTERM to SIGKILL
_TELL_S = 10.0  # between lines of progress
_LAST_LINES = 30


def run_one(plan: Plan, folder: Path, before: Sequence[str], until: float) -> Ran:
    """The command, behind `before`, with its memory watched until what it took is back."""
    folder.mkdir()
    say(f"--- {folder.name} ---")
    environ = {**os.environ, "AUTOTUNE_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if plan.device.kind == "cpu":
        environ["OMP_NUM_THREADS"] = "1"  # so that both runs add in the same order
    log = folder / "output.log"
    with watch_of(plan.device, TRAINER) as watch:
        began, clock = time.time(), time.monotonic()
        with log.open("wb") as out, stopped_by_signals() as stopped:
            process = subprocess.Popen(
                [*before, *plan.command(folder)],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
            in_time = wait(process, until, stopped, lambda: tell_progress(folder, watch))
        wall_s = time.monotonic() - clock
        watch.wait_until_back()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        if line.startswith("autotune: "):
            say(line)
    if stopped:
        raise Interrupted("interrupted; no record of this run is kept")
    return Ran(
        exit_code=process.returncode if in_time else None,
        wall_s=wall_s,
        began=began,
        samples=tuple(watch.samples),
        steps=read_steps(folder / "steps.jsonl"),
        last_lines=() if in_time and process.returncode == 0 else tuple(lines[-_LAST_LINES:]),
    )


@contextmanager
def stopped_by_signals() -> Iterator[list[int]]:
    """The signals that came: they end the run first, then the benchmark."""
    seen: list[int] = []
    before = {one: signal.signal(one, lambda got, frame: seen.append(got)) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(process: subprocess.Popen[bytes], until: float, stopped: list[int], tell: Callable[[], None]) -> bool:
    """Whether it ended by itself before `until`; otherwise it is ended: asked first, so that it ends its own."""
    tell_at = time.monotonic() + _TELL_S
    while process.poll() is None and time.monotonic() < until and not stopped:
        time.sleep(0.1)
        if time.monotonic() >= tell_at:
            tell_at += _TELL_S
            tell()
    if process.poll() is not None:
        return True
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()  # a supervisor's keeper ends the trainer
        process.wait()
    return False


def tell_progress(folder: Path, watch: MemoryWatch) -> None:
    steps = read_steps(folder / "steps.jsonl")
    used = f"{watch.samples[-1][1] / GIB:.2f} GiB in use" if watch.samples else "memory not known"
    say(f"  step {steps[-1].step if steps else 0}, {used}")


def limit_between(plan: Plan, bare: Ran) -> int:
    """On the CPU, of a process's data: between what short samples hold and what the long one does.

    Raises `InvalidRequest`.
    """
    long = next(step for step in bare.steps if step.step == plan.long_at_step)
    short = max(within(bare.samples, bare.began, long.began), default=0)
    most = max(within(bare.samples, long.began, long.ended), default=0)
    if most - short < LEAST_APART:
        raise InvalidRequest(
            f"the long sample holds {(most - short) / MIB:.0f} MiB more than the short ones: give a longer one"
        )
    return round(short + BETWEEN * (most - short))


def say(line: str) -> None:
    click.echo(line, err=True)
