"""What a trainer has told of itself: lines of `events.jsonl` folded into its progress and the death that came first."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autotune.recover.facts import Batch, Death, Phase, Progress

Event = Mapping[str, Any]

NEWEST = 50  # steps that a pace is of
_KEPT = 500  # steps that the run's own median is of
_PIDS = 16  # that are kept for each rank
_LINE_BYTES = 4 * 2**20  # a longer line is not one of ours

#: What a rank says that died only because another one had: its peer is gone, or it was told to end.
_CONSEQUENCE = re.compile(
    r"\bNCCL|\bgloo\b|DistBackendError|DistNetworkError|DistStoreError|ProcessGroup|\bpeers?\b|Broken pipe"
    r"|watchdog|SIGTERM|SIGINT|SignalException|KeyboardInterrupt|SystemExit|ChildFailedError",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """All that was told so far. Steps are those of the lowest rank that tells any; deaths are of every rank."""

    progress: Progress = field(default_factory=Progress)
    deaths: tuple[tuple[float, bool, Death], ...] = ()  # when, whether of memory, what it said
    pids: tuple[tuple[int, int], ...] = ()  # (rank, pid) of all that told anything
    begun: bool = False  # training has begun
    ended: bool = False  # training has come to its end
    lead: int | None = None  # the rank whose steps are told
    step_times_s: tuple[float, ...] = ()  # newest 500
    step_tokens: tuple[int | None, ...] = ()  # newest 50

    @property
    def death(self) -> Death | None:
        """Of several deaths the cause: the first out-of-memory or other error that is no mere consequence."""
        if not self.deaths:
            return None
        in_order = sorted(self.deaths, key=lambda found: found[0])
        causes = [death for _, oom, death in in_order if oom or not is_consequence(death)]
        return causes[0] if causes else in_order[0][2]

    @property
    def is_distributed(self) -> bool:
        return len({rank for rank, _ in self.pids}) > 1


def is_consequence(death: Death) -> bool:
    """Whether it says no more than that another rank, or the user, ended it."""
    return bool(_CONSEQUENCE.search(f"{death.exception or ''}: {death.message}"))


def fold(told: Told, event: Event) -> Told:
    """What is known after one more event. One that is not understood changes nothing."""
    change = _FOLDS.get(str(event.get("event")))
    if change is None:
        return told
    rank = _whole(event, "rank") or 0
    told = replace(told, pids=_with_pid(told.pids, rank, _whole(event, "pid")))
    now = _number(event, "time")
    told = _with(told, reporting=True, updated_at=now if now is not None else told.progress.updated_at)
    return change(told, event, rank)


def fold_all(told: Told, events: Iterable[Event]) -> Told:
    for event in events:
        told = fold(told, event)
    return told


def _start(told: Told, event: Event, rank: int) -> Told:
    told = replace(told, deaths=tuple(found for found in told.deaths if found[2].rank != rank))  # it lives again
    versions = event.get("versions")
    if not isinstance(versions, dict):
        return told
    return _with(told, versions={**told.progress.versions, **{str(k): str(v) for k, v in versions.items()}})


def _phase(told: Told, event: Event, rank: int) -> Told:
    phase = _phase_of(event)
    if phase is None or (told.lead is not None and rank > told.lead):
        return told
    return _with(told, phase=phase)


def _begin(told: Told, event: Event, rank: int) -> Told:
    """Training begins. Where this rank had died before, the script itself tries again: deaths until then are void."""
    if any(death.rank == rank for _, _, death in told.deaths):
        told = replace(told, deaths=())
    if told.lead is not None and rank > told.lead:
        return told
    step = _whole(event, "step")
    told = replace(told, begun=True, ended=False, lead=rank, step_times_s=(), step_tokens=())
    return _with(
        told,
        phase=Phase.TRAIN,
        first_step=step,
        step=step,
        steps=0,
        max_steps=_whole(event, "max_steps"),
        micro_batch_size=_whole(event, "micro_batch_size"),
        gradient_accumulation_steps=_whole(event, "gradient_accumulation_steps"),
        world_size=_whole(event, "world_size"),
        eval_micro_batch_size=_whole(event, "eval_micro_batch_size"),
        gradient_checkpointing=_truth(event, "gradient_checkpointing"),
        device_total_bytes=_whole(event, "device_total_bytes"),
        dataset_longest=_whole(event, "dataset_longest"),
        output_dir=_text(event, "output_dir"),
        save_strategy=_text(event, "save_strategy"),
        step_time_s=None,
        tokens_per_second=None,
        micro_batch_times_s=(),
    )


def _step(told: Told, event: Event, rank: int) -> Told:
    told = _with_memory(told, event)
    step = _whole(event, "step")
    before = told.progress.step
    if step is None or (told.lead is not None and rank > told.lead) or (before is not None and step <= before):
        return told
    told = replace(told, begun=True, lead=rank)
    told = _with(told, step=step, steps=told.progress.steps + 1, phase=Phase.TRAIN)
    if told.progress.first_step is None:  # begun without saying so
        told = _with(told, first_step=step - 1)
    return _with_pace(_with_batches(told, event), event)


def _with_pace(told: Told, event: Event) -> Told:
    seconds = _number(event, "seconds")
    if seconds is None or seconds <= 0:
        return told
    times = (*told.step_times_s, seconds)[-_KEPT:]
    tokens = (*told.step_tokens, _whole(event, "tokens"))[-NEWEST:]
    newest = times[-len(tokens) :]
    known = [count for count in tokens if count is not None]
    ranks = told.progress.world_size or 1
    pace = sum(known) * ranks / sum(newest) if len(known) == len(tokens) else None
    told = replace(told, step_times_s=times, step_tokens=tokens)
    return _with(told, step_time_s=statistics.median(newest), tokens_per_second=pace)


def _with_batches(told: Told, event: Event) -> Told:
    progress = told.progress
    times = event.get("micro_batches")
    found = tuple(float(t) for t in times if _is_number(t)) if isinstance(times, list) else ()
    loss = _number(event, "loss")
    return _with(
        told,
        micro_batch_times_s=(*progress.micro_batch_times_s, *found)[-NEWEST:],
        loss=loss if loss is not None else progress.loss,
        longest_seen=_longer(progress.longest_seen, _batch(event, "longest")),
    )


def _with_memory(told: Told, event: Event) -> Told:
    """Peaks over all ranks: each has a card of its own, and the fullest one decides."""
    progress = told.progress
    return _with(
        told,
        peak_allocated_bytes=_most(progress.peak_allocated_bytes, _whole(event, "allocated")),
        peak_reserved_bytes=_most(progress.peak_reserved_bytes, _whole(event, "reserved")),
    )


def _saved(told: Told, event: Event, rank: int) -> Told:
    path = _text(event, "path")
    return told if path is None else _with(told, checkpoint=path, checkpoint_step=_whole(event, "step"))


def _died(told: Told, event: Event, rank: int) -> Told:
    death = Death(
        rank=rank,
        exception=_text(event, "exception"),
        message=_text(event, "message") or "",
        traceback=_text(event, "traceback") or "",
        phase=_phase_of(event),
        batch=_batch(event, "batch"),
        step=_whole(event, "step"),
        part=_text(event, "part"),
        saved=_text(event, "saved"),
    )
    others = tuple(found for found in told.deaths if found[2].rank != rank)
    return replace(told, deaths=(*others, (_number(event, "time") or 0.0, event.get("oom") is True, death)))


def _end(told: Told, event: Event, rank: int) -> Told:
    return told if told.lead is not None and rank > told.lead else replace(told, ended=True)


_FOLDS: dict[str, Callable[[Told, Event, int], Told]] = {
    "start": _start,
    "phase": _phase,
    "begin": _begin,
    "step": _step,
    "saved": _saved,
    "died": _died,
    "end": _end,
}


def _with(told: Told, **changes: Any) -> Told:
    return replace(told, progress=replace(told.progress, **changes))


def _with_pid(pids: tuple[tuple[int, int], ...], rank: int, pid: int | None) -> tuple[tuple[int, int], ...]:
    """A rank's first process and its newest: data workers that import the trainer speak for it too."""
    if pid is None or (rank, pid) in pids:
        return pids
    own = [known for known in pids if known[0] == rank]
    kept = own if len(own) < _PIDS else [own[0], *own[-_PIDS + 2 :]]
    return (*(known for known in pids if known[0] != rank), *kept, (rank, pid))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2.0**63


