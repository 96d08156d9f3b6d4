"""Measured or simulated landscapes: a JSONL file of configs with what running each one gives, so that searches replay.

The first line is the header, every other line a row; `docs/landscapes.md` has each field.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeVar

from autotune.errors import InvalidRequest
from autotune.values import Device, Environment, ModelSource, Prediction, TrainingConfig, Verdict, from_json, to_json

SCHEMA = "autotune.landscape/1"
_START = f'{{"schema": "{SCHEMA}"'.encode()  # of every file that a writer began
_VERDICTS = (Verdict.FITS, Verdict.DEVICE_OOM, Verdict.SPILL)
_LONGEST = 60  # characters of a value in a message
_MOST = 1e9  # of seconds, factors and watts
_MOST_SAMPLES = 2**20  # of an optimizer step, as a fit may ask

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Of what a landscape is. Bytes are of the whole device."""

    name: str
    origin: Literal["measured", "simulated"]
    device: Device
    model: ModelSource
    start: TrainingConfig  # as a fit's request has it: wanted length, effective batch, settings
    memory_limit_bytes: int | None = None  # None: the whole device
    headroom_bytes: int = 0
    installed: tuple[str, ...] = ()  # importable optional packages
    environment: Environment | None = None
    fresh_start_s: float = 0.0  # a new process up to its first micro batch
    schema: str = SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What running one config gives."""

    config: TrainingConfig
    verdict: Verdict  # fits | device_oom | spill
    needed_bytes: int | None = None  # what the limit is compared with: whole device's use; CPU: growth of VmData
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    tried_bytes: int | None = None  # asked for by the allocation that failed
    micro_batch_times_s: tuple[float, ...] = ()  # every timed one
    optimizer_times_s: tuple[float, ...] = ()
    startup_s: float = 0.0  # of a warm probe: all that was not timed
    true_step_time_s: float | None = None  # simulated: without noise
    predicted: Prediction | None = None  # before anything was learned


@dataclass(frozen=True, slots=True, kw_only=True)
class Landscape:
    header: Header
    rows: tuple[Row, ...] = field(default=())


def read_landscape(path: Path) -> Landscape:
    """Raises `InvalidRequest`, naming the line and the field, for a file that is not what `docs/landscapes.md` says."""
    found = _parse(path, _bytes_of(path).splitlines())
    if not found.rows:
        raise InvalidRequest(f"{path} holds no rows: measure some with `autotune sweep`")
    return found


def read_begun(path: Path) -> Landscape | None:
    """What a writer has written so far: no row is no error, and a torn last line is left out. Raises as above.

    None where nothing is there yet.
    """
    whole = _whole(_bytes_of(path), path) if path.exists() else b""
    return _parse(path, whole.splitlines()) if whole else None


class LandscapeWriter:
    """Appends to a file, each line on the disk when its call returns. A torn last line is cut off first.

    Raises `InvalidRequest` where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._explained():
            self._file = path.open("ab")
            try:
                _lock(self._file, path)
                self._file.truncate(len(_whole(path.read_bytes(), path)))
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> LandscapeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._explained():  # what a full disk did not take is tried again here
            self._file.close()

    def append(self, value: Header | Row) -> None:
        """The header first, then the rows."""
        with self._explained():
            self._file.write(line_of(value))
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidRequest(
                f"{self._path} cannot be written ({error.strerror or error}): make room or choose another place"
            ) from error


def _lock(file: IO[bytes], path: Path) -> None:
    """Until it is closed; where a system or its disk has no locks, none. Raises `InvalidRequest`."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InvalidRequest(f"{path} is being written by another process: wait for it, or end it") from error
    except (ImportError, OSError):
        pass


def line_of(value: Header | Row) -> bytes:
    """A header or row as its line of a file. A device's UUID is not written."""
    data = to_json(value)
    if isinstance(value, Header):
        data = {"schema": value.schema, **data, "device": {**data["device"], "uuid": None}}
    return (json.dumps(data, allow_nan=False) + "\n").encode()


# One landscape as others


def problems(landscape: Landscape) -> list[Landscape]:
    """One landscape for each sequence length that has rows, ascending: a request wants one length."""
    lengths = sorted({row.config.sequence_length for row in landscape.rows})
    return [_at_length(landscape, length, alone=len(lengths) == 1) for length in lengths]


