"""What a fit hands back, as the JSON document of `fit --json` and the facts that a person wants beside it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autotune.values import (
    FitRequest,
    FitStatus,
    Judgement,
    ProbeReport,
    Recommendation,
    TrainingConfig,
    TrialRecord,
    Verdict,
    to_json,
)

SCHEMA = "autotune.fit/1"
_TRIED = "tried_bytes"  # in Judgement.numbers: what the allocation that failed had asked for


def fit_document(result: Recommendation) -> dict[str, Any]:
    """The document of `fit --json`: bytes and seconds, unknown is null, predicted apart from measured."""
    proof = result.proof
    return {
        "schema": SCHEMA,
        "status": result.status.value,
        "gpu": {**_device(result), "rehearsal": result.rehearsal},
        "model": {
            "name": result.request.model.name,
            "fingerprint": result.request.model.fingerprint,
            "weights": result.request.model.weights,
            "parameters": proof.report.parameters if proof else None,
            "trainable_parameters": proof.report.trainable_parameters if proof else None,
            "unquantized_bytes": proof.report.unquantized_bytes if proof else None,
        },
        "request": _request(result.request),
        "config": to_json(proof.config) if proof else None,
        "effective_batch_size": proof.config.effective_batch_size if proof else None,
        "measured": measured(proof) if proof else None,
        "predicted": to_json(proof.prediction) if proof else None,
        "headroom_bytes": headroom_bytes(result),
        "moves": to_json(result.moves),
        "frontier": [{"sequence_length": row.sequence_length, **to_json(row)} for row in result.frontier],
        "closest": _trial(closest) if (closest := closest_trial(result)) else None,
        "nothing_fits": _nothing_fits(result),
        "trials": [_trial(trial) for trial in result.trials],
        "probes": {
            "count": result.probes,
            "out_of_memory": result.out_of_memory,
            "wall_time_s": result.wall_time_s,
        },
        "from_database": result.from_database,
        "environment": to_json(proof.environment) if proof else None,
        "notes": list(result.notes),
    }


def fit_file_document(result: Recommendation) -> dict[str, Any]:
    """The same without the single trials: config, measurement, provenance."""
    document = fit_document(result)
    del document["trials"]
    return document


def measured(trial: TrialRecord) -> dict[str, Any]:
    """What a trial measured, medians with their samples."""
    report = trial.report
    return {
        "peak_allocated_bytes": report.peak_allocated_bytes,
        "peak_reserved_bytes": report.peak_reserved_bytes,
        "device_used_bytes": report.device_used_bytes,
        "limit_bytes": report.limit_bytes,
        "step_time_s": report.step_time_s(trial.config.gradient_accumulation_steps),
        "tokens_per_second": trial.tokens_per_second,
        "tokens_per_second_counts_padding": trial.counts_padding,
        "tokens_per_sample": report.tokens_per_sample,
        "timed_lengths": list(report.timed_lengths),
        "micro_batch_times_s": list(report.micro_batch_times_s),
        "optimizer_times_s": list(report.optimizer_times_s),
        "eval_time_s": report.eval_time_s,
        "loss": report.loss,
        "time_utc": trial.time_utc,
    }


def _nothing_fits(result: Recommendation) -> dict[str, Any] | None:
    """What came closest, how far it was off, and what each consent that is left is predicted to bring."""
    if result.status is not FitStatus.NOTHING_FITS:
        return None
    closest = closest_trial(result)
    return {
        "closest": _trial(closest) if closest else None,
        "missing_bytes": missing_bytes(closest.judgement, closest.report) if closest else None,
        "consents": [{**to_json(one), "origin": "predicted"} for one in result.consents],
    }


def _device(result: Recommendation) -> dict[str, Any]:
    device = to_json(result.device)
    del device["uuid"]  # local identity only
    return {"id": result.device.id, **device}


def _request(request: FitRequest) -> dict[str, Any]:
    asked: dict[str, Any] = to_json(request)
    asked["model"] = request.model.name
    asked["sequence_length"] = request.start.sequence_length
    asked["effective_batch_size"] = request.start.effective_batch_size
    return asked


def _trial(trial: TrialRecord) -> dict[str, Any]:
    return {
        "id": trial.id,
        "config": to_json(trial.config),
        "predicted": to_json(trial.prediction),
        "report": to_json(trial.report),
        "verdict": trial.judgement.verdict.value,
        "judgement": to_json(trial.judgement),
        "tokens_per_second": trial.tokens_per_second,
        "origin": trial.origin.value,
        "time_utc": trial.time_utc,
        "moves": list(trial.moves),
    }


def peak_bytes(report: ProbeReport) -> int | None:
    """What a limit is compared with: bytes reserved (CPU: growth of VmData)."""
    return report.peak_reserved_bytes if report.peak_reserved_bytes is not None else report.peak_allocated_bytes


def headroom_bytes(result: Recommendation) -> int | None:
    """Limit less peak of the proven config, in the allocator's terms."""
    if result.proof is None or result.proof.report.limit_bytes is None:
        return None
    peak = peak_bytes(result.proof.report)
    return None if peak is None else result.proof.report.limit_bytes - peak


