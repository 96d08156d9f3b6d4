"""The command that `gpu_run` gives to both runs: its sizes, and the micro batch that is predicted to break late."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.errors import InvalidRequest
from autotune.predict.forecast import Forecast
from autotune.predict.store import TraceStore
from autotune.probe.dry_run import DryRunner
from autotune.probe.predictor import target_of_device
from autotune.search.dimensions import divisors
from autotune.values import Device, ModelSource, TrainingConfig, to_json

TRAINER = "benchmarks.gpu_run_trainer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The command's own config, and its data."""

    device: Device
    source: ModelSource
    model: str
    steps: int
    long_at_step: int
    short_length: int
    long_length: int
    effective_batch_size: int
    micro_batch_size: int
    compute_dtype: str
    save_steps: int

    def config(self, micro_batch_size: int, sequence_length: int) -> TrainingConfig:
        """What the command trains with, of other sizes."""
        return TrainingConfig(
            sequence_length=sequence_length,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=self.effective_batch_size // micro_batch_size,
            gradient_checkpointing="full",
            compute_dtype=self.compute_dtype,
        )

    def command(self, folder: Path) -> list[str]:
        on_cpu = self.device.kind == "cpu"
        named: dict[str, Any] = {
            "model": self.model,
            "log": folder / "steps.jsonl",
            "samples": self.steps * self.effective_batch_size,
            "short_length": self.short_length,
            "long_length": self.long_length,
            "long_at_step": self.long_at_step,
            "lora_r": 16,
            "lora_alpha": 16,
            "output_dir": folder / "out",
            "per_device_train_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.effective_batch_size // self.micro_batch_size,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
            "bf16": self.compute_dtype == "bfloat16",
            "fp16": self.compute_dtype == "float16",
            "num_train_epochs": 1,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "cosine",
            "optim": "adamw_torch_fused",
            "save_strategy": "steps",
            "save_steps": self.save_steps,
            "save_total_limit": 2,
            "logging_steps": 1,
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": True,
            **({"use_cpu": True} if on_cpu else {}),
        }
        return [sys.executable, "-m", TRAINER, *(word for name, value in named.items() for word in _words(name, value))]


def _words(name: str, value: Any) -> tuple[str, str]:
    return f"--{name}", str(value)


def check_sizes(plan: Plan) -> None:
    """Raises `InvalidRequest`."""
    if plan.long_at_step > plan.steps:
        raise InvalidRequest(f"--long-at-step {plan.long_at_step} is not among {plan.steps} steps: give less")
    if plan.long_length <= plan.short_length:
        raise InvalidRequest(f"--long-length must be above --short-length {plan.short_length}")
    if plan.effective_batch_size % plan.micro_batch_size:
        raise InvalidRequest(
            f"--micro-batch-size {plan.micro_batch_size} does not divide the effective batch size"
            f" {plan.effective_batch_size}: give one that does"
        )
    positions = plan.source.max_positions
    if positions is not None and plan.long_length > positions:
        raise InvalidRequest(f"the model has {positions:,} positions: give a --long-length up to that")


def with_predicted(plan: Plan, limit: int, traces: Path) -> tuple[Plan, list[dict[str, Any]]]:
    """The largest micro batch that is predicted to fit short samples and not the long one, and what was predicted.

    Raises `InvalidRequest` where there is none, or where the long sample fits at none.
    """
    target, found = target_of_device(plan.device, limit), []
    runner = DryRunner(TraceStore(traces))

    def forecast(micro: int, length: int) -> Forecast:
        one = runner.forecast(plan.source, plan.config(micro, length), target)
        found.append({"micro_batch_size": micro, "tokens": length, "fits": one.fits, **to_json(one.prediction())})
        return one

    try:
        alone = forecast(1, plan.long_length)
        for micro in reversed(divisors(plan.effective_batch_size)):
            if not alone.fits or not forecast(micro, plan.short_length).fits:
                continue
            if not forecast(micro, plan.long_length).fits:
                return replace(plan, micro_batch_size=micro), found
    finally:
        runner.close()
    raise InvalidRequest(
        "no micro batch is predicted to fit the short samples and not the long one, which alone must fit:"
        " give other lengths, another --memory-limit, or --micro-batch-size"
    )
