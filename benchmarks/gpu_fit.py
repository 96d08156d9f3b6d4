"""What `autotune fit` finds for one model under several memory limits of one card, and how long it takes.

`python -m benchmarks.gpu_fit --output benchmarks/results`
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from autotune.errors import GpuUnavailable, InvalidRequest
from autotune.hardware.readers import read_machine
from autotune.hardware.select import select_device
from autotune.hardware.sizes import format_bytes, parse_bytes
from autotune.values import GIB, Device
from benchmarks.records import (
    circumstances,
    model_folder,
    one_line_errors,
    plain_table,
    private_roots,
    record_path,
    shareable,
    write_record,
)

SCHEMA = "autotune.gpu_fit/1"
WHOLE_CARD = "card"
FITTED, NOTHING_FITS, NO_DEVICE, INTERRUPTED = 0, 3, 4, 130  # exit codes of `autotune fit`


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A memory limit as it was written; None bytes: the whole card."""

    text: str
    memory_limit_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitResult:
    """What the command did under one limit. Unknown is None."""

    limit: str
    memory_limit_bytes: int | None
    skipped: str | None = None  # why it was not run
    exit_code: int | None = None
    last_line: str | None = None  # of its stderr, where it gave no document
    total_s: float | None = None  # the whole command, from start to exit
    first_step_s: float | None = None  # of it, until the first probe with a finished optimizer step was over
    first_startup_s: float | None = None  # of the first probe, what was not training: imports, building, …
    probes: int | None = None
    out_of_memory: int | None = None
    status: str | None = None
    config: dict[str, Any] | None = None
    tokens_per_second: float | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    fit: dict[str, Any] | None = None  # the command's whole JSON document


@click.command()
@click.option(
    "--limits", default="12GiB,16GiB,24GiB,card", show_default=True, help="With commas; card: all of its memory."
)
@click.option(
    "--model", default="meta-llama/Meta-Llama-3-8B", show_default=True, help="A public id, a folder or a config.json."
)
@click.option("--sequence-length", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--effective-batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--gpu", default="auto", show_default=True, help="auto, cuda:N or a name; cpu rehearses the benchmark itself."
)
@click.option("--budget-s", type=click.FloatRange(min=0), help="Start no limit after so many seconds.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the raw JSON, written after every limit.",
)
def command(
    limits: str,
    model: str,
    sequence_length: int,
    effective_batch_size: int,
    gpu: str,
    budget_s: float | None,
    output: Path | None,
) -> None:
    """Run `autotune fit` under each limit, each with an empty database, and set the answers side by side.

    Nothing fitting under a limit is a result. Exit 1 where a fit failed otherwise, 4 without a GPU.

    \b
    Example:
      python -m benchmarks.gpu_fit --limits 12GiB,card --output benchmarks/results
    """
    began = time.monotonic()
    asked = ["--gpu", gpu, "--model", model, "--sequence-length", str(sequence_length)]
    asked += ["--effective-batch-size", str(effective_batch_size)]
    with one_line_errors():
        device = choose_device(gpu)
        wanted = parse_limits(limits)
        roots = private_roots(model_folder(model))
        record = {"schema": SCHEMA, **circumstances(device), "options": asked, "limits": []}
        path = record_path(output, "gpu_fit", device, record["time_utc"][:10]) if output else None
        results: list[LimitResult] = []
        for limit in wanted:
            results.append(run_limit(limit, asked, device, out_of_time=_is_over(began, budget_s)))
            record["limits"] = [asdict(result) for result in results]
            if path:
                write_record(path, shareable(record, roots))
            if results[-1].exit_code in (NO_DEVICE, INTERRUPTED):
                break
    click.echo(table(results))
    if path:
        say(f"Written to {path}.")
    sys.exit(exit_code(results))


def choose_device(wanted: str) -> Device:
    """The card that `autotune fit` would take. Raises `GpuUnavailable`."""
    device, _ = select_device(wanted, read_machine().devices)
    if device.kind == "cpu" and wanted.lower() != "cpu":
        raise GpuUnavailable(
            "no GPU is visible here, and this benchmark is about one: `autotune doctor` says why;"
            " --gpu cpu --limits 600MiB rehearses it"
        )
    return device


def parse_limits(text: str) -> list[Limit]:
    """Raises `InvalidRequest` for what is no size."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InvalidRequest("--limits names none: write it like 12GiB,card")
    return [Limit(text=part, memory_limit_bytes=None if part == WHOLE_CARD else parse_bytes(part)) for part in parts]


def _is_over(began: float, budget_s: float | None) -> bool:
    return budget_s is not None and time.monotonic() - began >= budget_s


def run_limit(limit: Limit, asked: Sequence[str], device: Device, *, out_of_time: bool) -> LimitResult:
    """One limit's fit, or why there is none."""
    size, total = limit.memory_limit_bytes, device.total_bytes
    skipped = None
    if size is not None and total is not None and size > total:
        skipped = f"{limit.text} is more than the {format_bytes(total)} of {device.name}"
    elif out_of_time:
        skipped = "--budget-s is spent"
    if skipped:
        say(f"Skipped {limit.text}: {skipped}.")
        return LimitResult(limit=limit.text, memory_limit_bytes=size, skipped=skipped)
    say(f"--- {limit.text} ---")
    return run_fit(limit, [*asked, *(["--memory-limit", limit.text] if size is not None else [])])


