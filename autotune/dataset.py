"""What a dataset's files hold: how many samples, each as it stands, and the steps and hours a run over them takes."""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from autotune.errors import InvalidRequest

_SECONDS_PER_HOUR = 3600
_ROWS_AT_ONCE = 1024  # of a parquet file

Row = tuple[str, dict[str, Any]]  # where it stands, and what it holds
T = TypeVar("T")


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
    with _readable(path):
        files, suffix = _dataset_files(path)
        samples = sum(_count(file, suffix) for file in files)
        size = sum(file.stat().st_size for file in files)
    if samples == 0:
        raise InvalidRequest(f"{path}: holds no samples; give a dataset with at least one")
    return DatasetFacts(samples=samples, bytes=size, format=_FORMATS.get(suffix, suffix.removeprefix(".")))


def read_batches(path: Path) -> Iterator[Any] | None:
    """The record batches of arrow or parquet files; None for a format that has none. Raises as above, as they come."""
    _, suffix = _dataset_files(path)
    return _all(path, _BATCHES[suffix]) if suffix in _BATCHES else None


def read_rows(path: Path) -> Iterator[Row]:
    """Each sample of the other formats with its place, "data.jsonl, line 3". Raises as above, as they come."""
    _, suffix = _dataset_files(path)
    return _all(path, _ROWS[suffix])


def _all(path: Path, read: Callable[[Path], Iterator[T]]) -> Iterator[T]:
    with _readable(path):
        for file in _dataset_files(path)[0]:
            yield from read(file)


def training_hours(samples: int, epochs: float, effective_batch_size: float, step_time_s: float) -> tuple[int, float]:
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


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _dataset_files(path: Path) -> tuple[list[Path], str]:
    """The files and their format, as the end of their names."""
    files = _files(path)
    suffix = files[0].suffix.lower()
    if suffix not in _ROWS and suffix not in _BATCHES:
        known = ", ".join(sorted([*_ROWS, *_BATCHES]))
        raise InvalidRequest(f"{path}: cannot read this format; give one of {known}")
    return files, suffix


def _count(file: Path, suffix: str) -> int:
    return _COUNTS[suffix](file) if suffix in _COUNTS else sum(1 for _ in _ROWS[suffix](file))


def _files(path: Path) -> list[Path]:
    """The file itself, or the .arrow files of a folder that `datasets` saved (its train split where it has splits)."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        if path.exists():  # a pipe or a device, which cannot be read twice
            raise InvalidRequest(f"{path}: is no regular file; write what it gives to one, such as data.jsonl")
        raise InvalidRequest(f"{path}: no such file; check the path")
    for folder in (path, path / "train"):
        if files := sorted(folder.glob("*.arrow")):
            return files
    raise InvalidRequest(f"{path}: is a folder without .arrow files; give one dataset file")


def _rows_jsonl(path: Path) -> Iterator[Row]:
    """Lines that hold a JSON object; empty lines are passed over."""
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        yield place, _object(_parse(line, path, number), place)


def _rows_json(path: Path) -> Iterator[Row]:
    """A list of objects, such a list under "data", or JSON lines under the wrong name."""
    text = "\n".join(line for _, line in _lines(path))
    try:
        content = json.loads(text) if text else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _rows_jsonl(path)
            return
        raise InvalidRequest(f"{path}: is not JSON ({error}); correct it") from error
    except ValueError as error:
        raise InvalidRequest(f"{path}: holds a number without end; correct it") from error
    except RecursionError as error:
        raise InvalidRequest(f"{path}: is nested too deeply to be read") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InvalidRequest(f'{path}: must hold a list of objects, or {{"data": [...]}}')
    for number, row in enumerate(rows, 1):
        place = f"{path}, item {number}"
        yield place, _object(row, place)


def _rows_txt(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        yield f"{path}, line {number}", {"text": line}


def _rows_csv(path: Path) -> Iterator[Row]:
    """Records below the header: one that spans lines inside quotes is one."""
    limit = csv.field_size_limit(2**31 - 1)  # a sample may be longer than the default of 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = (row for row in csv.reader(file, strict=True) if row)
            header = next(records, [])
            for number, row in enumerate(records, 1):
                yield f"{path}, record {number}", dict(zip(header, row, strict=False))
    except csv.Error as error:
        raise InvalidRequest(f"{path}: is not CSV ({error}); correct it") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: is not UTF-8 text (byte {error.start}); convert it") from error
    finally:
        csv.field_size_limit(limit)


def _count_parquet(path: Path) -> int:
    """The number in the file's footer."""
    with _arrow_errors(path, "a parquet file"):
        return int(importlib.import_module("pyarrow.parquet").read_metadata(path).num_rows)


def _count_arrow(path: Path) -> int:
    return sum(batch.num_rows for batch in _batches_arrow(path))


def _batches_parquet(path: Path) -> Iterator[Any]:
    with _arrow_errors(path, "a parquet file"):
        file = importlib.import_module("pyarrow.parquet").ParquetFile(path)
        yield from file.iter_batches(batch_size=_ROWS_AT_ONCE)


def _batches_arrow(path: Path) -> Iterator[Any]:
    """Record batches of a stream, as `datasets` writes it, or of a file; nothing is copied to memory."""
    with _arrow_errors(path, "an arrow file") as arrow:
        ipc = importlib.import_module("pyarrow.ipc")
        with arrow.memory_map(str(path)) as source:
            try:
                stream = ipc.open_stream(source)
            except arrow.ArrowInvalid:
                source.seek(0)
                reader = ipc.open_file(source)
                yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                yield from stream


@contextmanager
def _arrow_errors(path: Path, kind: str) -> Iterator[Any]:
    """pyarrow; what it raises is said in a line."""
    arrow = _pyarrow(path)
    try:
        yield arrow
    except arrow.ArrowException as error:
        raise InvalidRequest(f"{path}: is not {kind} ({error})") from error


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
    except ValueError as error:  # what Python says of a number of thousands of digits
        raise InvalidRequest(f"{path}, line {number}: holds a number without end; correct the line") from error
    except RecursionError as error:
        raise InvalidRequest(f"{path}, line {number}: is nested too deeply to be read") from error


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InvalidRequest(f"{place}: must be a JSON object, not {type(row).__name__}; correct it")
    return row


_ROWS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _rows_jsonl,
    ".ndjson": _rows_jsonl,
    ".json": _rows_json,
    ".txt": _rows_txt,
    ".csv": _rows_csv,
}
_BATCHES: dict[str, Callable[[Path], Iterator[Any]]] = {".parquet": _batches_parquet, ".arrow": _batches_arrow}
_COUNTS: dict[str, Callable[[Path], int]] = {".parquet": _count_parquet, ".arrow": _count_arrow}
_FORMATS = {".ndjson": "jsonl"}
