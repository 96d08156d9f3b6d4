"""Parts of `benchmarks.gpu_search` that fit live: regret against the measured landscape, and others' settings."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from autotune.cli.bench import stop_flag
from autotune.cli.fit_request import default_compute_dtype, defaults_for
from autotune.hardware.select import default_headroom_bytes
from autotune.landscape import Landscape
from autotune.tuner import PROOF_STEPS, last_words
from autotune.values import (
    TRAINER_ADAPTER_DTYPE,
    TRAINER_LOSS,
    TRAINER_UPCAST,
    Device,
    ModelSource,
    Origin,
    ProbeRequest,
    Trainer,
    TrainingConfig,
    TrialRecord,
    Verdict,
    from_json,
    to_json,
)
from autotune.workload.models import resolve_model
from benchmarks.gpu_fit import Limit, LimitResult, exit_code, run_limit, say
from benchmarks.gpu_memory import Bench, open_bench
from benchmarks.gpu_search import Asked, Keeper, landscapes_of, limits_within
from benchmarks.records import plain_table
from benchmarks.replay import Recorded, seconds_of
from benchmarks.search import all_landscapes

ROUNDS = 2  # of the comparison: each config in turn, then again
COMPARED_BATCH = 8  # samples of an optimizer step in both published settings, which are then run as they are


# Regret of live fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """A live fit's answer against a landscape under the same limit. Unknown is None."""

    sequence_length: int
    limit: str
    rows: int
    best: dict[str, Any] | None  # config of the landscape's fastest row
    best_step_time_s: float | None
    regret: float | None  # by the answer's own row, a fraction; None: it has none, or nothing fits
    proof_over_best: float | None  # the proof's step time ÷ the best row's - 1; below 0: faster than the grid
    fit: LimitResult


def run_fits(asked: Asked, limits: Sequence[Limit]) -> int:
    """A fit with an empty database for each length and limit; the exit code. Raises `InvalidRequest`."""
    keeper, found = Keeper(asked, "fit"), list[Regret]()
    files = landscapes_of(asked)
    for length in asked.lengths:
        path = asked.landscape(length)
        if path not in files:
            say(f"{length:,} tokens: no landscape, so no regret: --part sweep measures it.")
            continue
        for limit in limits:
            if limit.memory_limit_bytes is not None and not limits_within(path, [limit]):
                say(f"Skipped {limit.text}: the landscape was measured under less.")
                continue
            result = run_limit(limit, asked.options(length), asked.device, out_of_time=asked.is_over)
            (landscape,) = all_landscapes([path], [limit.memory_limit_bytes], seed=0)
            found.append(regret_of(length, result, landscape))
            keeper.keep({"fits": found})
    click.echo(regret_table(found))
    keeper.said()
    return exit_code([one.fit for one in found])


def regret_of(length: int, result: LimitResult, landscape: Landscape) -> Regret:
    """Against the best row, in step time."""
    recorded = Recorded(landscape)
    best = recorded.best
    regret = over = None
    if best is not None and result.config and result.tokens_per_second:
        config = from_json(TrainingConfig, result.config)
        row = recorded.rows.get(config)
        if row is not None and row.verdict is Verdict.FITS:
            regret = recorded.regret(seconds_of(row))
        over = config.tokens_per_step / result.tokens_per_second / seconds_of(best) - 1
    return Regret(
        sequence_length=length,
        limit=result.limit,
        rows=len(recorded.rows),
        best=to_json(best.config) if best else None,
        best_step_time_s=seconds_of(best) if best else None,
        regret=regret,
        proof_over_best=over,
        fit=result,
    )


def regret_table(found: Sequence[Regret]) -> str:
    """A row a fit."""
    header = ("tokens, limit", "result", "probes", "oom", "total, s", "regret by its row", "proof over the best row")
    rows = [
        (
            f"{one.sequence_length:,}, {one.limit}",
            "skipped" if one.fit.skipped else one.fit.status or f"exit {one.fit.exit_code}",
            _shown(one.fit.probes),
            _shown(one.fit.out_of_memory),
            "–" if one.fit.total_s is None else f"{one.fit.total_s:.1f}",
            "no row" if one.regret is None else f"{one.regret:.2%}",
            "–" if one.proof_over_best is None else f"{one.proof_over_best:+.2%}",
        )
        for one in found
    ]
    return plain_table([header, *rows])


def _shown(count: int | None) -> str:
    return "–" if count is None else str(count)


# Others' settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One config's speed in fresh workers, measured as a proof is."""

    name: str
    sequence_length: int
    config: TrainingConfig
    verdicts: tuple[Verdict, ...]  # a round each
    tokens_per_second: tuple[float, ...]  # of those that fit, padding counted
    peak_reserved_bytes: int | None
    failed: str | None = None  # how the last that did not fit ended

    @property
    def speed(self) -> float | None:
        return statistics.median(self.tokens_per_second) if self.tokens_per_second else None


def others(length: int, device: Device) -> dict[str, TrainingConfig]:
    """Published settings, as they are: 8 samples to an optimizer step in both.

    trl's, of 1.16: 8 samples a device, checkpointing on, fused AdamW, its chunked loss. The notebook's, after peft's
    k-bit preparation: micro batch 2, accumulation 4, checkpointing on, paged 8-bit AdamW. LoRA is the fit's.
    """
    plain = TrainingConfig(
        sequence_length=length,
        micro_batch_size=COMPARED_BATCH,
        gradient_checkpointing="full",
        compute_dtype=default_compute_dtype(device),
    )
    return {"trl's defaults": as_trained_by(Trainer.TRL, plain), "a notebook's": notebook(plain)}


