"""What the facts of a probe mean. Pure: a report, what the system said, and the limit in; a judgement out."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from autotune.values import GIB, MIB, Failure, Judgement, ProbeReport, Verdict
from autotune.verdict.actions import action_for, gib, settle_for
from autotune.verdict.rules import Kind
from autotune.verdict.text import Diagnosis, diagnose, judgement_of

_NEAR_LIMIT = 0.95  # of the limit: the next allocation of a step no longer fits
_FULL_BYTES = 256 * MIB  # free on a card that is as good as full: a CUDA library's handle and workspace
_FULL_FRACTION = 0.02
_ROOMY_BYTES = 2 * GIB
_ROOMY_FRACTION = 0.2
_SLACK_BYTES = 2 * MIB  # one small segment of the caching allocator

_BEFORE_LIMIT = ("start", "import")

_SIGINT, _SIGBUS, _SIGKILL, _SIGTERM = 2, 7, 9, 15
_CRASHES = {4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 11: "SIGSEGV"}
_CHAIN = "\n\nDuring handling of the above exception, another exception occurred:\n\n"

#: XID numbers of NVIDIA's driver after which the card needs a reset (its XID catalogue): double-bit ECC, page
#: retirement, fallen off the bus, contained and uncontained ECC, GSP time-outs, unrecoverable row remapping.
_LOST_XIDS = frozenset({48, 63, 64, 74, 79, 94, 95, 109, 110, 119, 120, 136, 140, 143})
_XID = re.compile(r"\bxid\b[^\n]{0,60}?\): (\d{1,4})\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the system knows about memory at one moment. What cannot be read is None."""

    oom_kills: int | None = None  # the cgroup's count of processes killed for memory
    oom_events: int | None = None  # times the cgroup was at its limit and could not reclaim
    limit_hits: int | None = None  # allocations that met the cgroup's limit
    memory_max_bytes: int | None = None  # the cgroup's limit; None: none, or unknown
    memory_current_bytes: int | None = None
    kernel_lines: tuple[str, ...] | None = None  # kernel log: memory kills that name one of our pids
    other_kills: int | None = None  # memory kills in the kernel log that name other pids (a container's differ)
    device_lines: tuple[str, ...] | None = None  # kernel log: the GPU driver's XID lines


