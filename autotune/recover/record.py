"""What an attempt of a real run measured, as trials of the GPU database: the longest probe of all. Pure."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from dataclasses import replace

from autotune.recover.decide import taken_by_others
from autotune.recover.facts import Batch, Ended, Phase
from autotune.recover.judge_run import report_of
from autotune.search.remember import needed_bytes
from autotune.values import (
    Device,
    Environment,
    Judgement,
    ModelSource,
    Origin,
    Prediction,
    ProbeReport,
    TrainingConfig,
    TrialRecord,
    Verdict,
)
from autotune.verdict.actions import action_for, gib

_OUT_OF_MEMORY = (Verdict.DEVICE_OOM, Verdict.SPILL)
_UNIFORM = 0.98  # of the longest batch's tokens: then its time is that of the length recorded
_LEAST_STEPS = 3  # finished: Adam's state is there from the second on


def trials_of_run(
    ended: Ended,
    judgement: Judgement,
    *,
    config: TrainingConfig,
    source: ModelSource,
    device: Device,
    memory_limit_bytes: int | None,
    environment: Environment,
    time_utc: str,
    run_id: str,
    predict: Callable[[TrainingConfig], Prediction | None] = lambda config: None,
) -> tuple[TrialRecord, ...]:
    """What passed, at the longest batch seen, and what it died with, where it died of device memory in training.

    `config` is what it ran with, at the longest batch that it can meet. `memory_limit_bytes` is of the whole card
    (None: all of it); on the CPU the absolute limit of the process's data, from which what is no tensor is taken off
    where `predict` tells it apart. Nothing of its output is kept. Append them in this order.
    """
    limit, given = _limits(ended, judgement, config, device, memory_limit_bytes, predict)

    def trial(at: TrainingConfig, report: ProbeReport, judged: Judgement) -> TrialRecord:
        return TrialRecord(
            request_id=hashlib.sha256(f"run|{run_id}".encode()).hexdigest()[:16],
            model_name=source.name,
            model_fingerprint=source.fingerprint,
            device_slug=device.slug,
            config=at,
            memory_limit_bytes=given,
            report=replace(report, limit_bytes=limit),
            judgement=judged,
            environment=environment,
            origin=Origin.RUN,
            time_utc=time_utc,
            prediction=predict(at),
        )

    found = []
    passed = _at(config, ended.progress.longest_seen)
    if passed is not None and ended.progress.steps >= _LEAST_STEPS:
        found.append(trial(passed, _passed(ended, passed, on_cpu=device.kind == "cpu"), _fits(ended)))
    if judgement.verdict in _OUT_OF_MEMORY and ended.phase is Phase.TRAIN:
        found.append(trial(_died_at(config, ended), _died(ended, on_cpu=device.kind == "cpu"), judgement))
    return tuple(found)


def _at(config: TrainingConfig, batch: Batch | None) -> TrainingConfig | None:
    """The config at a batch that passed; one of fewer samples stands for as many tokens of full ones."""
    if batch is None or batch.tokens < 1 or batch.samples < 1:
        return None
    samples = min(batch.samples, config.micro_batch_size)
    return replace(config, sequence_length=max(1, batch.tokens * samples // config.micro_batch_size))


def _died_at(config: TrainingConfig, ended: Ended) -> TrainingConfig:
    """At the batch that it died on: a full one of that length needs no less. Not told: at the longest possible."""
    batch = ended.death.batch if ended.death else None
    return config if batch is None or batch.tokens < 1 else replace(config, sequence_length=batch.tokens)


def _passed(ended: Ended, config: TrainingConfig, *, on_cpu: bool) -> ProbeReport:
    progress = ended.progress
    optimizer = _optimizer_s(ended, config)
    return ProbeReport(
        phases_s={"optimizer_step": progress.step_time_s} if progress.step_time_s is not None else {},
        micro_batch_times_s=progress.micro_batch_times_s,
        optimizer_times_s=() if optimizer is None else (optimizer,),
        loss=progress.loss,
        peak_allocated_bytes=None if on_cpu else progress.peak_allocated_bytes,
        peak_reserved_bytes=None if on_cpu else progress.peak_reserved_bytes,
        device_used_bytes=ended.peak_rss_bytes if on_cpu else None,
        wall_time_s=ended.wall_time_s,
    )


def _optimizer_s(ended: Ended, config: TrainingConfig) -> float | None:
    """Seconds of a step beside its micro batches; None where batches differ in length, or ranks waited for each other:
    their times are not those of the length recorded.
    """
    progress = ended.progress
    if not progress.step_time_s or not progress.micro_batch_times_s or not progress.tokens_per_second:
        return None
    tokens = progress.tokens_per_second * progress.step_time_s
    if config.world_size > 1 or tokens < _UNIFORM * config.tokens_per_step:
        return None
    micro = config.gradient_accumulation_steps * statistics.median(progress.micro_batch_times_s)
    return max(0.0, progress.step_time_s - micro)


def _died(ended: Ended, *, on_cpu: bool) -> ProbeReport:
    """Its end, without the words around it; peaks are of the steps before, so only what is sure is kept of them."""
    report = report_of(ended, tail="")
    failure = report.failure and replace(report.failure, traceback="")
    return ProbeReport(
        peak_allocated_bytes=None if on_cpu else report.peak_allocated_bytes,
        failure=failure,
        exit_code=report.exit_code,
        signal=report.signal,
        wall_time_s=ended.wall_time_s,
    )


def _fits(ended: Ended) -> Judgement:
    progress = ended.progress
    lines = [f"{progress.steps:,} optimizer steps of a real run"]
    if progress.longest_seen:
        lines.append(f"longest batch {progress.longest_seen.samples} × {progress.longest_seen.tokens:,} tokens")
    if progress.peak_allocated_bytes is not None:
        lines.append(f"peak {gib(progress.peak_allocated_bytes)}")
    return Judgement(verdict=Verdict.FITS, evidence=tuple(lines), action=action_for(Verdict.FITS, None))


def _limits(
    ended: Ended,
    judgement: Judgement,
    config: TrainingConfig,
    device: Device,
    stated: int | None,
    predict: Callable[[TrainingConfig], Prediction | None],
) -> tuple[int | None, int | None]:
    """(what was enforced in a probe's terms, of the whole card what the run could have): less what others took."""
    if device.kind == "cpu":
        held = _beside_tensors(ended, config, predict)
        return (None if stated is None or held is None else max(0, stated - held)), stated
    total = device.total_bytes
    others = taken_by_others(ended, judgement, total)
    if others is not None and total is not None:
        stated = min(stated or total, max(0, total - others))
    return judgement.numbers.get("allowed_bytes", stated), stated


def _beside_tensors(
    ended: Ended, config: TrainingConfig, predict: Callable[[TrainingConfig], Prediction | None]
) -> int | None:
    """Of a CPU process's data what libraries and the interpreter hold; a probe's limit does not count it."""
    passed, peak = _at(config, ended.progress.longest_seen), ended.progress.peak_reserved_bytes
    expected = predict(passed) if passed is not None and peak is not None else None
    return None if expected is None or peak is None else max(0, peak - round(needed_bytes(expected)))
