"""What `autotune estimate` does once its options are parsed: choose, predict, print."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from autotune.configfile import read_config
from autotune.errors import GpuUnavailable, InvalidRequest, NothingFits, StoreError, UsageError
from autotune.fitfile import write_file
from autotune.hardware.cards import Card, find_card
from autotune.hardware.select import headroom_of_card
from autotune.hardware.sizes import InvalidSize, format_bytes, parse_bytes
from autotune.predict.forecast import (
    ALLOCATOR_SIZES,
    Forecast,
    Target,
    cpu_target,
    forecast_step,
    target_of_card,
)
from autotune.predict.store import TraceStore
from autotune.probe.dry_run import DryRunFailed, DryRunner
from autotune.probe.predictor import target_of_device
from autotune.search.quickest import Predict, families, fastest, least
from autotune.values import (
    TRAINER_ADAPTER_DTYPE,
    TRAINER_LOSS,
    TRAINER_UPCAST,
    Attention,
    Device,
    ModelSource,
    Trainer,
    TrainingConfig,
    to_json,
)
from autotune.workload.models import check_optimizer, check_sequence_length, resolve_model, shown

SCHEMA = "autotune.estimate/1"
_SEARCHED = ("model", "sequence_length", "effective_batch_size", "attention", "trainer")  # a config file answers them
_LONGEST_SWEEP = 64  # lengths
_LARGEST_LENGTH = 10_000_000  # tokens
_RANGE = re.compile(r"(\d{1,8})\.\.(\d{1,8})", re.ASCII)
_LIST = re.compile(r"\d{1,8}(?:\s*,\s*\d{1,8})*", re.ASCII)
DEFAULT_MODEL = "meta-llama/Meta-Llama-3-8B"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be predicted, on what."""

    model: ModelSource
    config: TrainingConfig  # as given, or the start of the search: one micro batch of the whole effective batch
    given: bool  # one config, not a search
    target: Target


def run(options: dict[str, Any]) -> None:
    """Predict and print. Raises `AutotuneError`; `NothingFits` after the closest config is printed."""
    check_options(options)
    target = choose_target(options["gpu"], options["memory_limit"], options["in_use"])
    question = with_what_is_known(_question(options, target))
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


def check_options(options: dict[str, Any]) -> None:
    """Before anything is read or run. Raises `UsageError`, `InvalidRequest`."""
    if options["sweep"] is not None:
        sweep_values(options["sweep"])
        if options["history"] is not None:
            raise UsageError("--history and --sweep: a history is of one step; leave one of them out")
    for name in ("plot", "history"):
        path = options[name]
        if path is None:
            continue
        if options["config_file"] is not None and _is_same(path, options["config_file"]):
            raise UsageError(f"--{name} {path} is the --config file: give another name")
        _check_free(path, force=options["force"])
    if options["plot"] and options["history"] and _is_same(options["plot"], options["history"]):
        raise UsageError("--plot and --history have one name: give them two")


def with_what_is_known(question: Question) -> Question:
    """The question with its card as it was found to be on this machine, told on stderr."""
    if question.target.card is None:
        return question
    from autotune.cli.learned_here import learned_here, learned_line
    from autotune.predict.learned import with_learned

    try:
        learned = learned_here(question.target.card, question.model)
    except StoreError as error:
        say(f"What was measured on this card is left out: {error}")
        return question
    if learned is None or (line := learned_line(learned)) is None:
        return question
    say(line)
    return replace(question, target=with_learned(question.target, learned))


def trace_folder() -> Path:
    """Where traces are kept: beside the GPU databases."""
    from gpu_db.store import default_home

    return default_home() / "traces"


