"""What `gpu_run` found: steps and memory of both runs, the differences between them, and what of it was promised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.recover.facts import Action, Incident, Phase
from autotune.recover.plan import RunState
from autotune.values import GIB, Verdict
from benchmarks.memory_watch import Sample, is_back, within

RATE_BOUND = 1e-9  # relative: the schedule is arithmetic of steps alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A line of the trainer's own log."""

    attempt: int
    step: int
    began: float  # `time.time()`
    ended: float
    ids: tuple[int, ...]
    longest: int  # tokens
    micro_batch_size: int
    gradient_accumulation_steps: int
    loss: float
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One run of the command, bare or supervised."""

    exit_code: int | None  # None: ended at the time limit
    wall_s: float
    began: float  # `time.time()`
    samples: tuple[Sample, ...]
    steps: tuple[Step, ...] = ()
    last_lines: tuple[str, ...] = ()  # of its output, where it failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt of the supervised run: its own events, and the memory that was used meanwhile."""

    number: int
    began: float  # `time.time()`, its first word
    ended: float  # its last
    micro_batch_size: int | None
    gradient_accumulation_steps: int | None
    gradient_checkpointing: bool | None
    first_step: int | None
    most_bytes: int | None
    least_bytes_after: int | None = None  # until the next attempt's first word, or the end


@dataclass(frozen=True, slots=True)
class Promise:
    """In words with its numbers, and whether it was held."""

    text: str
    held: bool


def read_steps(path: Path) -> tuple[Step, ...]:
    if not path.exists():
        return ()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(Step(**{**line, "ids": tuple(line["ids"])}) for line in lines)


