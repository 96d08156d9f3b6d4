"""A card's own allocator history, recorded once and replayed in the simulator: are peak allocated and reserved alike?

`python -m benchmarks.allocator_history --replay FILE`
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click

from autotune.errors import GpuUnavailable, InvalidRequest, ProbeFailed
from autotune.hardware.readers import read_machine
from autotune.hardware.select import check_memory_limit, select_device
from autotune.hardware.sizes import parse_bytes
from autotune.predict.allocator import CachingAllocator, OutOfMemory
from autotune.values import (
    GIB,
    AllocatorSetting,
    Device,
    ModelSource,
    Quantization,
    TrainingConfig,
    Upcast,
    from_json,
    to_json,
)
from autotune.workload.models import resolve_model
from benchmarks.records import circumstances, model_folder, one_line_errors, plain_table, private_roots, shareable

SCHEMA = "autotune.allocator_history/1"
BAR = 1.0  # % of the recorded peak reserved
MAX_ENTRIES = 20_000_000  # of the history; a step of an 8B model makes some 10⁵
MAX_FILE_BYTES = 4 * GIB  # unpacked
OPTIMIZER_STEPS = 2

#: What torch calls them (torch/csrc/cuda/memory_snapshot.cpp), in the order in which a file numbers them.
ACTIONS = (
    "alloc",
    "free_requested",
    "free_completed",
    "segment_alloc",
    "segment_free",
    "segment_map",
    "segment_unmap",
    "oom",
)
_GROWTH = ("segment_alloc", "segment_map")
_RELEASE = ("segment_free", "segment_unmap")
_STATISTICS = {  # of torch.cuda.memory_stats, by our names
    "max_allocated_bytes": "allocated_bytes.all.peak",
    "max_reserved_bytes": "reserved_bytes.all.peak",
    "num_alloc_retries": "num_alloc_retries",
    "num_ooms": "num_ooms",
}
_DEFAULT = TrainingConfig(
    sequence_length=1024,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    gradient_checkpointing="full",
    quantization=Quantization.NF4,
    upcast=Upcast.FP32,
)


class Event(NamedTuple):
    """One entry of a history. `size` in bytes, as asked for; a segment's as the device gave it."""

    action: str
    address: int
    size: int
    stream: int


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a file says. None: it does not say."""

    events: list[Event]
    settings: dict[str, Any] = field(default_factory=dict)  # torch's allocator_settings
    limit_bytes: int | None = None  # of set_per_process_memory_fraction
    max_allocated_bytes: int | None = None
    max_reserved_bytes: int | None = None
    num_alloc_retries: int | None = None
    reserved_before_bytes: int | None = None  # reserved when the recording began, or by events that were lost
    what: str = ""  # model and device, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What the simulator makes of a history, in bytes, with what it was told and what it left out."""

    events: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    alloc_retries: int  # found by the simulator, under the recorded limit
    releases: int  # recorded releases that it was told of: empty_cache, or a card that was full
    frees_without_alloc: int  # allocated before the recording began; ignored
    allocs_without_free: int  # an address given out twice: the free between is not in the file
    streams: int
    stopped: str | None = None  # the simulator ran out of memory where the card did not


# Replaying


def replay(history: History) -> Replay:
    """The history through the simulator with the recorded settings. Raises `InvalidRequest` for what is no history."""
    run = _Run(history)
    stopped = None
    try:
        run.all()
    except OutOfMemory as error:
        stopped = str(error)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"this history cannot be replayed: {error}") from error
    return Replay(
        events=len(history.events),
        peak_allocated_bytes=run.allocator.peak_allocated_bytes,
        peak_reserved_bytes=run.allocator.peak_reserved_bytes,
        alloc_retries=run.allocator.num_alloc_retries,
        releases=run.releases,
        frees_without_alloc=run.frees_without_alloc,
        allocs_without_free=run.allocs_without_free,
        streams=len({event.stream for event in history.events}),
        stopped=stopped,
    )