def run_fit(limit: Limit, options: Sequence[str]) -> LimitResult:
    """`autotune fit` with an empty database; what it says on stderr is passed on."""
    last_line = None
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="autotune-home-") as home, tempfile.TemporaryFile("w+") as document:
        with subprocess.Popen(
            [*autotune_command(), "fit", *options, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=document,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "AUTOTUNE_HOME": home},
        ) as process:
            assert process.stderr is not None
            with passing_signals_to(process):
                for line in process.stderr:
                    click.echo(line, err=True, nl=False)
                    last_line = line.strip() or last_line
                process.wait()
        total_s = time.monotonic() - began
        document.seek(0)
        return result_of(limit, process.returncode, total_s, document.read(), last_line)


@contextmanager
def passing_signals_to(process: subprocess.Popen[str]) -> Iterator[None]:
    """An interrupt is the fit's to handle: it keeps what it measured and exits 130."""
    before = {
        number: signal.signal(number, lambda got, frame: process.send_signal(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def autotune_command() -> list[str]:
    """The console script beside this interpreter, else its module."""
    script = shutil.which("autotune", path=str(Path(sys.executable).parent))
    return [script] if script else [sys.executable, "-c", "from autotune.cli.main import main; main()"]


def result_of(limit: Limit, code: int, total_s: float, printed: str, last_line: str | None) -> LimitResult:
    """The facts of one fit, from its exit code and what it printed."""
    known: dict[str, Any] = {"limit": limit.text, "memory_limit_bytes": limit.memory_limit_bytes}
    known |= {"exit_code": code, "total_s": total_s}
    if code not in (FITTED, NOTHING_FITS) or not printed.strip():
        return LimitResult(**known, last_line=last_line)
    fit = json.loads(printed)
    measured = fit["measured"] or {}
    return LimitResult(
        **known,
        first_step_s=first_step_s(fit["trials"], total_s),
        first_startup_s=fit["trials"][0]["report"]["startup_s"] if fit["trials"] else None,
        probes=fit["probes"]["count"],
        out_of_memory=fit["probes"]["out_of_memory"],
        status=fit["status"],
        config=fit["config"],
        tokens_per_second=measured.get("tokens_per_second"),
        peak_allocated_bytes=measured.get("peak_allocated_bytes"),
        peak_reserved_bytes=measured.get("peak_reserved_bytes"),
        device_used_bytes=measured.get("device_used_bytes"),
        fit=fit,
    )


def first_step_s(trials: Sequence[dict[str, Any]], total_s: float) -> float | None:
    """Seconds from the command's start until a first optimizer step was done, at most: only later probes are left out.

    None where no probe came so far.
    """
    for number, trial in enumerate(trials):
        if trial["report"]["optimizer_times_s"]:
            return total_s - sum(float(later["report"]["wall_time_s"]) for later in trials[number + 1 :])
    return None


def table(results: Sequence[LimitResult]) -> str:
    """A row a limit."""
    header = (
        "limit",
        "result",
        "batch",
        "checkpointing",
        "tokens/s",
        "peak",
        "probes",
        "oom",
        "first step, s",
        "total, s",
    )
    return plain_table([header, *(_row(result) for result in results)])


def _row(result: LimitResult) -> tuple[str, ...]:
    config = result.config or {}
    peak = result.peak_reserved_bytes if result.peak_reserved_bytes is not None else result.peak_allocated_bytes
    batch = f"{config['micro_batch_size']} × {config['gradient_accumulation_steps']}" if config else "–"
    outcome = "skipped" if result.skipped else result.status or f"exit {result.exit_code}"
    return (
        result.limit,
        outcome,
        batch,
        config.get("gradient_checkpointing", "–"),
        _shown(result.tokens_per_second, 0),
        "–" if peak is None else f"{peak / GIB:.2f} GiB",
        _shown(result.probes, 0),
        _shown(result.out_of_memory, 0),
        _shown(result.first_step_s, 1),
        _shown(result.total_s, 1),
    )


def _shown(number: float | None, digits: int) -> str:
    return "–" if number is None else f"{number:,.{digits}f}"


def exit_code(results: Sequence[LimitResult]) -> int:
    """0 where every limit was answered or skipped; else the code that ended it, or 1."""
    failed = [r.exit_code for r in results if r.exit_code is not None and r.exit_code not in (FITTED, NOTHING_FITS)]
    if not failed:
        return 0
    return failed[-1] if failed[-1] in (NO_DEVICE, INTERRUPTED) else 1


def say(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    command()
