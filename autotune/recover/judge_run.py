"""What the end of an attempt means: its facts as a report, judged by the rules that probes are judged by."""

from __future__ import annotations

from autotune.recover.facts import Death, Ended, EndedBy, Phase, Progress
from autotune.values import Failure, Judgement, ProbeReport, Verdict
from autotune.verdict.actions import action_for, gib
from autotune.verdict.judge import Evidence, classify

#: In a probe's words. A run's memory limit holds from the start of its process, so nothing is "start" or "import".
_PHASES = {
    Phase.START: "build",
    Phase.LOAD: "build",
    Phase.TRAIN: "forward",
    Phase.EVALUATE: "evaluate",
    Phase.SAVE: "checkpoint",
    Phase.DONE: "done",
}
_OURS = (EndedBy.RANK, EndedBy.STALL, EndedBy.START_LIMIT, EndedBy.SPILL)  # its signal says nothing: we sent it


def judge(
    ended: Ended,
    *,
    target: str,
    limit_bytes: int | None = None,
    device_total_bytes: int | None = None,
    evidence: Evidence | None = None,
    before: Evidence | None = None,
) -> Judgement:
    """Judge one attempt on `target` ("cpu" or "cuda"), by its own words first, then by how it ended.

    The words are those of the rank that died first; what other ranks printed counts where those do not decide.
    On the CPU a lack of memory is the device's under a limit, and the host's without one.
    """
    if ended.ended_by is EndedBy.USER:
        return _plain(Verdict.INTERRUPTED, "stopped by the user")
    if is_finished(ended):
        return _finished(ended)
    if ended.exit_code is None and ended.signal is None and ended.ended_by is EndedBy.ITSELF:
        return _plain(Verdict.NOT_OOM, "the command could not be started")

    def classified(tail: str) -> Judgement:
        return classify(
            report_of(ended, tail=tail),
            target=target,
            limit_bytes=limit_bytes,
            device_total_bytes=device_total_bytes,
            evidence=evidence,
            before=before,
            spilled=ended.ended_by is EndedBy.SPILL,
        )

    several = (ended.progress.world_size or 1) > 1 or ended.ended_by is EndedBy.RANK
    judged = classified("" if several and _said(ended.death) else ended.tail)
    if judged.verdict is Verdict.AMBIGUOUS and several:
        judged = classified(ended.tail)
    if target.startswith("cpu") and limit_bytes is None and judged.verdict is Verdict.DEVICE_OOM:
        action = action_for(Verdict.HOST_OOM, None)
        return Judgement(
            verdict=Verdict.HOST_OOM, evidence=judged.evidence, action=action, numbers=dict(judged.numbers)
        )
    return judged


def is_finished(ended: Ended) -> bool:
    """Whether the command ended well: exit code 0, and no death reported that it merely swallowed."""
    if ended.ended_by is not EndedBy.ITSELF or ended.exit_code != 0 or ended.signal is not None:
        return False
    return not _said(ended.death) or _went_on(ended.progress, ended.death)


def report_of(ended: Ended, *, tail: str | None = None) -> ProbeReport:
    """What is known of an attempt in a probe's terms. `tail` replaces the end of its output."""
    said, progress = _said(ended.death), ended.progress
    consequence = said or ended.ended_by in _OURS
    return ProbeReport(
        micro_batch_times_s=progress.micro_batch_times_s,
        loss=progress.loss,
        peak_allocated_bytes=progress.peak_allocated_bytes,
        peak_reserved_bytes=progress.peak_reserved_bytes,
        device_used_bytes=None,  # a launcher's whole tree may be on several cards: not compared with one
        failure=None if is_finished(ended) else _failure(ended),
        exit_code=1 if consequence else ended.exit_code,
        signal=None if consequence else ended.signal,
        pid=ended.pid,
        log_tail=ended.tail if tail is None else tail,
        wall_time_s=ended.wall_time_s,
    )


def _said(death: Death | None) -> bool:
    return death is not None and death.exception is not None


def _went_on(progress: Progress, death: Death | None) -> bool:
    """Whether training ended, or took further steps, after what the trainer had reported as its death."""
    if progress.phase is Phase.DONE or (progress.max_steps is not None and (progress.step or 0) >= progress.max_steps):
        return True
    return death is not None and (progress.step or 0) > (death.step or 0)


def _failure(ended: Ended) -> Failure:
    """Its end as a probe's failure; at a limit of ours only where it had not died before of something else."""
    death, phase = ended.death, _PHASES[ended.phase]
    if death is not None and death.part == "optimizer":
        phase = "optimizer"
    if _said(death) and death is not None:
        return Failure(phase=phase, exception=death.exception, message=death.message, traceback=death.traceback)
    stalled = {
        EndedBy.STALL: "no progress for longer than a step may take",
        EndedBy.START_LIMIT: "no first step within the time limit of its start",
    }.get(ended.ended_by)
    where = "" if ended.progress.step is None else f", step {ended.progress.step:,} was its last"
    return Failure(phase=phase, message=f"{stalled}{where}" if stalled else "", at_limit=stalled is not None)


def _finished(ended: Ended) -> Judgement:
    progress, lines = ended.progress, ["the command ended with exit code 0"]
    if progress.steps:
        lines.append(f"{progress.steps:,} optimizer steps ran in this attempt")
    if progress.peak_allocated_bytes is not None:
        lines.append(f"peak of live tensors {gib(progress.peak_allocated_bytes)}")
    return _plain(Verdict.FITS, *lines)


def _plain(verdict: Verdict, *evidence: str) -> Judgement:
    return Judgement(verdict=verdict, evidence=evidence, action=action_for(verdict, None))