class _Run:
    """A replay under way. Events wait in `pending` until the allocator's state matters: that is much quicker.

    A block is free again when its free is completed: with streams of their own that is later than it was asked for,
    and torch's "allocated" falls at the request. A release (segments given back) before a new segment is left to the
    simulator where the recorded limit explains it, else the simulator is told.
    """

    def __init__(self, history: History) -> None:
        self.events = history.events
        self.limit = history.limit_bytes
        self.allocator = allocator_of(history)
        self.pending: list[int] = []
        self.live: dict[int, int] = {}  # address → handle
        self.handles = 0
        self.releases = self.frees_without_alloc = self.allocs_without_free = 0

    def all(self) -> None:
        at = 0
        while at < len(self.events):
            action, address, size, _ = self.events[at]
            if action == "alloc":
                self._alloc(address, size)
            elif action == "free_completed":
                self._free(address)
            elif action == "oom":
                self._oom(size)
            elif action in _RELEASE:
                at = self._release(at)
                continue
            at += 1
        self._flush()

    def _alloc(self, address: int, size: int) -> None:
        if address in self.live:
            self.allocs_without_free += 1
            self._free(address)
        self.live[address] = self.handles
        self.handles += 1
        self.pending.append(size)

    def _free(self, address: int) -> None:
        handle = self.live.pop(address, None)
        if handle is None:
            self.frees_without_alloc += 1
        else:
            self.pending.append(~handle)

    def _oom(self, size: int) -> None:
        """A request that the card refused takes no handle; trying it empties the cache, as it did there."""
        self._flush()
        if self.limit is None:
            return  # its release is in the history
        try:
            handle = self.allocator.allocate(size)
        except OutOfMemory:
            return
        self.handles = handle + 1
        self.allocator.free(handle)

    def _release(self, at: int) -> int:
        """The releases from `at` on as one; gives the index of the event after them."""
        end = at
        while end < len(self.events) and self.events[end].action in _RELEASE:
            end += 1
        self._flush()
        if end == len(self.events) or not self._is_explained(self.events[end]):
            self.allocator.empty_cache()
            self.releases += 1
        return end

    def _is_explained(self, after: Event) -> bool:
        """Whether the simulator, under the recorded limit, gives its cache back by itself at the event `after`."""
        if self.limit is None:
            return False
        grows = after.action in _GROWTH and self.allocator.reserved_bytes + after.size > self.limit
        return grows or after.action == "oom"

    def _flush(self) -> None:
        self.allocator.replay(self.pending)
        self.pending = []


def allocator_of(history: History) -> CachingAllocator:
    """A simulator with the recorded settings; those that it does not have are in `not_modelled`."""
    split = history.settings.get("max_split_size")
    is_set = isinstance(split, int) and 0 < split < 2**60  # no limit is −1, or the largest integer
    return CachingAllocator(
        limit_bytes=history.limit_bytes,
        expandable_segments=bool(history.settings.get("expandable_segments")),
        max_split_size_bytes=split if is_set else None,
    )


def not_modelled(settings: Mapping[str, Any]) -> list[str]:
    """Recorded settings that the simulator does not have and that are not at their defaults."""
    rounding = settings.get("roundup_power2_divisions")
    parts = rounding.values() if isinstance(rounding, dict) else [rounding]
    found = ["roundup_power2_divisions"] if any(part not in (None, 0, 1) for part in parts) else []
    return found + (["garbage_collection_threshold"] if settings.get("garbage_collection_threshold") else [])


def error_percent(simulated: int, recorded: int | None) -> float | None:
    """(simulated − recorded) ÷ recorded in %; None where nothing was recorded."""
    return (simulated / recorded - 1) * 100 if recorded else None


def passed(history: History, found: Replay) -> bool:
    """Whether peak reserved is within the bar, or there is none to compare with."""
    error = error_percent(found.peak_reserved_bytes, history.max_reserved_bytes)
    return found.stopped is None and (error is None or abs(error) <= BAR)


def figures(history: History, found: Replay) -> dict[str, Any]:
    """A replay beside what was recorded, as JSON: bytes and %."""
    return {
        "recorded": {name: getattr(history, name) for name in _COMPARED},
        "simulated": to_json(found),
        "allocated_error_percent": error_percent(found.peak_allocated_bytes, history.max_allocated_bytes),
        "reserved_error_percent": error_percent(found.peak_reserved_bytes, history.max_reserved_bytes),
        "not_modelled": not_modelled(history.settings),
        "bar_percent": BAR,
        "passed": passed(history, found),
    }