def _at_length(landscape: Landscape, length: int, *, alone: bool) -> Landscape:
    header = landscape.header
    return Landscape(
        header=replace(
            header,
            name=header.name if alone else f"{header.name} at {length:,} tokens",
            start=replace(header.start, sequence_length=length),
        ),
        rows=tuple(row for row in landscape.rows if row.config.sequence_length == length),
    )


def limited(landscape: Landscape, limit_bytes: int) -> Landscape:
    """The same under a smaller limit: what needed more, headroom added, runs out of memory.

    An allocator that gives back what it cached could still make some of these fit, so this is the careful side. Where
    one would have died is not known: what ran out has no bytes. Raises `InvalidRequest` for a larger limit, of which
    nothing is known, and for a row that fits and does not say what it needed.
    """
    header = landscape.header
    measured_under = header.memory_limit_bytes or header.device.total_bytes
    if measured_under is not None and limit_bytes > measured_under:
        raise InvalidRequest(
            f"landscape {header.name!r} was measured under {measured_under:,} bytes and says nothing of"
            f" {limit_bytes:,}: give a smaller limit"
        )
    allowed = limit_bytes - header.headroom_bytes
    return Landscape(
        header=replace(header, memory_limit_bytes=limit_bytes),
        rows=tuple(_within(row, allowed, header.name) for row in landscape.rows),
    )


def _within(row: Row, allowed_bytes: int, name: str) -> Row:
    if row.verdict is Verdict.FITS and row.needed_bytes is None:
        raise InvalidRequest(
            f"landscape {name!r} has a row that fits without needed_bytes (micro batch {row.config.micro_batch_size}):"
            " add what it needed, or give no limit"
        )
    if row.verdict is Verdict.FITS and (row.needed_bytes or 0) <= allowed_bytes:
        return row
    return Row(config=row.config, verdict=Verdict.DEVICE_OOM, startup_s=row.startup_s, predicted=row.predicted)


# Reading, strictly


def _bytes_of(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a device would be read without end
            raise InvalidRequest(f"{path} is no regular file: give a landscape, as `autotune sweep` writes them")
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be read ({error.strerror or error}): give a landscape, as `autotune sweep` writes them"
        ) from error


def _whole(data: bytes, path: Path) -> bytes:
    """Up to the last line that has its end. Raises `InvalidRequest` where that leaves nothing of another file."""
    whole = data[: data.rfind(b"\n") + 1]
    if not whole and data[: len(_START)] != _START[: len(data)]:
        raise InvalidRequest(f"{path} exists and is no landscape: give another file")
    return whole


def _parse(path: Path, lines: list[bytes]) -> Landscape:
    """The landscape of these lines; blank ones are skipped."""
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InvalidRequest(f"{path} is empty: give a landscape, as `autotune sweep` writes them")
    header = _header(*numbered[0])
    rows: list[Row] = []
    seen: dict[TrainingConfig, str] = {}
    for place, line in numbered[1:]:
        row = _row(place, line)
        if row.config in seen:
            raise InvalidRequest(f"{place}: config is the same as in {seen[row.config]}: keep one of the two rows")
        seen[row.config] = place.rpartition(", ")[2]
        rows.append(row)
    return Landscape(header=header, rows=tuple(rows))


def _header(place: str, line: bytes) -> Header:
    data = _object(place, line)
    if (schema := data.get("schema")) != SCHEMA:
        said = f"its schema is {_shown(schema)}" if "schema" in data else "it has no schema"
        raise InvalidRequest(f"{place}: {said}, not {SCHEMA!r}: give a landscape, as `autotune sweep` writes them")
    header = _value(Header, data, place)
    if header.start.effective_batch_size > _MOST_SAMPLES:
        raise InvalidRequest(f"{place}: start has more than {_MOST_SAMPLES:,} samples to an optimizer step: correct it")
    return header


