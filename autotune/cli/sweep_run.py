"""What `autotune sweep` does once its options are parsed: join the rooms, run the flow, print."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from autotune.cli import fit
from autotune.cli.bench import open_bench, optional_packages, read_checked_environment, stop_flag
from autotune.cli.fit_request import build_request, choose_device
from autotune.cli.sweep_progress import SweepProgress
from autotune.cli.words import describe, say
from autotune.errors import InvalidRequest, UsageError
from autotune.grid import Grid, Plan, parse_grid, plan_of_grid, plan_of_space, read_grid
from autotune.hardware.environment import is_own_python
from autotune.landscape import Header, Landscape, LandscapeWriter, Row, read_begun
from autotune.probe.predictor import FitPredictor
from autotune.search.export_study import check_storage, speed_of, trials_of, write_study
from autotune.sweep import Failed, Sweep
from autotune.values import Device, Environment, FitRequest, Verdict, to_json
from autotune.workload.models import check_optimizer, check_sequence_length
from gpu_db.anonymous import public_model_name

SCHEMA = "autotune.sweep/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One sweep, as its options have it."""

    request: FitRequest
    device: Device
    headroom_bytes: int
    installed: frozenset[str]
    plan: Plan
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a sweep leaves: the whole landscape, and what of the plan was measured just now."""

    landscape: Landscape
    measured: int
    known: int  # of the plan, before
    failed: tuple[Failed, ...]
    wall_time_s: float


def run(options: dict[str, Any]) -> None:
    """Sweep and print. Raises `AutotuneError`."""
    grid = _grid(options)
    begun = _begun(options["output"])
    if options["study_file"]:
        if os.path.realpath(options["study_file"]) == os.path.realpath(options["output"]):
            raise UsageError(f"--optuna and --output are both {options['output']}: give one of them another name")
        check_storage(options["study_file"])
    device = choose_device(options["gpu"], options["python"])
    request, headroom = request_of(options, grid, device)
    for length in grid.get("sequence_length", ()):
        check_sequence_length(request.model, length)
    if is_own_python(options["python"]):
        for optimizer in grid.get("optimizer", ()):
            check_optimizer(optimizer, option="the grid's optimizer")
    installed = optional_packages(options["python"])
    plan = plan_of_grid(grid, request, device, installed) if grid else plan_of_space(request, device, installed)
    asked = Asked(
        request=request,
        device=device,
        headroom_bytes=headroom,
        installed=installed,
        plan=replace(plan, configs=plan.configs[: options["max_configs"]]),
        options=options,
    )
    with stop_flag() as stopped:  # until here a signal ends the command at once: nothing is measured yet
        result = _sweep(asked, begun, stopped)
    _print(result, asked)


def _grid(options: dict[str, Any]) -> Grid:
    """What is declared; nothing: {}. Raises `InvalidRequest`, `UsageError`."""
    of_file = read_grid(options["grid"]) if options["grid"] else {}
    return {**of_file, **parse_grid(options["settings"], "--set")}


def _begun(path: Path) -> Landscape | None:
    if path.is_dir():
        raise InvalidRequest(f"--output {path} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise InvalidRequest(f"{path.parent} is no folder: make it first, or give another --output")
    return read_begun(path)


def request_of(options: dict[str, Any], grid: Grid, device: Device) -> tuple[FitRequest, int]:
    """What a fit with these options would ask, and the headroom in bytes; the grid's longest length where none is
    stated. Raises as `build_request` does."""
    length = options["sequence_length"] or max(grid.get("sequence_length", ()), default=None)
    defaults = fit.command.make_context("fit", []).params  # of options that a sweep does not have
    return build_request({**defaults, **options, "sequence_length": length}, device)


def _sweep(asked: Asked, begun: Landscape | None, stopped: Callable[[], bool]) -> Result:
    """Measure what is not in the file yet. Raises `AutotuneError`, `Interrupted` too: finished rows are kept."""
    began = time.monotonic()
    path, device = asked.options["output"], asked.device
    environment = read_checked_environment(device, asked.options["python"])
    header = header_of(asked, environment, name=path.stem)
    if begun is not None:
        check_same(begun.header, header, path)
    known = {row.config for row in begun.rows} if begun else set()
    todo = [config for config in asked.plan.configs if config not in known]
    failed: list[Failed] = []
    try:
        if todo:
            progress = SweepProgress(device, asked.request, todo=len(todo), known=len(asked.plan.configs) - len(todo))
            with LandscapeWriter(path) as file, _opened(asked, environment, stopped, progress) as sweep:
                if read_begun(path) != begun:  # by another sweep, before this one had the file
                    raise InvalidRequest(f"{path} has grown meanwhile: give the same command again")
                start_s = sweep.start_worker(todo[0])
                if begun is None:
                    file.append(replace(header, fresh_start_s=start_s))
                failed.extend(sweep.run(todo, file.append))
    finally:
        landscape = read_begun(path)
        if landscape and landscape.rows and asked.options["study_file"]:
            write_study(asked.options["study_file"], landscape.header.name, trials_of(landscape))
    if landscape is None or not landscape.rows:
        raise InvalidRequest(f"nothing was measured: {failed[0].reason if failed else 'the grid is empty'}")
    return Result(
        landscape=landscape,
        measured=len(landscape.rows) - len(known),
        known=len(asked.plan.configs) - len(todo),
        failed=tuple(failed),
        wall_time_s=time.monotonic() - began,
    )


def header_of(asked: Asked, environment: Environment, *, name: str) -> Header:
    """What a landscape is of, without what names a person or a machine."""
    model = asked.request.model
    config = {key: value for key, value in model.config.items() if key != "_name_or_path"}
    return Header(
        name=name,
        origin="measured",
        device=replace(asked.device, uuid=None, tenants=(), problems=()),
        model=replace(model, name=public_model_name(model.name), config=config, folder=None),
        start=asked.request.start,
        memory_limit_bytes=asked.request.memory_limit_bytes,
        headroom_bytes=asked.headroom_bytes,
        installed=tuple(sorted(asked.installed)),
        environment=environment,
    )


def check_same(begun: Header, now: Header, path: Path) -> None:
    """Raises `InvalidRequest` where a file is of another model, device, software or request."""
    for what, before, after in [
        ("device", begun.device.slug, now.device.slug),
        ("model", f"{begun.model.name} ({begun.model.fingerprint})", f"{now.model.name} ({now.model.fingerprint})"),
        *_pairs(begun.start, now.start),
        ("memory limit", begun.memory_limit_bytes, now.memory_limit_bytes),
        ("headroom", begun.headroom_bytes, now.headroom_bytes),
        ("optional packages", begun.installed, now.installed),
        *_pairs(begun.environment, now.environment),
    ]:
        if before != after and what != "autotune":
            raise InvalidRequest(
                f"{path} was measured with {what.replace('_', ' ')} {_shown(before)}, not {_shown(after)}:"
                " give another --output, or ask as then"
            )


def _pairs(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """Field by field."""
    if before is None or after is None:
        return [("software", before, after)]
    names = [item.name for item in dataclasses.fields(before)]
    return [(name, to_json(getattr(before, name)), to_json(getattr(after, name))) for name in names]


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


@contextmanager
def _opened(
    asked: Asked, environment: Environment, stopped: Callable[[], bool], progress: SweepProgress
) -> Iterator[Sweep]:
    """A sweep on a fit's bench."""
    request, device, headroom = asked.request, asked.device, asked.headroom_bytes
    with open_bench(request, device, headroom, environment, asked.options, stopped, progress) as bench:
        _predict_all(asked, bench.predictor)
        count = asked.options["micro_batches"]
        yield Sweep(request, device, bench.seams, headroom_bytes=headroom, micro_batches=count)