def choose_target(name: str | None, memory_limit: str | None, in_use: str | None = None) -> Target:
    """The card named, of the catalogue; without a name the GPU that is here. Raises `InvalidRequest`.

    `in_use`: what other programs hold, the display's too; not stated: what they hold now of a GPU that is here.
    """
    limit = _bytes_of("--memory-limit", memory_limit)
    others = _bytes_of("--in-use", in_use, smallest=0)
    wanted = "" if name is None else name.strip().lower()
    if wanted == "cpu":
        if others is not None:
            raise UsageError(
                "--in-use is of a GPU's memory, and --gpu cpu has none: leave it out, or give --memory-limit"
            )
        return cpu_target("CPU", limit)
    if name is None or _IS_HERE.fullmatch(wanted):
        target = target_of_device(_gpu_here(name), limit)
    else:
        choice = find_card(name)
        if choice.others:
            say(f"{choice.card.name}: {choice.reason}")
        target = target_of_card(choice.card)
    if limit is not None:
        target = replace(target, capacity_bytes=limit)
    if others is None:
        return target
    if target.total_bytes is not None and others > target.total_bytes:
        raise InvalidRequest(
            f"--in-use {format_bytes(others)} is above the {format_bytes(target.total_bytes)} of {target.name}:"
            " give what other programs hold of it"
        )
    return replace(target, others_bytes=others)


_IS_HERE = re.compile(r"auto|(cuda|rocm|xpu)(:.*)?")  # of --gpu: a device of this machine, not a card's name


def _bytes_of(option: str, text: str | None, *, smallest: int = 1) -> int | None:
    try:
        return None if text is None else parse_bytes(text, smallest=smallest)
    except InvalidSize as error:
        raise InvalidSize(f"{option}: {error}") from error


def _gpu_here(wanted: str | None) -> Device:
    from autotune.hardware.readers import read_machine
    from autotune.hardware.select import select_device

    machine = read_machine()
    if not machine.gpus:
        kind = UsageError if wanted is None else GpuUnavailable
        raise kind('no GPU is visible here: name a card with --gpu, such as --gpu "RTX 3060"')
    return select_device(wanted or "auto", machine.devices)[0]


def _question(options: dict[str, Any], target: Target) -> Question:
    if options["config_file"] is not None:
        stated = [n for n in _SEARCHED if options[n] is not None]
        if stated:
            raise UsageError(
                f"--{stated[0].replace('_', '-')} and --config: the file says it already; give one of them"
            )
        return _given(options["config_file"], target)
    model = resolve_model(options["model"] or DEFAULT_MODEL, say=say)
    length = options["sequence_length"] or min(2048, model.max_positions or 2048)
    check_sequence_length(model, length)
    start = start_of(
        target.card,
        sequence_length=length,
        effective_batch_size=options["effective_batch_size"] or 16,
        trainer=Trainer(options["trainer"] or Trainer.TRANSFORMERS),
        attention=Attention(options["attention"] or Attention.SDPA),
    )
    check_attention(start.attention, target, option="--attention")
    return Question(model=model, config=start, given=False, target=with_headroom(target))


def _given(path: Path, target: Target) -> Question:
    """Of a config file. Raises `InvalidRequest` for what can be seen to be wrong before a dry run."""
    found = read_config(path)
    try:
        check_optimizer(found.config.optimizer, option=f"{path}: optimizer")
    except UsageError as error:  # the file is wrong, not the command line
        raise InvalidRequest(str(error)) from error
    check_attention(found.config.attention, target, option="attention:")
    model = resolve_model(found.model, say=say)
    check_sequence_length(model, found.config.sequence_length, option="sequence_length:")
    config = with_its_dtype(found.config, target, stated="compute_dtype" in found.stated)
    return Question(model=model, config=config, given=True, target=target)


def check_attention(attention: Attention, target: Target, *, option: str) -> None:
    """Raises `InvalidRequest`, naming the `option` that said so, for one that has no kernels on the target."""
    runs = target.kernels.kind != "cpu" and (target.card is None or target.card.attention.flash_attention_2)
    if attention is Attention.FLASH_ATTENTION_2 and not runs:
        raise InvalidRequest(f"flash_attention_2 does not run on {target.name}: give {option} sdpa, or eager")


