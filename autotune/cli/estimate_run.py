"""What `autotune estimate` does once its question is known: predict, search, print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from autotune.cli.estimate_question import (
    Question,
    check_options,
    choose_target,
    question_of,
    sweep_values,
    with_what_is_known,
)
from autotune.cli.words import say
from autotune.errors import InvalidRequest, NothingFits
from autotune.fitfile import write_file
from autotune.hardware.sizes import format_bytes
from autotune.predict.forecast import (
    ALLOCATOR_SIZES,
    Forecast,
    forecast_step,
)
from autotune.predict.store import TraceStore
from autotune.probe.dry_run import DryRunFailed, DryRunner
from autotune.search.quickest import Predict, families, fastest, least
from autotune.values import (
    Attention,
    TrainingConfig,
    to_json,
)
from autotune.workload.models import check_sequence_length

SCHEMA = "autotune.estimate/1"


def run(options: dict[str, Any]) -> None:
    """Predict and print. Raises `AutotuneError`; `NothingFits` after the closest config is printed."""
    check_options(options)
    target = choose_target(options["gpu"], options["memory_limit"], options["in_use"])
    question = with_what_is_known(question_of(options, target))
    for length in sweep_values(options["sweep"]) if options["sweep"] else ():
        check_sequence_length(question.model, length, option="--sweep lengths of")
    runner = DryRunner(TraceStore(trace_folder()))
    try:
        if not question.given:
            configs = [config for family in families(question.config) for config in family]
            runner.prepare(question.model, configs, question.target.kernels)
        question = with_its_attention(question, runner, options["attention"])
        if options["sweep"]:
            _sweep(question, runner, options)
        else:
            _estimate(question, runner, options)
    except DryRunFailed as failure:
        if question.given and failure.lacks == "attention":  # in the words of a file
            raise InvalidRequest(str(failure).replace("--attention eager", "attention: eager")) from failure
        raise
    finally:
        runner.close()


def trace_folder() -> Path:
    """Where traces are kept: beside the GPU databases."""
    from gpu_db.store import default_home

    return default_home() / "traces"


def with_its_attention(question: Question, runner: DryRunner, stated: str | None = None) -> Question:
    """The question; with eager attention where none was stated and the model has no other."""
    if question.given or stated is not None:
        return question
    try:
        runner.trace(question.model, least(question.config)[0], question.target.kernels)
    except DryRunFailed as failure:
        if failure.lacks != "attention":
            raise
        say(f"{question.model.name} has no sdpa attention in the installed transformers: eager is predicted.")
        return replace(question, config=replace(question.config, attention=Attention.EAGER))
    return question


def _predictor(question: Question, runner: DryRunner) -> Predict:
    return lambda config: runner.forecast(question.model, config, question.target)


def fastest_for(
    question: Question, runner: DryRunner, candidates: Sequence[Sequence[TrainingConfig]]
) -> tuple[Forecast, list[Forecast]]:
    """The search; the traces of all its configs are made first, side by side."""
    model, target = question.model, question.target
    runner.prepare(model, [config for family in candidates for config in family], target.kernels)

    def seconds(config: TrainingConfig) -> float | None:
        time = forecast_step(runner.trace(model, config, target.kernels), config, target)
        return time.step_time_s if time else None

    return fastest(candidates, _predictor(question, runner), seconds)


def _estimate(question: Question, runner: DryRunner, options: dict[str, Any]) -> None:
    predict = _predictor(question, runner)
    seen: list[Forecast] = []
    if question.given:
        found = predict(question.config)
    else:
        found, seen = fastest_for(question, runner, families(question.config))
    _write_files(question, runner, found, options)
    if options["as_json"]:
        click.echo(json.dumps(document(question, found, seen), indent=2, allow_nan=False))
    else:
        from autotune.cli.estimate_text import print_estimate

        print_estimate(question.model.name, question.target, found)
    if not question.given and found.fits is False:
        raise NothingFits(
            f"nothing is predicted to fit: the least needs {format_bytes(found.device_used_bytes)} of"
            f" {format_bytes(question.target.capacity_bytes)}. Try a shorter --sequence-length, a smaller --model or a"
            " larger card",
            closest=None,
        )


def _write_files(question: Question, runner: DryRunner, found: Forecast, options: dict[str, Any]) -> None:
    if not options["plot"] and not options["history"]:
        return
    from autotune.predict.plot import svg_of_step, viewer_snapshot

    kernels = question.target.kernels
    trace = runner.trace(question.model, found.config, kernels)
    if options["plot"]:
        title = f"{question.model.name} on {question.target.name}, predicted"
        _write(options["plot"], svg_of_step(trace, found, question.target, title=title), force=options["force"])
    if options["history"]:
        _write(options["history"], viewer_snapshot(trace, found.config, kernels), force=options["force"])


def document(question: Question, found: Forecast, seen: list[Forecast]) -> dict[str, Any]:
    """The JSON of one estimate."""
    target = question.target
    return {
        "schema": SCHEMA,
        "status": "predicted",
        "gpu": {"name": target.name, "memory_bytes": target.capacity_bytes},
        "model": {"name": question.model.name, "fingerprint": question.model.fingerprint},
        "config": to_json(found.config),
        "predicted": predicted(found),
        "parts": found.memory.parts,
        "unquantized_bytes": found.memory.unquantized_bytes,
        "fits": found.fits,
        "candidates": [
            {"config": to_json(item.config), "predicted": predicted(item), "fits": item.fits} for item in seen
        ],
    }


def predicted(found: Forecast) -> dict[str, Any]:
    """Plain numbers, with their intervals beside them."""
    values: dict[str, Any] = {name: getattr(found.memory, name) for name in ALLOCATOR_SIZES}
    values |= {name: getattr(found, name) for name in ("device_used_bytes", "step_time_s", "tokens_per_second")}
    intervals = {name: list(found.intervals[name]) for name in values if name in found.intervals}
    return {**values, "intervals": intervals}


def _sweep(question: Question, runner: DryRunner, options: dict[str, Any]) -> None:
    predict = _predictor(question, runner)
    rows = []
    for length in sweep_values(options["sweep"]):
        config = replace(question.config, sequence_length=length)
        rows.append(predict(config) if question.given else fastest_for(question, runner, families(config))[0])
    if options["plot"]:
        from autotune.predict.plot import svg_of_sweep

        points = [
            (r.config.sequence_length, r.device_used_bytes / 2**30, r.tokens_per_second, bool(r.fits)) for r in rows
        ]
        title = f"{question.model.name} on {question.target.name}, predicted"
        _write(
            options["plot"], svg_of_sweep(points, x_name="sequence length, tokens", title=title), force=options["force"]
        )
    if options["as_json"]:
        frontier = [{"config": to_json(r.config), "predicted": predicted(r), "fits": r.fits} for r in rows]
        click.echo(
            json.dumps(
                {
                    "schema": SCHEMA,
                    "status": "predicted",
                    "gpu": {"name": question.target.name, "memory_bytes": question.target.capacity_bytes},
                    "model": {"name": question.model.name, "fingerprint": question.model.fingerprint},
                    "frontier": frontier,
                },
                indent=2,
                allow_nan=False,
            )
        )
        return
    from autotune.cli.estimate_text import print_sweep

    print_sweep(question.model.name, question.target, rows)


def _write(path: Path, content: str | bytes, *, force: bool) -> None:
    write_file(path, content, force=force)
    say(f"Written to {path}.")