_COMPARED = ("max_allocated_bytes", "max_reserved_bytes", "num_alloc_retries", "reserved_before_bytes", "limit_bytes")


def report(history: History, found: Replay) -> str:
    """A table and what to know of it."""
    rows = [("peak", "simulated, MiB", "recorded, MiB", "error, %")]
    for name, simulated, recorded in (
        ("allocated", found.peak_allocated_bytes, history.max_allocated_bytes),
        ("reserved", found.peak_reserved_bytes, history.max_reserved_bytes),
    ):
        error = error_percent(simulated, recorded)
        rows.append((name, _mib(simulated), _mib(recorded), "–" if error is None else f"{error:+.3f}"))
    lines = [history.what, plain_table(rows), *_notes(history, found)]
    return "\n".join(line for line in lines if line)


def _notes(history: History, found: Replay) -> list[str]:
    retries = "unknown" if history.num_alloc_retries is None else history.num_alloc_retries
    lines = [
        f"{found.events:,} events; retries: {found.alloc_retries} simulated, {retries} recorded; the simulator was told"
        f" of {found.releases} releases"
    ]
    for number, what in (
        (found.frees_without_alloc, "frees without an allocation, made before the recording began: ignored"),
        (found.allocs_without_free, "allocations at an address in use: its free is missing"),
        (history.reserved_before_bytes, "bytes reserved before the first event: the simulator does not have them"),
        (max(0, found.streams - 1), "more streams, which the simulator takes for one"),
    ):
        lines += [f"{number:,} {what}"] if number else []
    lines += [f"not modelled: {name}" for name in not_modelled(history.settings)]
    if found.stopped:
        lines.append(f"FAIL  the simulator ran out of memory where the card did not: {found.stopped}")
    elif history.max_reserved_bytes is None:
        lines.append("No reserved memory was recorded: nothing to compare with")
    else:
        lines.append(f"{'pass' if passed(history, found) else 'FAIL'}  reserved within {BAR:g} %")
    return lines


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.2f}"


# Reading


def read_history(path: Path) -> History:
    """A recorded file, or a snapshot that torch pickled. Raises `InvalidRequest`, one line, for anything else."""
    try:
        data = _unpacked(path)
        if data.lstrip()[:1] == b"{":
            return _from_document(json.loads(data))
        return _from_snapshot(_BuiltinsOnly(io.BytesIO(data)).load())
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror or error}): give a recorded file") from error
    except _BROKEN as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidRequest(f"{path} is no allocator history: {why}") from error


_BROKEN = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    zlib.error,
)


def _unpacked(path: Path) -> bytes:
    """The file's content, gunzipped. Raises OSError, and ValueError for more than `MAX_FILE_BYTES`."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it holds more than {MAX_FILE_BYTES // GIB} GiB")
    return data


class _BuiltinsOnly(pickle.Unpickler):
    """Reads dicts, lists, tuples, sets, text, bytes, numbers, booleans and None, for which a pickle names no class."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, and a snapshot holds plain values only")


def _from_document(document: Any) -> History:
    """Of the JSON that `--record` writes."""
    if document.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {str(document.get('schema'))[:60]!r}, not {SCHEMA!r}")
    names = document["actions"]
    events = [_event(names[action], address, size, stream) for action, address, size, stream in document["events"]]
    statistics = document["statistics"]
    return History(
        events=events,
        settings=dict(document["settings"]),
        limit_bytes=_whole(document.get("limit_bytes")),
        max_allocated_bytes=_whole(statistics.get("max_allocated_bytes")),
        max_reserved_bytes=_whole(statistics.get("max_reserved_bytes")),
        num_alloc_retries=_whole(statistics.get("num_alloc_retries")),
        reserved_before_bytes=_whole(document.get("reserved_before_bytes")),
        what=f"{document['model']}, {document['device']['name']}",
    )


