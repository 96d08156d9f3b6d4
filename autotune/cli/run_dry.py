"""`autotune run --dry-run`: what would run now, and after an out-of-memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotune.cli.run_foresight import foresight
from autotune.cli.run_text import batch_words, command_line
from autotune.recover.decide import how
from autotune.recover.facts import Batch, Death, Ended, Phase, Progress
from autotune.recover.longest import changed
from autotune.recover.step_down import StepDown, next_config
from autotune.values import Judgement, Verdict

if TYPE_CHECKING:
    from autotune.cli.run_job import Asked


def print_dry_run(asked: Asked) -> None:
    """Both launches, and by which way the command is told. Copies of config files go to a folder that is removed."""
    change = asked.begin_change
    settings = changed(asked.settings, change)
    with tempfile.TemporaryDirectory(prefix="autotune-dry-run-") as place:
        now = asked.command.launch(change, resume=None, folder=Path(place))
        _print("Now", now.argv, now.shown)
    click.echo(f"  {batch_words(settings)}")
    click.echo(f"  told by: {', '.join(asked.command.carriers)}")
    found = _after_out_of_memory(asked)
    if not isinstance(found, StepDown):
        click.echo(f"After an out-of-memory: {found}")
        return
    newest = Path(settings.output_dir or "OUTPUT_DIR", "checkpoint-NEWEST")
    with tempfile.TemporaryDirectory(prefix="autotune-dry-run-") as place:
        then = asked.command.launch({**change, **found.change}, resume=newest, folder=Path(place))
        _print("After an out-of-memory in a training step", then.argv, then.shown)
    click.echo(f"  {how(found)}")


def _print(title: str, argv: tuple[str, ...], shown: tuple[str, ...]) -> None:
    click.echo(f"{title}: {command_line(argv)}")
    for line in shown:
        click.echo(f"  {line}")


def _after_out_of_memory(asked: Asked) -> StepDown | str:
    """As if a full micro batch of the longest samples ran out; without a micro batch nothing can be said."""
    settings = changed(asked.settings, asked.begin_change)
    if settings.micro_batch_size is None:
        return "its micro batch is seen once the trainer is up, and a smaller one is told to it by the hook"
    tokens = settings.sequence_length
    batch = Batch(samples=settings.micro_batch_size, tokens=tokens) if tokens else None
    ended = Ended(
        exit_code=1,
        progress=Progress(phase=Phase.TRAIN, world_size=asked.command.world_size),
        death=Death(phase=Phase.TRAIN, batch=batch),
    )
    with foresight(settings, ended, asked.device, asked.limit_bytes, lambda: False) as seen:
        found = next_config(
            settings,
            ended,
            Judgement(verdict=Verdict.DEVICE_OOM),
            can=asked.command.can,
            device=asked.device,
            allowed_bytes=asked.limit_bytes if asked.device.kind == "cpu" else None,
            trials=seen.trials,
            predictor=seen.predictor,
            base=seen.base,
        )
    return found if isinstance(found, StepDown) else f"{found.why}: the run would stop"
