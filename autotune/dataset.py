"""How many samples a dataset file holds, and how many optimizer steps and hours a run over it takes."""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.errors import InvalidRequest

_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """What a dataset's files say without being tokenised."""

    samples: int
    bytes: int  # on disk
    format: str  # jsonl, json, txt, csv, parquet or arrow


def describe_dataset(path: Path) -> DatasetFacts:
    """Count the samples of `path`, a file or a folder of .arrow files. Reads line by line, so large files are fine.

    Raises InvalidRequest, naming the line, for a file that is missing, empty, of another format or broken.
    """
    try:
        files = _files(path)
        suffix = files[0].suffix.lower()
        if suffix not in _READERS:
            raise InvalidRequest(f"{path}: cannot read this format; give one of {', '.join(sorted(_READERS))}")
        samples = sum(_READERS[suffix](file) for file in files)
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if samples == 0:
        raise InvalidRequest(f"{path}: holds no samples; give a dataset with at least one")
    return DatasetFacts(samples=samples, bytes=size, format=_FORMATS.get(suffix, suffix.removeprefix(".")))


def training_hours(samples: int, epochs: float, effective_batch_size: int, step_time_s: float) -> tuple[int, float]:
    """Optimizer steps and hours of a run. The last batch of an epoch counts as a step though it is not full.

    Steps are counted as `transformers.Trainer` counts them: ceil(epochs × ceil(samples ÷ effective batch)).
    Raises InvalidRequest for a number that is not above 0.
    """
    numbers = {"samples": samples, "epochs": epochs, "effective_batch_size": effective_batch_size}
    for name, value in {**numbers, "step_time_s": step_time_s}.items():
        if not (math.isfinite(value) and value > 0):
            raise InvalidRequest(f"{name} must be a number above 0, not {value}")
    steps = math.ceil(epochs * math.ceil(samples / effective_batch_size))
    return steps, steps * step_time_s / _SECONDS_PER_HOUR


def _files(path: Path) -> list[Path]:
    """The file itself, or the .arrow files of a folder that `datasets` saved (its train split where it has splits)."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InvalidRequest(f"{path}: no such file; check the path")
    for folder in (path, path / "train"):
        if files := sorted(folder.glob("*.arrow")):
            return files
    raise InvalidRequest(f"{path}: is a folder without .arrow files; give one dataset file")


def _count_jsonl(path: Path) -> int:
    """Lines that hold a JSON object; empty lines are passed over."""
    return sum(1 for number, line in _lines(path) if _is_object(_parse(line, path, number), f"{path}, line {number}"))


def _count_json(path: Path) -> int:
    """A list of objects, such a list under "data", or JSON lines under the wrong name."""
    text = "\n".join(line for _, line in _lines(path))
    try:
        content = json.loads(text) if text else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _count_jsonl(path)
        raise InvalidRequest(f"{path}: is not JSON ({error}); correct it") from error
    except RecursionError as error:
        raise InvalidRequest(f"{path}: is nested too deeply to be read") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InvalidRequest(f'{path}: must hold a list of objects, or {{"data": [...]}}')
    return sum(1 for number, row in enumerate(rows, 1) if _is_object(row, f"{path}, item {number}"))


def _count_txt(path: Path) -> int:
    return sum(1 for _ in _lines(path))


def _count_csv(path: Path) -> int:
    """Records below the header: one that spans lines inside quotes is one."""
    limit = csv.field_size_limit(2**31 - 1)  # a sample may be longer than the default of 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = sum(1 for row in csv.reader(file, strict=True) if row)
    except csv.Error as error:
        raise InvalidRequest(f"{path}: is not CSV ({error}); correct it") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: is not UTF-8 text (byte {error.start}); convert it") from error
    finally:
        csv.field_size_limit(limit)
    return max(0, rows - 1)


def _count_parquet(path: Path) -> int:
    """The number in the file's footer."""
    arrow = _pyarrow(path)
    try:
        return int(importlib.import_module("pyarrow.parquet").read_metadata(path).num_rows)
    except arrow.ArrowException as error:
        raise InvalidRequest(f"{path}: is not a parquet file ({error})") from error


def _count_arrow(path: Path) -> int:
    """Rows of the record batches of a stream, as `datasets` writes it, or of a file; nothing is copied to memory."""
    arrow = _pyarrow(path)
    ipc = importlib.import_module("pyarrow.ipc")
    try:
        with arrow.memory_map(str(path)) as source:
            try:
                return sum(batch.num_rows for batch in ipc.open_stream(source))
            except arrow.ArrowInvalid:
                source.seek(0)
                reader = ipc.open_file(source)
                return sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches))
    except arrow.ArrowException as error:
        raise InvalidRequest(f"{path}: is not an arrow file ({error})") from error


def _pyarrow(path: Path) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise InvalidRequest(
            f"{path}: reading {path.suffix} needs pyarrow; install it (pip install pyarrow) or give a .jsonl file"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with something in them, with their numbers from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise InvalidRequest(f"{path}, line {number}: is not UTF-8 text; convert it") from error
            if text:
                yield number, text


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{path}, line {number}: is not JSON ({error.msg}); correct the line") from error
    except RecursionError as error:
        raise InvalidRequest(f"{path}, line {number}: is nested too deeply to be read") from error


def _is_object(row: Any, place: str) -> bool:
    if not isinstance(row, dict):
        raise InvalidRequest(f"{place}: must be a JSON object, not {type(row).__name__}; correct it")
    return True


_READERS: dict[str, Callable[[Path], int]] = {
    ".jsonl": _count_jsonl,
    ".ndjson": _count_jsonl,
    ".json": _count_json,
    ".txt": _count_txt,
    ".csv": _count_csv,
    ".parquet": _count_parquet,
    ".arrow": _count_arrow,
}
_FORMATS = {".ndjson": "jsonl"}