def _number(event: Event, name: str) -> float | None:
    value = event.get(name)
    return float(value) if value is not None and _is_number(value) else None


def _whole(event: Event, name: str) -> int | None:
    value = _number(event, name)
    return None if value is None else int(value)


def _truth(event: Event, name: str) -> bool | None:
    value = event.get(name)
    return value if isinstance(value, bool) else None


def _text(event: Event, name: str) -> str | None:
    value = event.get(name)
    return value if isinstance(value, str) else None


def _phase_of(event: Event) -> Phase | None:
    value = event.get("phase")
    return Phase(value) if value in tuple(Phase) else None


def _batch(event: Event, name: str) -> Batch | None:
    value = event.get(name)
    if not isinstance(value, dict):
        return None
    samples, tokens = _whole(value, "samples"), _whole(value, "tokens")
    return None if samples is None or tokens is None else Batch(samples=samples, tokens=tokens)


def _longer(known: Batch | None, new: Batch | None) -> Batch | None:
    if known is None or new is None:
        return new or known
    return max(known, new, key=lambda batch: (batch.tokens, batch.samples))


def _most(known: int | None, new: int | None) -> int | None:
    return new if known is None else known if new is None else max(known, new)


class EventsTail:
    """Reads what was added to an events file; a line that is no event is counted and skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.garbage_lines = 0
        self._place: tuple[int, int] | None = None  # device and inode: a file that was replaced is read from its start
        self._offset = 0
        self._part = b""  # of a line that is still being written

    def read(self) -> list[Event]:
        """The new events, in order. A file that is not there, or was cut short, is no error."""
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if self._place != (facts.st_dev, facts.st_ino) or facts.st_size < self._offset:
                    self._place, self._offset, self._part = (facts.st_dev, facts.st_ino), 0, b""
                if facts.st_size == self._offset:
                    return []
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        self._offset += len(data)
        *lines, self._part = (self._part + data).split(b"\n")
        if len(self._part) > _LINE_BYTES:
            self._part = b""
            self.garbage_lines += 1
        return [event for line in lines if line.strip() and (event := self._parsed(line)) is not None]

    def _parsed(self, line: bytes) -> Event | None:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            self.garbage_lines += 1
            return None
        return event


def read_told(path: Path) -> Told:
    """All that an events file tells, at once."""
    return fold_all(Told(), EventsTail(path).read())
