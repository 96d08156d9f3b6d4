"""What the benchmarks share: circumstances, text that names no machine, a record on disk, a plain table."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from autotune.errors import AutotuneError
from autotune.hardware.environment import read_environment
from autotune.values import Device, to_json

_OF_THE_MOMENT = ("uuid", "tenants", "free_bytes")  # or of this one card: not part of a record
_SHORTEST_ROOT = 4  # characters; "/" or "/x" would tear ordinary text apart
_GONE = "…"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """An `AutotuneError` ends the program: one line on stderr and its own exit code."""
    try:
        yield
    except AutotuneError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


def circumstances(device: Device, *, now: datetime | None = None) -> dict[str, Any]:
    """Where and when a benchmark runs: device, software, load (1, 5, 15 minutes), UTC time."""
    known = {key: value for key, value in to_json(device).items() if key not in _OF_THE_MOMENT}
    return {
        "time_utc": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
        "device": known,
        "cores": usable_cores(),
        "load_average_at_start": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "environment": to_json(read_environment(None, device, usable_cores() if device.kind == "cpu" else None)),
    }


def usable_cores() -> int | None:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def private_roots(*extra: Path) -> list[str]:
    """Folders whose names belong to this machine and not in a record, longest first."""
    folders = [Path(sys.prefix), Path(__file__).parent.parent, Path.cwd(), Path.home(), Path(tempfile.gettempdir())]
    names = {str(form) for folder in [*folders, *extra] for form in (folder.absolute(), folder.resolve())}
    return sorted((name for name in names if len(name) >= _SHORTEST_ROOT), key=len, reverse=True)


def model_folder(model: str) -> Path:
    """The folder around a model given as a path."""
    return Path(model).absolute().parent


def shareable(data: Any, roots: Sequence[str]) -> Any:
    """`data` with every root in its text as "…", and of other processes on a card only the bytes they use."""
    if isinstance(data, dict):
        return {
            key: [{"used_bytes": tenant.get("used_bytes")} for tenant in value]
            if key == "tenants"
            else shareable(value, roots)
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [shareable(item, roots) for item in data]
    if isinstance(data, str):
        for root in roots:
            data = data.replace(root, _GONE)
    return data


def record_path(folder: Path, benchmark: str, device: Device, day: str) -> Path:
    """A new file of this benchmark, day and device in `folder`: earlier runs of the day are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{benchmark}-{day}-{device.slug}"
    names = [f"{stem}.json", *(f"{stem}-{number}.json" for number in range(2, 1000))]
    return next(folder / name for name in names if not (folder / name).exists())


def write_record(path: Path, record: dict[str, Any]) -> None:
    """The whole record or what was there before, never half of it."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the header first, as columns two spaces apart: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    lines = ["  ".join(put(cell, width) for put, cell, width in zip(align, row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A header and rows in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