def _from_snapshot(snapshot: Any) -> History:
    """Of what `torch.cuda.memory._dump_snapshot` writes: the device with most events, reserved by its segments.

    It has no statistics: allocated is unknown, and so is reserved where segments were not recorded.
    """
    traces = snapshot["device_traces"]
    device = max(range(len(traces)), key=lambda index: len(traces[index]))
    events = events_of(traces[device])
    held = sum(s["total_size"] for s in snapshot.get("segments", ()) if s.get("device", device) == device)
    before, highest = reserved_of(events, held)
    return History(
        events=events,
        settings=dict(snapshot.get("allocator_settings") or {}),
        max_reserved_bytes=highest or None,
        reserved_before_bytes=before,
        what=f"device {device} of {len(traces)}",
    )


def events_of(trace: Iterable[Mapping[str, Any]]) -> list[Event]:
    """One device's entries of a snapshot; those that say nothing of memory left out. Raises ValueError, KeyError."""
    return [
        _event(entry["action"], entry.get("addr", 0), entry["size"], entry.get("stream", 0))
        for entry in trace
        if entry["action"] in ACTIONS
    ]


def _event(action: str, address: int, size: int, stream: int) -> Event:
    if action not in ACTIONS or not all(isinstance(n, int) for n in (address, size, stream)) or size < 0:
        raise ValueError(f"{str((action, address, size, stream))[:100]} is no event of an allocator")
    return Event(action, address, size, stream)


def _whole(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 0):
        raise ValueError(f"{str(value)[:60]} is no number of bytes")
    return value


def reserved_of(events: Iterable[Event], held_at_end: int) -> tuple[int, int]:
    """Bytes reserved before the first event and at the most, by the segments' own events."""
    now = most = 0
    for event in events:
        if event.action in _GROWTH:
            now += event.size
            most = max(most, now)
        elif event.action in _RELEASE:
            now -= event.size
    before = max(0, held_at_end - now)
    return before, before + most


# Recording


def record(source: ModelSource, config: TrainingConfig, device: Device, limit_bytes: int | None) -> dict[str, Any]:
    """Builds the model, takes two optimizer steps on `device` and gives the history as a document.

    Raises `GpuUnavailable` where torch has no CUDA, and what torch raises. Call it in a process of its own.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if config.allocator is not AllocatorSetting.DEFAULT:
        setting = f"{config.allocator.value}:True"
        os.environ["PYTORCH_ALLOC_CONF"] = os.environ["PYTORCH_CUDA_ALLOC_CONF"] = setting
    import torch

    if not torch.cuda.is_available():
        raise GpuUnavailable(f"torch {torch.__version__} sees no CUDA device: `autotune doctor` says why")
    torch.cuda.set_device(device.id)
    limit = _limit(limit_bytes)
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=MAX_ENTRIES)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    with tempfile.TemporaryDirectory(prefix="autotune-history-") as folder:
        step = train(source, config, device.id, folder)
        torch.cuda.synchronize()
        statistics, snapshot = torch.cuda.memory_stats(), torch.cuda.memory._snapshot()
        del step  # it lives until here: what it frees is not part of the history
    facts = {**circumstances(device), "model": source.name, "config": to_json(config), "limit_bytes": limit}
    return document_of(snapshot, statistics, {**facts, "reserved_before_bytes": before}, torch.cuda.current_device())


def _limit(limit_bytes: int | None) -> int | None:
    """Bounds what the allocator may reserve; gives the bytes that torch makes of it."""
    if limit_bytes is None:
        return None
    import torch

    _, total = torch.cuda.mem_get_info()
    fraction = min(1.0, limit_bytes / total)
    torch.cuda.set_per_process_memory_fraction(fraction)
    return int(fraction * total)


def train(source: ModelSource, config: TrainingConfig, device: str, folder: str) -> Any:
    """The project's own workload, built and stepped as a trainer does; gives the step, still alive."""
    import torch

    from autotune.workload.build import build_base
    from autotune.workload.step import TrainingStep

    step = TrainingStep(build_base(source, config, torch.device(device)), config, folder=folder)
    for _ in range(OPTIMIZER_STEPS):
        batches = step.batches(config.gradient_accumulation_steps)
        items = step.items_in(batches)
        for batch in batches:
            step.micro_batch(batch, items)
        step.optimizer_step()
    return step


