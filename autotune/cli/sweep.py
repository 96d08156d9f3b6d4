"""`autotune sweep`: a whole grid of configs measured on a device, into the database and a landscape file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from autotune.cli import fit
from autotune.cli.parameters import Text, Whole
from autotune.values import Isolation

#: Options that mean here what they mean in a fit.
_AS_IN_FIT = (
    *("gpu", "model", "weights", "sequence_length", "effective_batch_size", "memory_limit", "headroom", "trainer"),
    *("upcast", "compute_dtype", "optimizer", "attention", "lora_rank", "lora_alpha", "lora_dropout"),
    *("target_modules", "allow", "python"),
)


def as_in_fit(command: Callable[..., None]) -> Callable[..., None]:
    """The same options, by the same words."""
    shared = [option for option in fit.command.params if option.name in _AS_IN_FIT]
    command.__click_params__ = [*getattr(command, "__click_params__", ()), *reversed(shared)]  # type: ignore[attr-defined]
    return command


@click.command()
@as_in_fit
@click.option(
    "--isolation",
    type=click.Choice([i.value for i in Isolation]),
    default="warm",
    show_default=True,
    help="fresh: a new process for each config, which takes seconds more.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    type=Text(),
    metavar="FIELD=VALUE,…",
    help="Values of a setting, repeatable: micro_batch_size=1,2,4.  [default: all that a fit may try]",
)
@click.option(
    "--grid",
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML of settings with lists of values; --set replaces a line of it.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The landscape, JSON lines; what is in it already is not measured again.",
)
@click.option("--micro-batches", type=Whole(1, 1000), default=4, show_default=True, help="Timed of each, at most.")
@click.option("--max-configs", type=Whole(1, 2**31 - 1), help="Only the first so many of the grid.")
@click.option("--no-prediction", is_flag=True, help="Predict nothing: rows without what was expected of them.")
@click.option(
    "--optuna",
    "study_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write an Optuna study of all rows, named as the landscape, into this SQLite file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: bytes, seconds, unknown is null.")
def command(**options: Any) -> None:
    """Measure a whole grid of configs by short real QLoRA runs, those that run out of memory too.

    Without --set and --grid these are all configs that a fit of the same request may try. Nothing is skipped by
    prediction. Accumulation follows the micro batch, so that the effective batch stays. Every row is on disk before
    the next config runs: stop it at any moment, and the same command goes on from there.

    \b
    Example:
      autotune sweep --gpu cpu --output smollm.jsonl
      autotune sweep --set micro_batch_size=1,2,4,8 --set gradient_checkpointing=off,every_2,full --output l.jsonl
    """
    from autotune.cli import sweep_run

    sweep_run.run(options)