def classify(
    report: ProbeReport,
    *,
    target: str,
    limit_bytes: int | None = None,
    device_total_bytes: int | None = None,
    evidence: Evidence | None = None,
    before: Evidence | None = None,
    spilled: bool = False,
) -> Judgement:
    """Judge one probe.

    `target` is "cpu" or torch's name of a GPU. `limit_bytes` is the memory limit that was asked for (the report's own,
    in the allocator's terms, is preferred). `evidence` was read after the probe and `before` before it; without
    `before` a cgroup's counters prove nothing. `spilled`: counters saw device memory in system RAM.
    """
    facts = _Facts(
        report=report,
        on_cpu=target.startswith("cpu"),
        limit=report.limit_bytes if report.limit_bytes is not None else limit_bytes,
        total=device_total_bytes,
        after=evidence,
        before=before,
    )
    if spilled or facts.has_spilled:
        return _spill(facts)
    if report.failure is None and report.exit_code in (0, None) and report.signal is None:
        return _finished(report)
    return _died(facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    report: ProbeReport
    on_cpu: bool
    limit: int | None
    total: int | None
    after: Evidence | None
    before: Evidence | None

    @property
    def has_spilled(self) -> bool:
        """More device memory in use than the card has, or held than the limit allows, with no error raised."""
        if self.on_cpu or self.report.failure is not None:
            return False
        used, reserved = self.report.device_used_bytes, self.report.peak_reserved_bytes
        over_card = used is not None and self.total is not None and used > self.total
        over_limit = reserved is not None and self.limit is not None and reserved > self.limit + _SLACK_BYTES
        return over_card or over_limit

    @property
    def signal(self) -> int | None:
        """The signal that ended it, also where a shell's exit code says so."""
        code = self.report.exit_code
        if self.report.signal is not None:
            return self.report.signal
        if code is not None and (code < 0 or 128 < code < 160):
            return -code if code < 0 else code - 128
        return None

    @property
    def system_says(self) -> tuple[str, ...]:
        """Evidence that the kernel killed one of ours for memory."""
        lines = list((self.after and self.after.kernel_lines) or ())
        kills = oom_kills_between(self.before, self.after)
        if kills:
            lines.append(f"the cgroup's oom_kill count rose by {kills}")
        return tuple(lines)

    @property
    def is_near_limit(self) -> bool | None:
        """Whether the peak came within 5 % of the limit; None where either is unknown."""
        return self._is_past(_NEAR_LIMIT)

    @property
    def is_past_half(self) -> bool:
        """Whether a native library may have been refused one large request: it crashes without saying so."""
        return bool(self._is_past(0.5))

    def _is_past(self, fraction: float) -> bool | None:
        peak = self.report.peak_reserved_bytes or self.report.peak_allocated_bytes
        return None if peak is None or self.limit is None else peak >= fraction * self.limit


def oom_kills_between(before: Evidence | None, after: Evidence | None) -> int | None:
    """Processes that the cgroup's out-of-memory killer ended between two readings; None where it cannot be known."""
    if before is None or after is None or before.oom_kills is None or after.oom_kills is None:
        return None
    return max(0, after.oom_kills - before.oom_kills)


def _judgement(verdict: Verdict, *evidence: str, kind: Kind | None = None) -> Judgement:
    settle = settle_for(kind) if verdict is Verdict.AMBIGUOUS else None
    return Judgement(verdict=verdict, evidence=evidence, action=action_for(verdict, kind), settle=settle)


def _spill(facts: _Facts) -> Judgement:
    report, lines = facts.report, []
    if report.device_used_bytes is not None and facts.total is not None and report.device_used_bytes > facts.total:
        lines.append(f"{gib(report.device_used_bytes)} of device memory in use on a card of {gib(facts.total)}")
    if report.peak_reserved_bytes is not None and facts.limit is not None and report.peak_reserved_bytes > facts.limit:
        lines.append(f"the allocator held {gib(report.peak_reserved_bytes)} under a limit of {gib(facts.limit)}")
    return _judgement(Verdict.SPILL, *(lines or ["counters saw device memory in system RAM"]))


def _finished(report: ProbeReport) -> Judgement:
    """A probe that ended by itself fits, if it did what a training step does."""
    if not report.micro_batch_times_s or not report.optimizer_times_s:
        return replace(
            _judgement(Verdict.AMBIGUOUS, "it ended without an error, and no step was timed"),
            settle="the same probe once more, in a fresh process",
        )
    wrong = _not_trained(report)
    if wrong:
        return replace(
            _judgement(Verdict.NOT_OOM, wrong),
            action="Mend the training step (dtype, learning rate, gradient scaling); a smaller config does not help.",
        )
    lines = [f"{len(report.optimizer_times_s)} optimizer steps ran"]
    if report.peak_allocated_bytes is not None:
        lines.append(f"peak of live tensors {gib(report.peak_allocated_bytes)}")
    if report.skipped_steps:
        lines.append(f"the gradient scaler skipped {report.skipped_steps}, with the optimizer's state in place")
    return _judgement(Verdict.FITS, *lines)


def _not_trained(report: ProbeReport) -> str | None:
    """Why a finished probe says nothing about training: its memory or time is not that of real steps."""
    if report.loss is None or not all(map(math.isfinite, (*report.losses, report.loss))):
        return "a loss is not finite"
    if not report.optimizer_state_bytes:
        skipped = f" ({report.skipped_steps} skipped by the gradient scaler)" if report.skipped_steps else ""
        return f"the optimizer never stepped{skipped}, so its state is not in the peak"
    return None


def _died(facts: _Facts) -> Judgement:
    report, failure = facts.report, facts.report.failure
    if failure is not None and failure.at_limit:
        return _judgement(Verdict.TIMEOUT, failure.message or f"no end of phase {failure.phase} within its time limit")
    if _was_stopped(facts):
        return _judgement(Verdict.INTERRUPTED, _end(facts))
    found = diagnose(_text(report))
    lost = _lost(facts, found)
    if lost:
        return _judgement(Verdict.DEVICE_LOST, *lost, kind=Kind.LOST)
    if facts.signal == _SIGKILL:
        return _killed(facts, found)
    kind = found.chosen.kind if found.chosen else None
    raised = failure is not None and failure.exception is not None
    if not raised and facts.signal in _CRASHES and kind in (None, Kind.TALK, Kind.HANDLED, Kind.FOLLOW, Kind.ERROR):
        return _crashed(facts)
    if kind in (None, Kind.TALK, Kind.HANDLED):
        if failure is not None and raised:
            return _judgement(Verdict.NOT_OOM, f"{failure.exception}: {failure.message[:200]}", *_where(failure))
        return _unexplained(facts)
    judged = judgement_of(found)
    if facts.on_cpu and kind in (Kind.ALLOCATION, Kind.SUSPECT):
        return _at_cpu_limit(facts, judged)
    if kind in (Kind.LIBRARY, Kind.BARE) and judged.verdict is Verdict.AMBIGUOUS and not facts.on_cpu:
        judged = _by_free_memory(facts, judged, Verdict.HOST_OOM if kind is Kind.BARE else Verdict.NOT_OOM)
    if judged.verdict is Verdict.AMBIGUOUS and kind is Kind.KILL:
        return _killed(facts, found)
    return replace(judged, evidence=(*judged.evidence, *_where(failure)))


def _was_stopped(facts: _Facts) -> bool:
    failure = facts.report.failure
    name = (failure.exception or "").rpartition(".")[2] if failure else ""
    return name in ("KeyboardInterrupt", "Interrupted") or facts.signal in (_SIGINT, _SIGTERM)


def _text(report: ProbeReport) -> str:
    """All words of a death in the order of a log: what was printed, the causes from the root on, the exception."""
    failure = report.failure
    if failure is None:
        return report.log_tail
    last = failure.traceback
    if failure.exception and (not last or failure.message not in last):
        last = f"{last}\n{failure.exception}: {failure.message}"
    parts = [*reversed(failure.chain), *([last] if last else [])]
    return (
        f"{report.log_tail}\n\nTraceback (most recent call last):\n" + _CHAIN.join(parts) if parts else report.log_tail
    )


def _end(facts: _Facts) -> str:
    """How it ended, in words."""
    failure, report = facts.report.failure, facts.report
    where = f" in phase {failure.phase}" if failure else ""
    if failure is not None and failure.exception:
        return f"{failure.exception}{where}"
    if facts.signal is not None:
        return f"ended by signal {facts.signal}{where}"
    return f"exit code {report.exit_code}{where}"


def _where(failure: Failure | None) -> tuple[str, ...]:
    return (f"in phase {failure.phase}",) if failure else ()


def _lost(facts: _Facts, found: Diagnosis) -> tuple[str, ...]:
    """Evidence that the device itself is gone or broken."""
    lines = [found.chosen.evidence] if found.chosen and found.chosen.kind is Kind.LOST else []
    for line in (facts.after and facts.after.device_lines) or ():
        match = _XID.search(line)
        if match and int(match[1]) in _LOST_XIDS:
            lines.append(line)
    return tuple(lines) if not facts.on_cpu else ()


def _killed(facts: _Facts, found: Diagnosis) -> Judgement:
    """SIGKILL: the kernel's killer if it says so, else whoever."""
    said = facts.system_says
    if found.chosen is not None and found.chosen.kind is Kind.HOST_KILL:
        said = (*said, found.chosen.evidence)
    if said:
        return _judgement(Verdict.HOST_OOM, _end(facts), *said, kind=Kind.HOST_KILL)
    lines = [_end(facts)]
    others = facts.after.other_kills if facts.after else None
    if others:
        lines.append(
            f"the kernel log names {others} memory kills of other pids, as it does for a container's processes"
        )
    return _judgement(Verdict.AMBIGUOUS, *lines, kind=Kind.KILL)


def _crashed(facts: _Facts) -> Judgement:
    """A crash in native code: for lack of memory if it happened at a CPU target's limit."""
    name = _CRASHES[facts.signal or 0]
    line = f"{_end(facts)} ({name})"
    if facts.on_cpu and facts.limit is not None:
        if facts.is_near_limit:
            return _judgement(Verdict.DEVICE_OOM, line, f"the peak was within 5 % of the limit of {gib(facts.limit)}")
        if facts.is_near_limit is None or facts.is_past_half:
            peak = "not known" if facts.is_near_limit is None else "past half of the limit: one large request may fail"
            return _judgement(Verdict.AMBIGUOUS, line, f"its peak is {peak}", kind=Kind.SUSPECT)
    if facts.signal == _SIGBUS and not facts.on_cpu:
        return replace(
            _judgement(Verdict.AMBIGUOUS, line), settle="whether /dev/shm was full (df /dev/shm) at that time"
        )
    return _judgement(Verdict.NOT_OOM, line, "a crash in native code, away from any memory limit")


def _at_cpu_limit(facts: _Facts, judged: Judgement) -> Judgement:
    """On a CPU target the process's memory is the device's."""
    if facts.limit is None and judged.verdict is Verdict.AMBIGUOUS:
        return judged
    if facts.report.failure is not None and facts.report.failure.phase in _BEFORE_LIMIT:
        return judged  # the limit is set after the imports: what failed in them is the machine's memory
    held = f"under a limit of {gib(facts.limit)}" if facts.limit is not None else "with no limit but the machine's"
    return replace(
        judged,
        verdict=Verdict.DEVICE_OOM,
        evidence=(*judged.evidence, f"the device is the CPU, {held}", *_where(facts.report.failure)),
        action=action_for(Verdict.DEVICE_OOM, None),
        settle=None,
    )


def _by_free_memory(facts: _Facts, judged: Judgement, otherwise: Verdict) -> Judgement:
    """A CUDA call failed: for the card's memory if that was full, and for something else if there was plenty."""
    free = facts.report.device_free_bytes
    card = facts.total or facts.limit
    if free is None:
        return judged
    line = f"{gib(free)} was free on the card"
    if free < _FULL_BYTES or (facts.limit is not None and free < _FULL_FRACTION * facts.limit):
        return _settled(judged, Verdict.DEVICE_OOM, line)
    if free > _ROOMY_BYTES and card is not None and free > _ROOMY_FRACTION * card:
        return _settled(judged, otherwise, line)
    return replace(judged, evidence=(*judged.evidence, line))


def _settled(judged: Judgement, verdict: Verdict, line: str) -> Judgement:
    return replace(
        judged, verdict=verdict, evidence=(*judged.evidence, line), action=action_for(verdict, None), settle=None
    )


def _unexplained(facts: _Facts) -> Judgement:
    """Dead with no exception, no signal and no word about it."""
    if facts.system_says:
        return _judgement(Verdict.HOST_OOM, _end(facts), *facts.system_says, kind=Kind.HOST_KILL)
    return _judgement(Verdict.AMBIGUOUS, _end(facts), "it left no word about why")