def with_its_dtype(config: TrainingConfig, target: Target, *, stated: bool) -> TrainingConfig:
    """The config of a file, with float16 where none is stated and the card has no bfloat16; told on stderr."""
    if target.card is None or config.compute_dtype in ("float32", *target.card.dtypes):
        return config
    if stated:
        say(f"{target.name} has no units for {config.compute_dtype}, it is slow there: give compute_dtype: float16.")
        return config
    say(f"{target.name} has no units for {config.compute_dtype}: compute_dtype: float16 is predicted.")
    return replace(config, compute_dtype="float16")


def start_of(
    card: Card | None,
    *,
    sequence_length: int,
    effective_batch_size: int,
    trainer: Trainer = Trainer.TRANSFORMERS,
    attention: Attention = Attention.SDPA,
) -> TrainingConfig:
    """Where a search begins: the effective batch in one micro batch, the trainer's defaults, a dtype of the card's."""
    return TrainingConfig(
        sequence_length=sequence_length,
        micro_batch_size=effective_batch_size,
        loss=TRAINER_LOSS[trainer],
        upcast=TRAINER_UPCAST[trainer],
        adapter_dtype=TRAINER_ADAPTER_DTYPE[trainer],
        attention=attention,
        compute_dtype="bfloat16" if card is None or "bfloat16" in card.dtypes else "float16",
        trainer=trainer,
    )


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


def with_headroom(target: Target) -> Target:
    """The target with the headroom that a fit keeps of a card; of the CPU's limit none."""
    if target.capacity_bytes is None or target.kernels.kind == "cpu":
        return target
    return replace(target, headroom_bytes=headroom_of_card(target.capacity_bytes))


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


def sweep_values(text: str) -> list[int]:
    """ "sequence_length=512..5000" → 512, 1024, … 4096, 5000; commas list values. Raises `UsageError`."""
    name, _, rest = text.partition("=")
    rest, values = rest.strip(), []
    if found := _RANGE.fullmatch(rest):
        value, end = int(found[1]), int(found[2])
        while 0 < value < end:
            values.append(value)
            value *= 2
        values += [end] if 0 < int(found[1]) <= end else []
    elif _LIST.fullmatch(rest):
        values = list(dict.fromkeys(int(part) for part in rest.split(",")))
    if name.strip() != "sequence_length" or not values or min(values) < 1:
        raise UsageError(
            f"--sweep {shown(text[:60])}: write sequence_length=512..8192 (doubling) or sequence_length=512,768"
        )
    if max(values) > _LARGEST_LENGTH or len(values) > _LONGEST_SWEEP:
        raise UsageError(
            f"--sweep {shown(text[:60])}: give at most {_LONGEST_SWEEP} lengths, from 1 to {_LARGEST_LENGTH:,} tokens"
        )
    return values


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


def _check_free(path: Path, *, force: bool) -> None:
    """Before anything is predicted, not after."""
    try:
        mode = path.stat().st_mode if path.exists() else None
        is_beside = path.parent.is_dir()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written ({error.strerror}): give another name") from error
    if mode is not None and not stat.S_ISREG(mode):
        raise InvalidRequest(f"{path} is no regular file: give the name of one")
    if mode is not None and not force:
        raise InvalidRequest(f"{path} exists: give --force to overwrite it, or another name")
    if not is_beside:
        raise InvalidRequest(f"{path.parent} is no folder: make it first, or give another name")


def _is_same(one: Path, other: Path) -> bool:
    """By name, or by what lies there: a link is what it leads to."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _write(path: Path, content: str | bytes, *, force: bool) -> None:
    write_file(path, content, force=force)
    say(f"Written to {path}.")


def say(line: str) -> None:
    """A line for people: stderr."""
    click.echo(line, err=True)
