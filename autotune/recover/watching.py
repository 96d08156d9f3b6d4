"""When a run that has not ended is to be ended, and what is worth a note: rules over what was told and for how long."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from autotune.recover.facts import EndedBy, Phase
from autotune.recover.progress import Told
from autotune.values import Device

_COLLAPSE_FACTOR = 3.0
_COLLAPSE_NEWEST = 20
_COLLAPSE_STEPS = 60  # before fewer, a run has no pace of its own
_FULL_FRACTION = 0.01  # of a card under WSL: with less free the driver moves memory to the host's


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptLimits:
    """How long what may take, in seconds, and how much memory a trainer may have."""

    start_s: float = 3600.0  # of silence before the first step: no output, no report
    stall_factor: float = 20.0  # times the median step time without a step, in training
    stall_floor_s: float = 600.0  # … and at least this
    quiet_phase_s: float = 3600.0  # of silence in evaluating, saving, loading
    quiet_s: float = 6 * 3600.0  # of silence from a command that reports nothing, or after its training
    rank_grace_s: float = 5.0  # from one rank's death to the end of the others
    death_grace_s: float = 120.0  # of silence from a single process that said it dies
    spill_s: float = 900.0  # for the trainer to save and stop, once its memory lies in system RAM
    grace_s: float = 30.0  # from a user's first signal to SIGKILL
    end_grace_s: float = 10.0  # from our own SIGTERM to SIGKILL
    look_s: float = 5.0  # between looks at the processes and the card
    data_bytes: int | None = None  # soft RLIMIT_DATA of the command
    memory_fraction: float | None = None  # of the card, for the CUDA allocator of each process
    context_bytes: int = 0  # of a CUDA context, which no allocator counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Ages:
    """Seconds since something was last seen, on a clock that nobody sets and that stands still while we do."""

    run_s: float  # the command was started
    output_s: float  # a byte of output; `run_s` where there was none
    report_s: float  # an event; `run_s` where there was none
    step_s: float  # a finished step, or training going on after an evaluation
    death_s: float | None = None  # a rank's word that it dies
    gone_s: float | None = None  # a rank's process was there

    @property
    def silence_s(self) -> float:
        return min(self.output_s, self.report_s)


def reason_to_end(told: Told, ages: Ages, limits: AttemptLimits) -> tuple[EndedBy, str] | None:
    """Who is to end the attempt and why, in words; None while it may go on."""
    return _rank(told, ages, limits) or _silent_death(told, ages, limits) or _too_long(told, ages, limits)


def _rank(told: Told, ages: Ages, limits: AttemptLimits) -> tuple[EndedBy, str] | None:
    """Half the grace is for the command to end by itself, half for its processes once they are told to."""
    if not told.is_distributed:
        return None
    wait_s = limits.rank_grace_s / 2
    if ages.death_s is not None and ages.death_s >= wait_s:
        rank = told.death.rank if told.death else None
        return EndedBy.RANK, f"rank {rank} died, and the others did not end"
    if ages.gone_s is not None and ages.gone_s >= wait_s and not told.ended:
        return EndedBy.RANK, "a rank's process is gone, and the others did not end"
    return None


def _silent_death(told: Told, ages: Ages, limits: AttemptLimits) -> tuple[EndedBy, str] | None:
    if told.is_distributed or ages.death_s is None:
        return None
    if min(ages.death_s, ages.silence_s) < limits.death_grace_s:
        return None
    return EndedBy.RANK, f"it had said that it dies, and was still there after {_seconds(ages.death_s)}"


def _too_long(told: Told, ages: Ages, limits: AttemptLimits) -> tuple[EndedBy, str] | None:
    progress = told.progress
    if not progress.reporting or told.ended or progress.phase is Phase.DONE:
        return _silence(EndedBy.STALL, "nothing was printed", ages.silence_s, limits.quiet_s)
    if not progress.steps:
        return _silence(EndedBy.START_LIMIT, "no first step, and nothing printed", ages.silence_s, limits.start_s)
    if progress.phase is not Phase.TRAIN:
        what = f"in phase {progress.phase} nothing was printed or reported"
        return _silence(EndedBy.STALL, what, ages.silence_s, limits.quiet_phase_s)
    limit_s = max(limits.stall_floor_s, limits.stall_factor * (progress.step_time_s or 0.0))
    what = f"no step after step {progress.step} (median {progress.step_time_s or 0.0:.3g} s)"
    return _silence(EndedBy.STALL, what, ages.step_s, limit_s)


def _silence(by: EndedBy, what: str, seconds: float, limit_s: float) -> tuple[EndedBy, str] | None:
    return (by, f"{what} for {_seconds(seconds)}") if seconds >= limit_s else None


def collapse(told: Told) -> str | None:
    """A sentence where the newest steps take three times as long as this run's do."""
    times = told.step_times_s
    if len(times) < _COLLAPSE_STEPS:
        return None
    newest, own = statistics.median(times[-_COLLAPSE_NEWEST:]), statistics.median(times)
    if newest <= _COLLAPSE_FACTOR * own:
        return None
    return f"steps take {newest / own:.1f} times as long as before: {newest:.3g} s against {own:.3g} s (medians)"


def spill(told: Told, device: Device | None, limits: AttemptLimits) -> str | None:
    """A sentence where device memory lies in system RAM: no error tells of it, and it is 10 to 100 times slower."""
    if device is None or device.kind == "cpu" or device.unified_memory or device.total_bytes is None:
        return None
    total, free = device.total_bytes, device.free_bytes
    reserved, of = told.progress.peak_reserved_bytes or 0, told.progress.device_total_bytes or total
    if reserved + limits.context_bytes > of:
        return f"the trainer holds {reserved} bytes and its context, the card has {of}"
    if free is not None and free < 0:
        return f"{total - free} bytes are in use of a card of {total}"
    if device.wsl and free is not None and free < _FULL_FRACTION * total and (slow := collapse(told)):
        return f"the card is full ({free} bytes free), and {slow}"
    return None


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"