def read_events(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Of each attempt, by number."""
    files = {int(file.parent.name.rpartition("-")[2]): file for file in folder.glob("attempt-*/events.jsonl")}
    return {
        number: [json.loads(line) for line in files[number].read_text(encoding="utf-8").splitlines()]
        for number in sorted(files)
    }


def attempts_of(events: dict[int, list[dict[str, Any]]], samples: Sequence[Sample]) -> list[Attempt]:
    found = [_attempt(number, lines, samples) for number, lines in events.items() if lines]
    ends = [*(one.began for one in found[1:]), float("inf")]
    lows = [min(within(samples, one.ended, end), default=None) for one, end in zip(found, ends, strict=False)]
    return [replace(one, least_bytes_after=low) for one, low in zip(found, lows, strict=False)]


def _attempt(number: int, events: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> Attempt:
    began, ended = events[0]["time"], events[-1]["time"]
    begin = next((event for event in events if event["event"] == "begin"), {})
    return Attempt(
        number=number,
        began=began,
        ended=ended,
        micro_batch_size=begin.get("micro_batch_size"),
        gradient_accumulation_steps=begin.get("gradient_accumulation_steps"),
        gradient_checkpointing=begin.get("gradient_checkpointing"),
        first_step=begin.get("step"),
        most_bytes=max(within(samples, began, ended), default=None),
    )


def recovery_s(attempts: Sequence[Attempt], steps: Sequence[Step]) -> float | None:
    """From the first death to the end of the first step after it."""
    after = [step.ended for step in steps if attempts and step.began > attempts[0].ended]
    return min(after) - attempts[0].ended if after else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Both runs, step by step: of a step taken twice the last time."""

    steps: tuple[int, int]  # bare, supervised
    same_samples: bool
    effective_batch_sizes: tuple[int, ...]  # all that were seen
    rate_difference: float | None  # largest, relative
    loss_difference: float | None  # largest, relative
    loss_difference_at: int | None


def compare(bare: Sequence[Step], supervised: Sequence[Step]) -> Compared:
    ours, theirs = ({step.step: step for step in steps} for steps in (supervised, bare))
    both = sorted(ours.keys() & theirs.keys())
    losses = {number: _difference(ours[number].loss, theirs[number].loss) for number in both}
    worst = max(losses, key=lambda number: losses[number], default=None)
    batches = {step.micro_batch_size * step.gradient_accumulation_steps for step in (*bare, *supervised)}
    return Compared(
        steps=(len(theirs), len(ours)),
        same_samples=ours.keys() == theirs.keys() and all(ours[one].ids == theirs[one].ids for one in both),
        effective_batch_sizes=tuple(sorted(batches)),
        rate_difference=max(
            (_difference(ours[one].learning_rate, theirs[one].learning_rate) for one in both), default=None
        ),
        loss_difference=None if worst is None else losses[worst],
        loss_difference_at=worst,
    )


def _difference(found: float, wanted: float) -> float:
    return abs(found - wanted) / abs(wanted) if wanted else abs(found)


# What was promised


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the runs were to do."""

    steps: int
    long_at_step: int
    effective_batch_size: int
    limit_bytes: int
    loss_bound: float
    is_card: bool


def promises(
    asked: Asked, bare: Ran, supervised: Ran, attempts: Sequence[Attempt], state: RunState | None
) -> list[Promise]:
    incidents = state.incidents if state else ()
    found = compare(bare.steps, supervised.steps)
    rate, loss = found.rate_difference, found.loss_difference
    return [
        Promise(f"undisturbed: {_end(bare)}, {found.steps[0]} of {asked.steps} steps", _is_whole(bare, asked)),
        Promise(
            f"supervised: {_end(supervised)}, {found.steps[1]} of {asked.steps} steps", _is_whole(supervised, asked)
        ),
        Promise(
            f"out of memory on the long batch in step {asked.long_at_step}, and recovered: {_deaths(incidents)}",
            bool(incidents) and all(_is_expected(one, asked) for one in incidents),
        ),
        _memory_returned(supervised, attempts),
        *([_limit_kept(asked, supervised, attempts)] if asked.is_card else []),
        Promise(
            f"effective batch size {asked.effective_batch_size}: {', '.join(map(str, found.effective_batch_sizes))}",
            found.effective_batch_sizes == (asked.effective_batch_size,),
        ),
        Promise("the same samples in the same steps, in the same order", found.same_samples),
        Promise(
            f"learning rates: largest difference {_number(rate)} (bound {RATE_BOUND:g})",
            rate is not None and rate <= RATE_BOUND,
        ),
        Promise(
            f"losses: largest difference {_number(loss)}, in step {found.loss_difference_at}"
            f" (bound {asked.loss_bound:g})",
            loss is not None and loss <= asked.loss_bound,
        ),
    ]


def _is_whole(ran: Ran, asked: Asked) -> bool:
    return ran.exit_code == 0 and {step.step for step in ran.steps} == set(range(1, asked.steps + 1))


def _end(ran: Ran) -> str:
    return "ended at the time limit" if ran.exit_code is None else f"exit code {ran.exit_code}"


def _is_expected(one: Incident, asked: Asked) -> bool:
    return (
        one.judgement.verdict is Verdict.DEVICE_OOM
        and one.phase is Phase.TRAIN
        and one.step == asked.long_at_step - 1
        and one.decision.action is Action.STEP_DOWN
    )


def _deaths(incidents: Sequence[Incident]) -> str:
    words = [
        f"{one.judgement.verdict} in {one.phase} after step {one.step}, {one.decision.action}" for one in incidents
    ]
    return "; ".join(words) or "no incident"


def _memory_returned(supervised: Ran, attempts: Sequence[Attempt]) -> Promise:
    """Between attempts and after the last: no more than before the first."""
    before = min(within(supervised.samples, 0, attempts[0].began), default=None) if attempts else None
    lows = [one.least_bytes_after for one in attempts]
    known = [low for low in lows if low is not None]
    held = before is not None and len(known) == len(lows) > 1 and all(is_back(low, before) for low in known)
    parts = [f"before {_gib(before)}"]
    for one in attempts:
        parts.append(f"attempt {one.number} {_gib(one.most_bytes)}, then {_gib(one.least_bytes_after)}")
    return Promise(f"memory in use returned: {', '.join(parts)}", held)


def _limit_kept(asked: Asked, supervised: Ran, attempts: Sequence[Attempt]) -> Promise:
    before = min(within(supervised.samples, 0, attempts[0].began), default=None) if attempts else None
    most = max((one.most_bytes for one in attempts if one.most_bytes is not None), default=None)
    taken = None if before is None or most is None else most - before
    return Promise(
        f"took at most {_gib(taken)} of {_gib(asked.limit_bytes)}", taken is not None and taken <= asked.limit_bytes
    )


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{size / GIB:.2f} GiB"


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1e}"
