"""A config and a trial in a few words, for progress lines and tables; a line for people."""

from __future__ import annotations

import click

from autotune.recommendation import peak_bytes
from autotune.values import MIB, AllocatorSetting, LossPath, TrainingConfig, TrialRecord, Upcast, Verdict

WORDS = {
    Verdict.FITS: "fits",
    Verdict.DEVICE_OOM: "out of memory",
    Verdict.SPILL: "spilled into system memory",
    Verdict.HOST_OOM: "out of host memory",
    Verdict.NOT_OOM: "failed, not for memory",
    Verdict.AMBIGUOUS: "failed, cause unclear",
    Verdict.TIMEOUT: "timed out",
    Verdict.DEVICE_LOST: "device lost",
    Verdict.INTERRUPTED: "interrupted",
}


def describe(config: TrainingConfig) -> str:
    """ "256 tokens, micro batch 4 × 2, checkpointing off, …": what differs from trial to trial."""
    parts = [
        f"{config.sequence_length} tokens",
        f"micro batch {config.micro_batch_size} × {config.gradient_accumulation_steps}",
        f"checkpointing {config.gradient_checkpointing}",
        settings(config),
    ]
    return ", ".join(part for part in parts if part)


def settings(config: TrainingConfig) -> str:
    """The settings that are not everyday: attention always, the rest where it departs from the plain."""
    parts = [config.attention.value]
    if config.upcast is not Upcast.NONE:
        parts.append("float32 copies" if config.upcast is Upcast.FP32 else "float32 norms")
    if config.loss is not LossPath.FULL:
        parts.append(f"{config.loss.value} loss")
    if config.optimizer != "adamw_torch_fused":
        parts.append(config.optimizer)
    if config.allocator is not AllocatorSetting.DEFAULT:
        parts.append(config.allocator.value)
    if config.lora_rank != 16:
        parts.append(f"rank {config.lora_rank}")
    return ", ".join(parts)


def outcome(trial: TrialRecord) -> str:
    """ "fits, 1,234 tokens/s, peak 900 MiB (7.1 s)" or what it died of."""
    report, verdict = trial.report, trial.judgement.verdict
    parts = [WORDS[verdict]]
    if trial.tokens_per_second:
        parts.append(f"{trial.tokens_per_second:,.0f} tokens/s")
    tried = trial.judgement.numbers.get("tried_bytes")
    if tried is not None and verdict is Verdict.DEVICE_OOM:
        parts.append(f"asked for {mib(tried)} more")
    if (peak := peak_bytes(report)) is not None:
        limit = f" of {mib(report.limit_bytes)}" if report.limit_bytes is not None else ""
        parts.append(f"peak {mib(peak)}{limit}")
    if trial.prediction is not None:
        tensors = f"tensors {mib(report.peak_allocated_bytes)}, " if report.peak_allocated_bytes else ""
        parts.append(f"{tensors}predicted {mib(trial.prediction.peak_allocated_bytes)}")
    if verdict not in (Verdict.FITS, Verdict.DEVICE_OOM) and report.failure is not None:
        parts.append(f"in phase {report.failure.phase}")
    return f"{', '.join(parts)} ({report.wall_time_s:.1f} s)"


def mib(size: int | None) -> str:
    """Bytes as MiB with thousands marked; "?" for unknown."""
    return "?" if size is None else f"{size / MIB:,.0f} MiB"


def say(line: str) -> None:
    """A line for people: stderr."""
    click.echo(line, err=True)
