"""What other tools do to find a batch that runs, try for try, each over its own knob: the micro batch. Pure.

Each is a generator: it yields the batch to run, is sent what the run gave, and returns the batch that the tool ends
with; None where it gives up. Read from the projects' own code: accelerate 1.9 and before it, Lightning 2.6.2,
DeepSpeed 0.16.5, Composer 0.33, neuracore's and OTX's batch finders of 2026.

`most` is the whole effective batch, where a tool is told one: nothing above it is tried, and a success there ends the
search. Without it a tool does what it does by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What running one batch gave."""

    fits: bool
    memory: float = 0.0  # reserved at the peak, a fraction of the device's memory
    speed: float = 0.0  # samples per second


Tries: TypeAlias = Generator[int, Run, int | None]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a tool ran and what it ended with."""

    runs: tuple[tuple[int, Run], ...]
    batch: int | None

    @property
    def was_run(self) -> bool:
        """Whether the batch it ended with ran in one of its own tries."""
        return any(batch == self.batch and run.fits for batch, run in self.runs)


def follow(tries: Tries, answer: Callable[[int], Run]) -> Finding:
    """Run a tool to its end, with `answer` for its runs."""
    runs: list[tuple[int, Run]] = []
    try:
        batch = next(tries)
        while True:
            run = answer(batch)
            runs.append((batch, run))
            batch = tries.send(run)
    except StopIteration as end:
        return Finding(tuple(runs), end.value)


def _capped(batch: int, most: int | None) -> int:
    return batch if most is None else min(batch, most)


def accelerate(most: int | None = None, *, start: int = 128) -> Tries:
    """`find_executable_batch_size`: a tenth less after each failure. HF Trainer starts at its own batch, 8."""
    batch = _capped(start, most)
    while batch > 0:
        if (yield batch).fits:
            return batch
        batch = int(0.9 * batch)
    return None


def halving(most: int | None = None, *, start: int = 128) -> Tries:
    """The same before accelerate 1.9: half after each failure."""
    batch = _capped(start, most)
    while batch > 0:
        if (yield batch).fits:
            return batch
        batch //= 2
    return None


def composer(most: int | None = None, *, start: int = 128) -> Tries:
    """`device_train_microbatch_size="auto"`: from the loader's batch down by halves, never up again."""
    batch = _capped(start, most)
    while not (yield batch).fits:
        if batch == 1:
            return None
        batch = max(batch // 2, 1)
    return batch


def lightning_power(
    most: int | None = None, *, max_trials: int = 25, max_value: int = 8192, dataset: int | None = None
) -> Tries:
    """`BatchSizeFinder(mode="power")`: doubled while it runs.

    At `max_value` it returns the next size without running it, and out of memory at the data set's size or above it
    returns the size that failed.
    """
    batch, best = _capped(2, most), None
    for _ in range(max_trials):
        if (yield batch).fits:
            best = batch
            if batch == most or (dataset is not None and batch >= dataset):
                return batch
            batch = _capped(batch * 2, most)
            if batch >= max_value:
                return batch
        elif dataset is not None and batch >= dataset:
            return batch
        elif best is not None:
            return best
        elif batch == 1:
            return None
        else:
            batch //= 2
    return best


def lightning_binsearch(most: int | None = None, *, max_trials: int = 25, margin: float = 0.05) -> Tries:
    """`BatchSizeFinder(mode="binsearch")`: doubled, then halved in between; 5 % taken off what was found.

    A first size of 2 that fails makes it return 1 without running it.
    """
    batch, low, high = _capped(2, most), 1, None
    succeeded = 0
    while succeeded < max_trials:
        if (yield batch).fits:
            low, succeeded = batch, succeeded + 1
            if batch == most:
                break
            if high is None:
                batch = _capped(batch * 2, most)
                continue
            if high - low <= 1:
                break
        else:
            high = batch
            if high - low <= 1:
                batch = low
                break
        batch = (low + high) // 2
    return max(1, int((1 - margin) * min(batch, low)))


def deepspeed_fast(most: int | None = None, *, estimate: int, most_by_default: int = 1024, gain: float = 0.05) -> Tries:
    """Autotuning's fast mode in one ZeRO stage; `estimate` is the batch that it reckons the memory holds.

    The first run is its profile of one sample. A batch that ran, or failed, is not run again.
    """
    told, most = most, most_by_default if most is None else min(most, most_by_default)
    if not (yield 1).fits:
        return None
    known: dict[int, Run] = {1: (yield 1)}
    if not known[1].fits:
        return None
    largest = min(estimate, most)
    found = 1
    for batch in (math.ceil(1.05 * largest), largest, int(0.95 * largest)):
        if batch > most or batch < 1:
            continue
        if batch not in known:
            known[batch] = yield batch
        if known[batch].fits:
            found = batch
            break
    else:
        found = yield from _between(known, largest, gain)
    wanted = told or found  # the train batch: the user's, else the largest that runs
    smallest = max(1, found // 2)
    stride = max(1, (found - smallest) // 3)
    candidates = [size for size in range(smallest, found, stride) if wanted // size != wanted // found]
    for batch in [*candidates, found]:
        if batch not in known:
            known[batch] = yield batch
    best = max((size for size, run in known.items() if run.fits), key=lambda size: known[size].speed)
    alike = (candidates[-1] if candidates else 0) + 1  # up to here accumulation stays the same
    stride = max(1, (found - alike) // 3)
    for batch in [*range(alike, found, stride)][::-1][:1]:  # it compares a stale number, so it never goes further
        if batch not in known:
            yield batch
    return best


def _between(known: dict[int, Run], high: int, gain: float) -> Generator[int, Run, int]:
    """Its binary search: the largest batch that runs, or the first that gains too little over the last that ran."""
    low, last = 1, known[1].speed
    while low <= high:
        middle = (low + high) // 2
        fresh = middle not in known
        if fresh:
            known[middle] = yield middle
        if not known[middle].fits:
            high = middle - 1
            continue
        low = middle + 1
        if fresh and last and (known[middle].speed - last) / last < gain:
            break
        last = known[middle].speed
    return low - 1


def neuracore(most: int | None = None, *, most_by_default: int = 512, target: float = 0.9, kept: float = 0.7) -> Tries:
    """A line through reserved memory: one sample, eight, half of what these predict; then the size at 90 %.

    A tenth less after each failure, and 0.7 of what ran is returned: without running that.
    """
    most = most_by_default if most is None else min(most, most_by_default)
    points = {1: (yield 1)}
    if not points[1].fits:
        return None
    second = min(8, most)
    if second not in points:
        points[second] = yield second
    if not points[second].fits:
        found = yield from _less(points, int(0.9 * second))
        return max(1, int(kept * found))
    third = _reaching(points, 1, second, target, most) // 2
    while third > second:
        points[third] = yield third
        if points[third].fits:
            break
        third = math.isqrt(second * third)
    ran = sorted(size for size, run in points.items() if run.fits)
    batch = _reaching(points, ran[-2], ran[-1], target, most) if len(ran) > 1 else ran[-1]
    found = yield from _less(points, batch)
    return max(1, int(kept * found))


def _less(points: dict[int, Run], batch: int) -> Generator[int, Run, int]:
    """The first batch of this one, a tenth less, … that runs."""
    while batch > 1:
        if batch not in points:
            points[batch] = yield batch
        if points[batch].fits:
            return batch
        batch = int(0.9 * batch)
    return 1


def _reaching(points: dict[int, Run], low: int, high: int, target: float, most: int) -> int:
    """The batch at which the line through two points reaches a fraction of the memory."""
    slope = (points[high].memory - points[low].memory) / max(1, high - low)
    if slope <= 0:
        return most
    return max(1, min(most, int(high + (target - points[high].memory) / slope)))


def otx(
    most: int | None = None, *, start: int = 8, target: float = 0.82, band: tuple[float, float] = (0.8, 0.85)
) -> Tries:
    """`BsSearchAlgo`: even sizes; the default, two more, then a straight line to 82 % of the memory."""
    start = _capped(start, most)
    ran: dict[int, float] = {}
    first = yield start
    if not first.fits or first.memory > band[1]:
        return (yield from _otx_down(start - 2, band[1]))
    ran[start] = first.memory
    if most is not None and start + 2 > most:
        return start
    second = yield start + 2
    if not second.fits or second.memory > band[1]:
        return start
    ran[start + 2] = second.memory
    aim, failed = target, set[int]()
    while True:
        batch = _otx_line(ran, aim, most)
        if batch in ran:
            return batch
        run = Run(fits=False) if batch in failed else (yield batch)
        if not run.fits:
            failed.add(batch)
            aim -= 0.1
            if aim <= 0:
                return start + 2
            continue
        ran[batch] = run.memory
        if band[0] <= run.memory <= band[1]:
            return batch
        aim = target


def _otx_line(ran: dict[int, float], aim: float, most: int | None) -> int:
    """The even batch at which the line through the smallest and the largest run reaches a fraction of the memory."""
    low, high = min(ran), max(ran)
    slope = (ran[high] - ran[low]) / (high - low)
    batch = high if slope <= 0 else round((high + (aim - ran[high]) / slope) / 2) * 2
    return _capped(max(low, batch), most)


def _otx_down(start: int, upper: float) -> Tries:
    """Halves between what runs below the band's upper end and what does not, to a difference of 2."""
    if start <= 0:
        return None
    ran, failed, batch = 0, start + 2, start
    while True:
        run = yield batch
        if run.fits and run.memory <= upper:
            ran = batch
            batch = _even_middle(batch, failed)
        else:
            failed = min(failed, batch)
            batch = _even_middle(batch, ran)
        if failed - ran <= 2:
            break
    if ran:
        return ran
    return 2 if run.fits else None


def _even_middle(one: int, other: int) -> int:
    middle = (one + other) // 2
    return middle + middle % 2