def _row(place: str, line: bytes) -> Row:
    row = _value(Row, _object(place, line), place)
    if row.verdict not in _VERDICTS:
        raise InvalidRequest(f"{place}: verdict must be one of {', '.join(_VERDICTS)}, not {row.verdict.value!r}")
    for name in ("micro_batch_times_s", "optimizer_times_s"):
        times = getattr(row, name)
        if row.verdict is Verdict.FITS and not times:
            raise InvalidRequest(f"{place}: {name} is missing: a config that fits has at least one time")
        if row.verdict is Verdict.DEVICE_OOM and times:
            raise InvalidRequest(f"{place}: {name} must be empty where the verdict is device_oom")
    if not all(time > 0 for time in row.micro_batch_times_s):
        raise InvalidRequest(f"{place}: micro_batch_times_s must hold seconds above 0")
    if row.true_step_time_s == 0:
        raise InvalidRequest(f"{place}: true_step_time_s must be above 0, or null where it is not known")
    kinds = row.predicted.seconds_by_kind if row.predicted else None
    if kinds and not sum(kinds.values()) > 0:
        raise InvalidRequest(f"{place}: predicted.seconds_by_kind must add up to more than 0, or be left out")
    return row


def _object(place: str, line: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise InvalidRequest(f"{place}: {_shown(twice)} is there twice: keep one of them")
        return data

    try:
        data = json.loads(line, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{place} is not JSON: correct it, or remove the line and let `autotune sweep` measure it again"
        ) from error
    if not isinstance(data, dict):
        raise InvalidRequest(f"{place}: must be a JSON object, not {_shown(data)}: correct it")
    return data


def _value(kind: type[T], data: dict[str, Any], place: str) -> T:
    if (fault := _fault(kind, data, "")) is not None:
        raise InvalidRequest(f"{place}: {fault}")
    try:
        return from_json(kind, data)
    except (ValueError, TypeError) as error:  # what a value's own check says, with the field's name
        raise InvalidRequest(f"{place}: {error}") from error


def _fault(kind: Any, data: Any, name: str) -> str | None:
    """What is wrong with the field `name` ("" for the whole line), the first thing found; None where nothing is."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if data is None else _fault(next(arg for arg in args if arg is not type(None)), data, name)
    if origin is Literal:
        return None if data in args else f"{name} must be one of {', '.join(args)}, not {_shown(data)}"
    if origin is tuple:
        return _first(args[0], data, name) if isinstance(data, list) else f"{name} must be a list, not {_shown(data)}"
    if origin is dict:
        if not isinstance(data, dict):
            return f"{name} must be an object, not {_shown(data)}"
        return next((fault for key, item in data.items() if (fault := _fault(args[1], item, f"{name}.{key}"))), None)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _fault_of_fields(kind, data, name)
    return _fault_of_scalar(kind, data, name)


def _first(kind: Any, items: list[Any], name: str) -> str | None:
    return next((fault for i, item in enumerate(items) if (fault := _fault(kind, item, f"{name}[{i}]"))), None)


def _fault_of_fields(kind: type, data: Any, name: str) -> str | None:
    if not isinstance(data, dict):
        return f"{name} must be an object, not {_shown(data)}"
    hints, known = _hints(kind), {item.name: item for item in dataclasses.fields(kind)}
    before = f"{name}." if name else ""
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key[:_LONGEST], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}"
            return f"unknown field {before}{key[:_LONGEST]}: {hint}"
    for key, item in known.items():
        if key not in data and item.default is MISSING and item.default_factory is MISSING:
            return f"{before}{key} is missing: docs/landscapes.md lists what each line has"
    return next((fault for key in data if (fault := _fault(hints[key], data[key], f"{before}{key}"))), None)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _fault_of_scalar(kind: Any, data: Any, name: str) -> str | None:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return None if data in tuple(kind) else f"{name} must be one of {', '.join(kind)}, not {_shown(data)}"
    if kind not in _WORDS:
        return None
    number = isinstance(data, int | float) and not isinstance(data, bool)
    right = number and (kind is float or isinstance(data, int)) if kind in (int, float) else isinstance(data, kind)
    if not right:
        return f"{name} must be {_WORDS[kind]}, not {_shown(data)}"
    if number and not abs(data) < (_MOST if kind is float else 10**30):  # of nan nothing is true
        return f"{name} must be a finite number of use, not {_shown(data)}"
    if number and data < 0:
        return f"{name} must not be below 0, and is {_shown(data)}"
    return None


def _shown(value: Any) -> str:
    """A value of any size in a few characters, as JSON has it."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
