"""`autotune classify`: what a log says about why a run died."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO, Literal

import click

from autotune.errors import InvalidRequest
from autotune.values import Judgement

_BYTES_PER_CHAR = 4  # UTF-8's most


@click.command("classify")
@click.argument("file", type=click.Path(path_type=Path), default="-", metavar="[FILE|-]")
@click.option("--exit-code", type=int, help="How the process ended: negative or above 128 for a signal.")
@click.option(
    "--target",
    type=click.Choice(["cuda", "cpu"]),
    help="What it ran on: with cpu, a failed allocation of its own is out of device memory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(file: Path, exit_code: int | None, target: Literal["cuda", "cpu"] | None, as_json: bool) -> None:
    """Say from its log why a run died: of device memory, of system RAM, or of neither.

    FILE is the log, or - for standard input.

    \b
    Example:
      autotune classify train.log --exit-code 1
      journalctl -k | autotune classify --json
    """
    from autotune.verdict.text import classify_text

    if str(file) == "-" and sys.stdin.isatty():
        raise click.UsageError("Give a FILE, or send a log on standard input: autotune classify train.log")
    judgement = classify_text(_read(file), exit_code=exit_code, target=target)
    click.echo(_as_json(judgement) if as_json else _as_text(judgement))


def _read(file: Path) -> str:
    """The log, in its beginning and end where it is long. Raises `InvalidRequest`."""
    if str(file) == "-":
        return sys.stdin.buffer.read().decode(errors="replace")
    try:
        with file.open("rb") as log:
            return _ends(log).decode(errors="replace")
    except OSError as error:
        raise InvalidRequest(f"Cannot read {file}: {error.strerror}. Give the path of a log.") from error


def _ends(log: BinaryIO) -> bytes:
    """All of it, or of a long file what is judged: beginning and end, cut apart by a line of its own."""
    from autotune.verdict.text import HEAD_CHARS, TAIL_CHARS

    status = os.fstat(log.fileno())
    head, tail = HEAD_CHARS * _BYTES_PER_CHAR, TAIL_CHARS * _BYTES_PER_CHAR
    if not stat.S_ISREG(status.st_mode) or status.st_size <= head + tail:
        return log.read()
    beginning = log.read(head)
    log.seek(-tail, os.SEEK_END)
    return beginning + b"\n" + log.read()


def _as_json(judgement: Judgement) -> str:
    document = {
        "verdict": judgement.verdict.value,
        "evidence": list(judgement.evidence),
        "action": judgement.action,
        "settle": judgement.settle,
        "numbers": judgement.numbers,
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def _as_text(judgement: Judgement) -> str:
    from autotune.verdict.actions import gib

    lines = [judgement.verdict.value, *(f"  {line}" for line in judgement.evidence)]
    if judgement.numbers:
        sizes = (
            f"{name.removesuffix('_bytes').replace('_', ' ')} {gib(size)}" for name, size in judgement.numbers.items()
        )
        lines.append(f"  numbers: {', '.join(sizes)}")
    if judgement.settle:
        lines.append(f"To settle it: {judgement.settle}")
    return "\n".join([*lines, f"What to do: {judgement.action}"])