def _predict_all(asked: Asked, predictor: FitPredictor | None) -> None:
    """The dry runs of all that is to come, made before any probe."""
    if predictor and not all(map(predictor.at_hand, asked.plan.configs)):
        say("Predicting these configs before the first is measured.")
        predictor.prepare(asked.plan.configs)
        predictor.close()  # its processes hold memory that the probes may need


# What it says


def _print(result: Result, asked: Asked) -> None:
    if asked.options["as_json"]:
        click.echo(json.dumps(document(result, asked), indent=2, allow_nan=False))
    else:
        click.echo("\n".join(lines(result, asked)))


def fastest(rows: Iterable[Row]) -> Row | None:
    """By tokens a second, lengths apart or not."""
    return max((row for row in rows if row.verdict is Verdict.FITS), key=lambda row: speed_of(row) or 0.0, default=None)


def document(result: Result, asked: Asked) -> dict[str, Any]:
    """What `--json` prints. Counts of rows are of the whole file."""
    rows, best = result.landscape.rows, fastest(result.landscape.rows)
    return {
        "schema": SCHEMA,
        "output": str(asked.options["output"]),
        "name": result.landscape.header.name,
        "gpu": {"name": asked.device.name, "rehearsal": asked.device.kind == "cpu"},
        "model": result.landscape.header.model.name,
        "configs": len(asked.plan.configs),
        "measured": result.measured,
        "known": result.known,
        "failed": [{"config": to_json(one.config), "reason": one.reason} for one in result.failed],
        "skipped": dict(asked.plan.skipped),
        "rows": len(rows),
        "verdicts": Counter(row.verdict.value for row in rows),
        "best": {"config": to_json(best.config), "tokens_per_second": speed_of(best)} if best else None,
        "wall_time_s": result.wall_time_s,
    }


def lines(result: Result, asked: Asked) -> list[str]:
    """For people."""
    rows, best = result.landscape.rows, fastest(result.landscape.rows)
    fits = sum(row.verdict is Verdict.FITS for row in rows)
    earlier = f", {result.known} were there" if result.known else ""
    found = [
        f"{result.measured} configs measured in {result.wall_time_s:.0f} s{earlier}; {asked.options['output']} has"
        f" {len(rows)}: {fits} fit, {len(rows) - fits} do not."
    ]
    found += [f"Left out: {count} combination(s), {reason}." for reason, count in asked.plan.skipped.items()]
    found += [f"Failed, and is no row: {describe(one.config)}: {one.reason}" for one in result.failed]
    if best is not None:
        found.append(f"Fastest: {describe(best.config)}: {speed_of(best):,.0f} tokens/s, padding counted.")
    if asked.options["study_file"]:
        found.append(f"Optuna study {result.landscape.header.name!r}: {asked.options['study_file']}")
    return found
