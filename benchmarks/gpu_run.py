"""A Llama-3-8B-shaped run that meets a longer batch under a memory limit: undisturbed, and under `autotune run`.

`python -m benchmarks.gpu_run --output benchmarks/results`
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from autotune.cli.fit_request import default_compute_dtype
from autotune.errors import GpuUnavailable, InvalidRequest
from autotune.hardware.readers import read_machine
from autotune.hardware.select import check_memory_limit, select_device
from autotune.hardware.sizes import parse_bytes
from autotune.recover.plan import RunState, read_state
from autotune.values import GIB, MIB, Device, to_json
from autotune.workload.models import resolve_model
from benchmarks.gpu_fit import autotune_command
from benchmarks.gpu_run_facts import (
    Asked,
    Attempt,
    Promise,
    Ran,
    attempts_of,
    compare,
    promises,
    read_events,
    recovery_s,
)
from benchmarks.gpu_run_one import limit_between, run_one, say
from benchmarks.gpu_run_plan import Plan, check_sizes, with_predicted
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

SCHEMA = "autotune.gpu_run/1"
#: Relative. Other micro batches are other matrix products: in bfloat16 their sums differ more than in float32.
LOSS_BOUNDS = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2}


@click.command()
@click.option("--gpu", default="auto", show_default=True, help="auto, cuda:N or a name; cpu rehearses the benchmark.")
@click.option(
    "--model", default="meta-llama/Meta-Llama-3-8B", show_default=True, help="An id, a folder, a config.json."
)
@click.option(
    "--memory-limit", default="12GiB", show_default=True, help="Of the supervised run; on the CPU it is measured."
)
@click.option("--short-length", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens of a sample.")
@click.option("--long-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Of one of them.")
@click.option("--steps", type=click.IntRange(min=4), default=32, show_default=True, help="Optimizer steps.")
@click.option(
    "--long-at-step", type=click.IntRange(min=2), default=20, show_default=True, help="Where the long one is."
)
@click.option("--effective-batch-size", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--micro-batch-size", type=click.IntRange(min=1), help="To begin with.  [default: predicted]")
@click.option("--save-steps", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--minutes", type=click.FloatRange(min=0), default=9.0, show_default=True, help="For everything.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for the raw JSON.")
def command(
    gpu: str,
    model: str,
    memory_limit: str,
    short_length: int,
    long_length: int,
    steps: int,
    long_at_step: int,
    effective_batch_size: int,
    micro_batch_size: int | None,
    save_steps: int,
    minutes: float,
    output: Path | None,
) -> None:
    """Train twice: with all of the card, and under `autotune run` with a limit that one late sample breaks.

    \b
    Example:
      python -m benchmarks.gpu_run --memory-limit 12GiB --output benchmarks/results
    """
    until = time.monotonic() + 60 * minutes
    with one_line_errors(), tempfile.TemporaryDirectory(prefix="autotune-gpu-run-") as place:
        device = choose_device(gpu)
        limit = None if device.kind == "cpu" else parse_bytes(memory_limit)
        if limit is not None:
            check_memory_limit(limit, device)
        plan = Plan(
            device=device,
            source=resolve_model(model),
            model=model,
            steps=steps,
            long_at_step=long_at_step,
            short_length=short_length,
            long_length=long_length,
            effective_batch_size=effective_batch_size,
            micro_batch_size=micro_batch_size or effective_batch_size,
            compute_dtype="float32" if device.kind == "cpu" else default_compute_dtype(device),
            save_steps=save_steps,
        )
        check_sizes(plan)
        record: dict[str, Any] = {"schema": SCHEMA, **circumstances(device)}
        if micro_batch_size is None and limit is not None:
            say("predicting which micro batch to begin with …")
            plan, record["predicted"] = with_predicted(plan, limit, Path(place, "traces"))
        keep = keeper_of(record, output, device, private_roots(model_folder(model), Path(place)))
        held = both_runs(plan, limit, Path(place), record, until, keep)
    sys.exit(0 if all(promise.held for promise in held) else 1)


def choose_device(wanted: str) -> Device:
    """The card that `autotune run` would take. Raises `GpuUnavailable`."""
    device, _ = select_device(wanted, read_machine().devices)
    if device.kind == "cpu" and wanted.lower() != "cpu":
        raise GpuUnavailable(
            "no GPU is visible here, and this benchmark is about one: `autotune doctor` says why;"
            " --gpu cpu with a small --model rehearses it"
        )
    return device


# The two runs


def both_runs(
    plan: Plan, limit: int | None, place: Path, record: dict[str, Any], until: float, keep: Callable[[], None]
) -> list[Promise]:
    """Run them, keep what they did, and say what was held."""
    record["command"] = plan.command(place)
    record["plan"] = {key: value for key, value in to_json(plan).items() if key not in ("device", "source")}
    bare = run_one(plan, place / "undisturbed", (), until)
    record["undisturbed"] = ran_json(bare)
    keep()
    if bare.exit_code != 0:
        say("\n".join(bare.last_lines))
        raise InvalidRequest("the undisturbed run did not finish, so there is nothing to compare with: see its output")
    limit = limit or limit_between(plan, bare)
    record["memory_limit_bytes"] = limit
    folder = place / "run"
    options = ["--gpu", plan.device.id, "--memory-limit", f"{limit // MIB}MiB", "--run-folder", str(folder)]
    supervised = run_one(plan, place / "supervised", [*autotune_command(), "run", *options, "--"], until)
    state, events = read_state(folder), read_events(folder)
    attempts = attempts_of(events, supervised.samples)
    asked = Asked(
        steps=plan.steps,
        long_at_step=plan.long_at_step,
        effective_batch_size=plan.effective_batch_size,
        limit_bytes=limit,
        loss_bound=LOSS_BOUNDS[plan.compute_dtype],
        is_card=plan.device.kind != "cpu",
    )
    held = promises(asked, bare, supervised, attempts, state)
    report = folder / "report.md"
    record["supervised"] = {
        **ran_json(supervised),
        "attempts": [asdict(one) for one in attempts],
        "recovery_s": recovery_s(attempts, supervised.steps),
        "state": to_json(state) if state else None,
        "events": events,
        "report": report.read_text(encoding="utf-8") if report.exists() else None,
    }
    record["compared"] = asdict(compare(bare.steps, supervised.steps))
    record["promises"] = [asdict(promise) for promise in held]
    keep()
    click.echo(summary(bare, supervised, attempts, state, held))
    return held


# What is kept and told


def keeper_of(record: dict[str, Any], output: Path | None, device: Device, roots: Sequence[str]) -> Callable[[], None]:
    """Writes the record as it is now, to the same file each time."""
    path = record_path(output, "gpu_run", device, record["time_utc"][:10]) if output else None

    def keep() -> None:
        if path:
            write_record(path, shareable(record, roots))
            say(f"Written to {path}.")

    return keep


def ran_json(ran: Ran) -> dict[str, Any]:
    """Times of samples in seconds since its start."""
    samples = [(round(moment - ran.began, 3), used) for moment, used in ran.samples]
    return {**asdict(ran), "samples": samples}


def summary(
    bare: Ran, supervised: Ran, attempts: Sequence[Attempt], state: RunState | None, held: Sequence[Promise]
) -> str:
    rows: list[tuple[str, ...]] = [
        ("attempt", "micro batch", "checkpointing", "from step", "seconds", "most in use, GiB", "then")
    ]
    rows += [_row(one) for one in attempts]
    incidents = state.incidents if state else ()
    again = sum(one.steps_lost or 0 for one in incidents)
    seconds = sum(one.seconds_lost or 0.0 for one in incidents)
    back = recovery_s(attempts, supervised.steps)
    waited = "not known how long" if back is None else f"{back:.0f} s"
    lines = [
        plain_table(rows),
        f"undisturbed {bare.wall_s:.0f} s, supervised {supervised.wall_s:.0f} s; {again} finished steps done again"
        f" ({seconds:.0f} s); {waited} from the death to the next step",
        *(f"{'pass' if one.held else 'FAIL'}  {one.text}" for one in held),
    ]
    return "\n".join(lines)


def _row(one: Attempt) -> tuple[str, ...]:
    checkpointing = {True: "on", False: "off", None: "–"}[one.gradient_checkpointing]
    batch = f"{one.micro_batch_size} × {one.gradient_accumulation_steps}" if one.micro_batch_size else "–"
    memory = ("–" if size is None else f"{size / GIB:.2f}" for size in (one.most_bytes, one.least_bytes_after))
    first = "–" if one.first_step is None else str(one.first_step)
    return (str(one.number), batch, checkpointing, first, f"{one.ended - one.began:.0f}", *memory)


if __name__ == "__main__":
    command()
