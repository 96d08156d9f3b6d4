"""Factories of valid trials for tests."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from autotune.values import (
    GIB,
    MIB,
    Device,
    Failure,
    Isolation,
    Judgement,
    Origin,
    Prediction,
    ProbeReport,
    TrainingConfig,
    TrialRecord,
    Verdict,
)
from tests.fakes import a_gpu, an_environment

DEVICE: Device = a_gpu()


def report(**changes: Any) -> ProbeReport:
    """A probe that ended well."""
    defaults: dict[str, Any] = {
        "phases_s": {"start": 2.5, "build": 1.25, "forward": 3.0},
        "micro_batch_times_s": (0.5, 0.52),
        "optimizer_times_s": (0.1,),
        "loss": 10.875,
        "losses": (11.0, 10.875),
        "after_load_bytes": 5 * GIB,
        "peak_allocated_bytes": 9 * GIB,
        "peak_reserved_bytes": 10 * GIB,
        "device_used_bytes": 10 * GIB + 500 * MIB,
        "exit_code": 0,
        "isolation": Isolation.WARM,
        "wall_time_s": 6.75,
    }
    return ProbeReport(**{**defaults, **changes})


def trial(**changes: Any) -> TrialRecord:
    """A trial that fits `DEVICE`. `changes` name fields of TrialRecord or of its config."""
    mine = {item.name for item in fields(TrialRecord)}
    config = {name: value for name, value in changes.items() if name not in mine}
    defaults: dict[str, Any] = {
        "request_id": "0123456789ab",
        "model_name": "org/llama-8b",
        "model_fingerprint": "ba9876543210",
        "device_slug": DEVICE.slug,
        "config": TrainingConfig(**{"sequence_length": 2048, "micro_batch_size": 1, **config}),
        "memory_limit_bytes": 12 * GIB,
        "report": report(),
        "judgement": Judgement(verdict=Verdict.FITS, evidence=("3 optimizer steps ran",), action="keep it"),
        "environment": an_environment(),
        "origin": Origin.PROBE,
        "time_utc": "2026-01-02T03:04:05+00:00",
        "prediction": Prediction(peak_allocated_bytes=9 * GIB + 1, step_time_s=8.5),
        "moves": ("chunked_loss",),
    }
    return TrialRecord(**{**defaults, **{name: value for name, value in changes.items() if name in mine}})


def out_of_memory_trial(**changes: Any) -> TrialRecord:
    """A trial that did not fit, with the evidence."""
    message = "CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 11.63 GiB"
    failure = Failure(phase="forward", exception="torch.OutOfMemoryError", chain=(message,), message=message)
    judgement = Judgement(
        verdict=Verdict.DEVICE_OOM,
        evidence=(message,),
        action="try a smaller config",
        numbers={"tried": 2_104_533_975, "total": 12_487_617_249},
    )
    died = report(failure=failure, losses=(), loss=None, micro_batch_times_s=(), optimizer_times_s=())
    return trial(**{"report": died, "judgement": judgement, "prediction": None, **changes})