def document_of(
    snapshot: Mapping[str, Any], statistics: Mapping[str, Any], facts: Mapping[str, Any], device: int
) -> dict[str, Any]:
    """A file's content: of a snapshot only what a replay needs. Raises ValueError where the history is not whole."""
    events = events_of(snapshot["device_traces"][device])
    if len(events) >= MAX_ENTRIES:
        raise ValueError(f"more than {MAX_ENTRIES:,} events: the first ones are lost")
    number = {name: index for index, name in enumerate(ACTIONS)}
    return {
        "schema": SCHEMA,
        **facts,
        "settings": dict(snapshot.get("allocator_settings") or {}),
        "statistics": {ours: statistics.get(theirs) for ours, theirs in _STATISTICS.items()},
        "actions": list(ACTIONS),
        "events": [[number[event.action], event.address, event.size, event.stream] for event in events],
    }


def write_history(path: Path, document: Mapping[str, Any], roots: Sequence[str]) -> None:
    """Gzipped JSON, whole or not at all, with no name of this machine's."""
    facts = shareable({key: value for key, value in document.items() if key != "events"}, roots)
    text = json.dumps({**facts, "events": document["events"]}, separators=(",", ":"), allow_nan=False)
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(gzip.compress(text.encode(), mtime=0))
    beside.replace(path)


# Command


@click.command()
@click.option(
    "--record",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Train on the GPU and write its history here.",
)
@click.option(
    "--replay",
    "recorded",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A recorded file, or what torch.cuda.memory._dump_snapshot wrote. Needs no GPU.",
)
@click.option("--gpu", default="auto", show_default=True, help="auto, cuda:N or a name; for --record.")
@click.option("--model", default="meta-llama/Llama-3.2-1B", show_default=True, help="For --record.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON of a training config, as records hold it; by default 2 samples of 1,024 tokens. For --record.",
)
@click.option("--memory-limit", help="What the allocator may reserve, like 12GiB. For --record.")
def command(
    target: Path | None,
    recorded: Path | None,
    gpu: str,
    model: str,
    config_file: Path | None,
    memory_limit: str | None,
) -> None:
    """Record what the CUDA caching allocator did over two optimizer steps, or replay it in the simulator.

    Exit 1 where simulated and recorded peak reserved differ by more than 1 %, 4 without a GPU to record on.

    \b
    Example:
      python -m benchmarks.allocator_history --record history.json.gz
      python -m benchmarks.allocator_history --replay history.json.gz
    """
    if (target is None) == (recorded is None):
        raise click.UsageError("give either --record FILE or --replay FILE")
    with one_line_errors():
        if recorded:
            history = read_history(recorded)
            found = replay(history)
            click.echo(report(history, found))
            sys.exit(0 if passed(history, found) else 1)
        assert target is not None
        _record_to(target, gpu, model, config_file, memory_limit)


def _record_to(target: Path, gpu: str, model: str, config_file: Path | None, memory_limit: str | None) -> None:
    device, _ = select_device(gpu, read_machine().devices)
    if device.kind not in ("cuda", "rocm"):
        raise GpuUnavailable("no GPU is visible here, and a history is a GPU's: `autotune doctor` says why")
    limit = parse_bytes(memory_limit) if memory_limit else None
    if limit is not None:
        check_memory_limit(limit, device)
    config = read_config(config_file) if config_file else _DEFAULT
    began = time.monotonic()
    source = resolve_model(model, say=_say)
    try:
        document = record(source, config, device, limit)
    except (RuntimeError, ValueError) as error:  # torch's, out of memory among them; a model that cannot be built
        raise ProbeFailed(f"nothing was recorded: {type(error).__name__}: {str(error).splitlines()[:1]}") from error
    write_history(target, document, private_roots(model_folder(model)))
    _say(f"{len(document['events']):,} events in {time.monotonic() - began:.0f} s, written to {target}.")


def read_config(path: Path) -> TrainingConfig:
    """Raises `InvalidRequest` for what is no training config."""
    try:
        return from_json(TrainingConfig, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequest(f"{path} is no training config: {error}") from error


def _say(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    command()
