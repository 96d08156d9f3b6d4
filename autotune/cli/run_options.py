"""The options of a supervised run, shared by `run` and `daemon submit`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from autotune.cli.parameters import Duration, File, Number, Text, Whole

F = TypeVar("F", bound=Callable[..., Any])

TEXT = Text()
_STALL = Number("a number of 3 or more", lambda number: 3 <= number <= 1e6)

RUN_OPTIONS = [
    click.option(
        "--gpu",
        type=TEXT,
        default="auto",
        show_default=True,
        help='Card to watch and to choose configs for: auto, cuda:N, cpu, a UUID or a name such as "RTX 4090".',
    ),
    click.option(
        "--memory-limit",
        type=TEXT,
        help="Treat the card as one of 12GiB; on the CPU an absolute limit of the process's data.",
    ),
    click.option(
        "--plan",
        type=File(),
        help="A fit file: start with its config.  [default: the command's own]",
    ),
    click.option(
        "--fit", is_flag=True, help="Fit first, with the command's model, lengths and batch, and start there."
    ),
    click.option("--model", type=TEXT, help="Id or folder, where the command does not say it."),
    click.option("--sequence-length", type=Whole(2, 2**31 - 1), help="Longest sample, where the command does not say."),
    click.option("--output-dir", type=TEXT, help="Where checkpoints appear, where the command does not say."),
    click.option("--restarts", type=Whole(0, 1000), default=5, show_default=True, help="At most so many in --window."),
    click.option("--window", type=Duration(), default=3600.0, help="Time in which --restarts count.  [default: 1h]"),
    click.option(
        "--on-tenant",
        type=click.Choice(["wait", "step-down"]),
        default="wait",
        show_default=True,
        help="What to do when another process took the card's memory.",
    ),
    click.option(
        "--without-checkpoints", is_flag=True, help="Consent to a run that saves none: a death starts it from zero."
    ),
    click.option("--no-hook", is_flag=True, help="Put nothing into the trainer: its progress is then not seen."),
    click.option(
        "--stall",
        type=_STALL,
        default=20.0,
        show_default=True,
        help="No step for so many times the median step counts as a hang.",
    ),
    click.option("--stall-floor", type=Duration(), default=600.0, help="The shortest hang.  [default: 10min]"),
    click.option("--start-limit", type=Duration(), default=3600.0, help="Time to the first step.  [default: 1h]"),
    click.option("--grace", type=Duration(), default=30.0, help="From a forwarded signal to the end.  [default: 30s]"),
    click.option("--on-finished", type=TEXT, help="A command to run when it has finished; no shell."),
    click.option("--on-recovered", type=TEXT, help="A command to run after each recovery; no shell."),
    click.option("--on-failed", type=TEXT, help="A command to run when it is given up; no shell."),
]


def parse_limit(stated: str) -> int:
    """Bytes of --memory-limit. Raises `InvalidSize`."""
    from autotune.hardware.sizes import InvalidSize, parse_bytes

    try:
        return parse_bytes(stated)
    except InvalidSize as error:
        raise InvalidSize(f"--memory-limit: {error}") from error


def this_folder() -> Path:
    """Raises `InvalidRequest` where it was removed."""
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        from autotune.errors import InvalidRequest

        raise InvalidRequest("the folder that this shell is in was removed: change into one that is there") from error


def run_options(function: F) -> F:
    """Adds them, in the order of the list."""
    for option in reversed(RUN_OPTIONS):
        function = option(function)
    return function
