"""What `autotune estimate` was asked: the card, the model and the config, or where the search for one begins."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.cli.words import say
from autotune.configfile import read_config
from autotune.errors import GpuUnavailable, InvalidRequest, StoreError, UsageError
from autotune.hardware.cards import Card, find_card
from autotune.hardware.select import headroom_of_card
from autotune.hardware.sizes import InvalidSize, format_bytes, parse_bytes
from autotune.predict.forecast import (
    Target,
    cpu_target,
    target_of_card,
)
from autotune.probe.predictor import target_of_device
from autotune.values import (
    TRAINER_ADAPTER_DTYPE,
    TRAINER_LOSS,
    TRAINER_UPCAST,
    Attention,
    Device,
    ModelSource,
    Trainer,
    TrainingConfig,
)
from autotune.workload.models import check_optimizer, check_sequence_length, resolve_model, shown

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


def question_of(options: dict[str, Any], target: Target) -> Question:
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


def with_headroom(target: Target) -> Target:
    """The target with the headroom that a fit keeps of a card; of the CPU's limit none."""
    if target.capacity_bytes is None or target.kernels.kind == "cpu":
        return target
    return replace(target, headroom_bytes=headroom_of_card(target.capacity_bytes))


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
