"""What a disturbed run did, by its ledger, against the undisturbed truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.fault_inject import Fault
from benchmarks.fault_ledger import Task, of

Entry = dict[str, Any]

_TRAINING = ("micro", "accumulation", "checkpointing", "optimizer")
_MEMORY = (Fault.OOM_FIRST_STEP, Fault.OOM_MID_EPOCH)
_RETRIED_NEVER = (Fault.BUG, Fault.DISK_FULL)


@dataclass(frozen=True)
class Truth:
    """What a run comes to when nothing disturbs it. A stand-in has a final state alone."""

    state: str
    losses: tuple[float, ...] = ()  # of each optimizer step
    weights: tuple[float, ...] = ()
    order: tuple[tuple[int, ...], ...] = ()  # sample ids of each optimizer step

    @classmethod
    def of_task(cls, task: Task) -> Truth:
        return cls(task.final_state())

    @classmethod
    def of_run(cls, entries: Sequence[Entry]) -> Truth:
        steps, end = of(entries, "step"), of(entries, "end")[-1]
        return cls(
            end["state"],
            tuple(step["loss"] for step in steps),
            tuple(end["weights"]),
            tuple(tuple(step["ids"]) for step in steps),
        )

    def is_that_of(self, entries: Sequence[Entry]) -> bool:
        """Whether a disturbed run came to the same: samples, order, learning rates; losses within 1e-3, relative."""
        ends = of(entries, "end")
        if not ends or ends[-1]["state"] != self.state:
            return False
        last = {step["step"]: step for step in of(entries, "step")}
        losses = [last[number].get("loss") for number in sorted(last)] if self.losses else []
        return _close(losses, self.losses) and _close(ends[-1].get("weights", ()), self.weights)


def _close(found: Sequence[Any], wanted: Sequence[float]) -> bool:
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(math.isclose(one, other, rel_tol=1e-3) for one, other in pairs)


def final_state(entries: Sequence[Entry]) -> str | None:
    """Of the attempt that came to its end; None: none did."""
    ends = of(entries, "end")
    return ends[-1]["state"] if ends else None


def steps_lost(entries: Sequence[Entry]) -> int:
    """Steps executed again although a complete checkpoint held them."""
    complete, lost = {0}, 0
    for entry in entries:
        if entry["event"] == "checkpoint":
            complete.add(entry["step"])
        elif entry["event"] == "damaged":
            complete.discard(entry["step"])
        elif entry["event"] == "begin":
            lost += max(0, max(complete) - entry["step"])
            complete = {step for step in complete if step <= entry["step"]}  # what follows is written anew
    return lost


def repeated(entries: Sequence[Entry]) -> int:
    """Steps executed more than once: what the faults cost, a checkpoint's distance each at most."""
    steps = [entry["step"] for entry in of(entries, "step")]
    return len(steps) - len(set(steps))


def wrong_recoveries(entries: Sequence[Entry], effective_batch: int) -> list[str]:
    """Each recovery that was not the one its fault calls for."""
    found = [
        f"attempt {entry['attempt']}: effective batch {entry['micro'] * entry['accumulation']}"
        for entry in of(entries, "begin")
        if entry["micro"] * entry["accumulation"] != effective_batch
    ]
    for before, after in pairwise(of(entries, "start")):
        faults = of(entries, "fault", before["attempt"])
        wrong = _wrong(before, after, Fault(faults[-1]["fault"]) if faults else None)
        found += [f"attempt {after['attempt']}: {wrong}"] if wrong else []
    return found + _overlaps(entries)


def _wrong(before: Entry, after: Entry, cause: Fault | None) -> str | None:
    trained_alike = all(before[name] == after[name] for name in _TRAINING)
    alike = trained_alike and before["evaluation"] == after["evaluation"] and before["workers"] == after["workers"]
    if cause in _RETRIED_NEVER:
        return f"tried again after {cause}" if before["launch"] == after["launch"] else None
    if cause in _MEMORY:
        return f"the same config after {cause}" if trained_alike else None
    if not trained_alike:
        return f"another training config after {cause or 'a kill from outside'}"
    if cause is Fault.OOM_EVALUATION:
        return None if after["evaluation"] < before["evaluation"] else "the same evaluation batch after it did not fit"
    if cause is Fault.HOST_OOM:
        return None if after["workers"] < before["workers"] else "as many data-loader workers after one was killed"
    if cause is Fault.WORKER_KILLED and after["workers"] <= before["workers"]:
        return None  # it may have been the kernel, for memory
    return None if alike else f"another config after {cause or 'a kill from outside'}"


def _overlaps(entries: Sequence[Entry]) -> list[str]:
    """Attempts that still trained when a later one had begun."""
    newest, found = 0, set()
    for entry in entries:
        newest = max(newest, entry["attempt"])
        if entry["attempt"] < newest:
            found.add(f"attempt {entry['attempt']} still ran beside attempt {newest}")
    return sorted(found)


def recoveries_s(entries: Sequence[Entry], launches: Sequence[float]) -> list[float]:
    """Seconds from each end to the next attempt's first step; after a kill of the supervisor, from its next launch."""
    found = []
    for before, after in pairwise(of(entries, "start")):
        steps = of(entries, "step", after["attempt"])
        last = [entry["clock"] for entry in entries if entry["attempt"] == before["attempt"]][-1]
        if steps:
            later = [clock for clock in launches if last < clock < steps[0]["clock"]]
            found.append(steps[0]["clock"] - max([last, *later]))
    return found