def as_trained_by(trainer: Trainer, config: TrainingConfig) -> TrainingConfig:
    """With the trainer's own handling of dtypes and its loss."""
    return replace(
        config,
        trainer=trainer,
        upcast=TRAINER_UPCAST[trainer],
        adapter_dtype=TRAINER_ADAPTER_DTYPE[trainer],
        loss=TRAINER_LOSS[trainer],
    )


def notebook(config: TrainingConfig) -> TrainingConfig:
    changed = replace(config, micro_batch_size=2, gradient_accumulation_steps=4, optimizer="paged_adamw_8bit")
    return as_trained_by(Trainer.TRANSFORMERS, changed)


def run_compare(asked: Asked, limit: Limit) -> int:
    """A fit for each length, then its config and the others' in turn; the exit code. Raises `Interrupted`."""
    keeper = Keeper(asked, "compare")
    fits, found = list[LimitResult](), list[Compared]()
    alike = replace(asked, effective_batch_size=COMPARED_BATCH)
    for length in asked.lengths:
        result = run_limit(limit, alike.options(length), asked.device, out_of_time=asked.is_over)
        fits.append(result)
        if result.config:
            configs = {"fitted": from_json(TrainingConfig, result.config), **others(length, asked.device)}
            found += compare(asked, configs)
        keeper.keep({"fits": fits, "compared": found, "ratios": ratios(found)})
    click.echo(compared_table(found))
    keeper.said()
    return exit_code(fits)


def compare(asked: Asked, configs: dict[str, TrainingConfig]) -> list[Compared]:
    """Each config in turn, `ROUNDS` times."""
    source = resolve_model(asked.model, say=say)
    trials: dict[str, list[TrialRecord]] = {name: [] for name in configs}
    with stop_flag() as stopped, tempfile.TemporaryDirectory(prefix="autotune-traces-") as folder:
        bench = open_bench(asked.device, defaults_for(asked.device).memory_limit_bytes, Path(folder), stopped)
        try:
            for _ in range(ROUNDS):
                for name, config in configs.items():
                    trials[name].append(prove(bench, source, config))
                    speed = trials[name][-1].tokens_per_second
                    say(f"{name}, {config.sequence_length:,} tokens: {f'{speed:,.0f} tokens/s' if speed else 'failed'}")
        finally:
            bench.close()
    return [compared(name, config, trials[name]) for name, config in configs.items()]


def prove(bench: Bench, source: ModelSource, config: TrainingConfig) -> TrialRecord:
    """A proof in a fresh worker, as a fit's; it is stored nowhere."""
    request = ProbeRequest(
        model=source,
        config=config,
        device=bench.device.id,
        memory_limit_bytes=bench.limit_bytes,
        headroom_bytes=default_headroom_bytes(bench.device, bench.limit_bytes),
        proof=True,
        optimizer_steps=PROOF_STEPS,
    )
    bench.judge.begin()
    report = bench.executor.probe(request, fresh=True)
    return TrialRecord(
        request_id="",
        model_name=source.name,
        model_fingerprint=source.fingerprint,
        device_slug=bench.device.slug,
        config=config,
        memory_limit_bytes=bench.limit_bytes,
        report=report,
        judgement=bench.judge.judge(report, request),
        environment=bench.executor.environment(),
        origin=Origin.PROOF,
        time_utc="",
    )


def compared(name: str, config: TrainingConfig, trials: Sequence[TrialRecord]) -> Compared:
    """All rounds of one config."""
    failed = [trial for trial in trials if trial.tokens_per_second is None]
    return Compared(
        name=name,
        sequence_length=config.sequence_length,
        config=config,
        verdicts=tuple(trial.judgement.verdict for trial in trials),
        tokens_per_second=tuple(trial.tokens_per_second for trial in trials if trial.tokens_per_second),
        peak_reserved_bytes=max((trial.report.peak_reserved_bytes or 0 for trial in trials), default=0) or None,
        failed=last_words(failed[-1]) if failed else None,
    )


def ratios(found: Sequence[Compared]) -> list[dict[str, Any]]:
    """The fitted config's speed ÷ each other's at the same length; None where one of them does not run."""
    fitted = {one.sequence_length: one.speed for one in found if one.name == "fitted"}
    return [
        {
            "sequence_length": one.sequence_length,
            "against": one.name,
            "ratio": mine / one.speed if (mine := fitted.get(one.sequence_length)) and one.speed else None,
        }
        for one in found
        if one.name != "fitted"
    ]


def compared_table(found: Sequence[Compared]) -> str:
    """A row a config; the last column is how many times as fast the fitted one is."""
    known = {(one["sequence_length"], one["against"]): one["ratio"] for one in ratios(found)}
    rows = [
        (
            f"{one.name}, {one.sequence_length:,} tokens",
            f"{one.config.micro_batch_size} × {one.config.gradient_accumulation_steps}",
            one.config.gradient_checkpointing,
            f"{one.speed:,.0f}" if one.speed else one.verdicts[-1].value,
            f"{ratio:.2f}" if (ratio := known.get((one.sequence_length, one.name))) else "–",
        )
        for one in found
    ]
    return plain_table([("config", "batch", "checkpointing", "tokens/s", "fitted is × as fast"), *rows])