def closest_trial(result: Recommendation) -> TrialRecord | None:
    """When nothing fits: the trial that ran out of memory with the least asked of it."""
    if result.proof is not None or not result.trials:
        return None
    failed = [trial for trial in result.trials if trial.judgement.verdict is not Verdict.FITS]
    return min(failed, key=lambda t: (t.config.sequence_length * t.config.micro_batch_size, -(t.id or 0)), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What lies just beyond the recommendation."""

    faster: str
    longer: str


def outlook(result: Recommendation, max_positions: int | None) -> Outlook | None:
    """The next faster config and how far the sequence could grow; None where nothing fits."""
    proof = result.proof
    if proof is None:
        return None
    return Outlook(faster=_faster(proof, result.trials), longer=_longer(proof, result, max_positions))


def _faster(proof: TrialRecord, trials: tuple[TrialRecord, ...]) -> str:
    larger = [t for t in trials if t.config.micro_batch_size > proof.config.micro_batch_size]
    failed = [t for t in larger if t.judgement.verdict is not Verdict.FITS]
    if not larger and proof.config.gradient_accumulation_steps > 1:
        return "a larger micro batch was not probed: it is predicted not to fit, or not to be faster"
    if not failed:
        return "no larger micro batch was faster: more memory would not help at this effective batch size"
    nearest = min(failed, key=lambda t: t.config.micro_batch_size)
    short = missing_bytes(nearest.judgement, nearest.report)
    much = f", at least {short / 2**20:,.0f} MiB more than the limit" if short else ""
    return f"micro batch {nearest.config.micro_batch_size} would be next; it ran out of memory{much}"


def missing_bytes(judgement: Judgement, report: ProbeReport) -> int | None:
    """How far the failed allocation overshot: peak + asked − limit, a lower bound. None where not known."""
    tried, peak, limit = judgement.numbers.get(_TRIED), peak_bytes(report), report.limit_bytes
    if tried is None or peak is None or limit is None:
        return None
    return max(0, peak + tried - limit)


def _longer(proof: TrialRecord, result: Recommendation, max_positions: int | None) -> str:
    """Memory per token from two trials alike but in micro batch size, carried on in a straight line: a prediction."""
    room, slope = headroom_bytes(result), bytes_per_token(proof.config, result.trials)
    if room is None or slope is None or slope <= 0:
        return "longer sequences were not probed: ask with --sequence-length"
    tokens = proof.config.sequence_length + int(room / slope / proof.config.micro_batch_size)
    tokens = min(tokens // 64 * 64, max_positions or tokens)
    if tokens <= proof.config.sequence_length:
        return "a longer sequence is predicted not to fit at this micro batch size"
    return f"about {tokens:,} tokens at this micro batch size (predicted from the slope measured, not run)"


def bytes_per_token(config: TrainingConfig, trials: tuple[TrialRecord, ...]) -> float | None:
    """Measured growth of the live peak per token of a micro batch, at otherwise the same settings."""
    points = {}
    for trial in trials:
        alike = (trial.config.gradient_checkpointing, trial.config.upcast, trial.config.loss, trial.config.attention)
        same = (config.gradient_checkpointing, config.upcast, config.loss, config.attention)
        peak = trial.report.peak_allocated_bytes
        if trial.judgement.verdict is Verdict.FITS and alike == same and peak is not None:
            points[trial.config.micro_batch_size * trial.config.sequence_length] = peak
    if len(points) < 2:
        return None
    (few, low), (many, high) = min(points.items()), max(points.items())
    return (high - low) / (many - few)
