"""Every searcher on one recorded landscape: ours, other tools over their own knob, and generic samplers over all."""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autotune.landscape import Row
from autotune.values import (
    TRAINER_UPCAST,
    AllocatorSetting,
    Attention,
    LossPath,
    ProbeReport,
    ProbeRequest,
    TrainingConfig,
    Verdict,
)
from benchmarks.baselines import (
    Run,
    Tries,
    accelerate,
    composer,
    deepspeed_fast,
    follow,
    halving,
    lightning_binsearch,
    lightning_power,
    neuracore,
    otx,
)
from benchmarks.replay import (
    Recorded,
    ReplayExecutor,
    Spot,
    replay_fit,
    seconds_of,
    settings_of,
)

OURS = "autotune"
TRIALS = 20  # different configs that a sampler may run
_ASKS = 25  # times as many suggestions at most: repeated ones and those without a row cost nothing
_IN_ORDER = ("micro_batch_size",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one searcher did on one landscape."""

    searcher: str
    landscape: str
    seed: int
    anything_fits: bool
    probes: int  # the proof and failed ones included
    out_of_memory: int
    seconds: float
    returned: TrainingConfig | None  # None: it said that nothing fits
    runs: bool = False  # whether what it returned fits
    was_run: bool = False  # whether it had run that itself
    regret: float | None = None  # against the best row, a fraction; None: nothing was returned that runs

    @property
    def loss(self) -> float:
        """The regret, infinite where what it returned does not run."""
        return math.inf if self.regret is None else self.regret


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """Another tool's search over the micro batch, and what its runs take besides their start."""

    label: str
    tries: Callable[[int, int], Tries]  # of (the effective batch, the batch that the memory holds by a line)
    in_process: bool  # one start for all runs, else each run starts a process
    warm_up: int  # micro batches
    steps: int  # optimizer steps of one micro batch each


#: Success ends accelerate's and Composer's search and training goes on from there: one step. Lightning's
#: steps_per_trial is 3; DeepSpeed runs 5 steps and times the last 3; neuracore warms up once and takes 2 steps.
TOOLS: dict[str, Tool] = {
    "accelerate": Tool(
        label="accelerate, ×0.9 from the effective batch",
        tries=lambda most, _: accelerate(most),
        in_process=True,
        warm_up=1,
        steps=1,
    ),
    "trainer": Tool(
        label="HF Trainer, ×0.9 from 8",
        tries=lambda most, _: accelerate(most, start=8),
        in_process=True,
        warm_up=1,
        steps=1,
    ),
    "halving": Tool(
        label="halving (accelerate before 1.9)",
        tries=lambda most, _: halving(most),
        in_process=True,
        warm_up=1,
        steps=1,
    ),
    "lightning-power": Tool(
        label="Lightning, power",
        tries=lambda most, _: lightning_power(most),
        in_process=True,
        warm_up=1,
        steps=3,
    ),
    "lightning-binsearch": Tool(
        label="Lightning, binsearch",
        tries=lambda most, _: lightning_binsearch(most),
        in_process=True,
        warm_up=1,
        steps=3,
    ),
    "deepspeed": Tool(
        label="DeepSpeed fast mode, told the true memory",
        tries=lambda most, estimate: deepspeed_fast(most, estimate=estimate),
        in_process=False,
        warm_up=0,
        steps=5,
    ),
    "composer": Tool(label="Composer, auto", tries=lambda most, _: composer(most), in_process=True, warm_up=1, steps=1),
    "neuracore": Tool(
        label="neuracore, line fit", tries=lambda most, _: neuracore(most), in_process=False, warm_up=1, steps=2
    ),
    "otx": Tool(label="OTX, line fit", tries=lambda most, _: otx(most), in_process=False, warm_up=1, steps=2),
}
SAMPLERS = {
    "tpe": f"Optuna TPE, {TRIALS} configs",
    "gp": f"Optuna GP, {TRIALS} configs",
    "random": f"random, {TRIALS} configs",
    "exhaustive": "exhaustive",
}
#: Whose answer changes with the seed.
SEEDED = ("tpe", "gp", "random")
LABELS = {OURS: "autotune", **{name: tool.label for name, tool in TOOLS.items()}, **SAMPLERS}


def search(name: str, recorded: Recorded, seed: int, *, cold: bool = False) -> Result:
    """One searcher on one landscape; `cold`: a sampler starts a process for each config, else it has warm probes.

    Raises `NotInLandscape`, where our search asks for what the file lacks.
    """
    if name == OURS:
        return _ours(recorded)
    if name in TOOLS:
        return _tool(name, TOOLS[name], recorded)
    return _sampled(name, recorded, seed, cold)


def _result(name: str, recorded: Recorded, seed: int, **found: Any) -> Result:
    fits = recorded.best is not None
    return Result(searcher=name, landscape=recorded.header.name, seed=seed, anything_fits=fits, **found)


def _of_row(recorded: Recorded, config: TrainingConfig | None) -> dict[str, Any]:
    """What is known of a returned config that has a row."""
    row = recorded.rows.get(config) if config else None
    if row is None or row.verdict is not Verdict.FITS:
        return {"returned": config}
    return {"returned": config, "runs": True, "was_run": True, "regret": recorded.regret(seconds_of(row))}


# Ours


def _ours(recorded: Recorded) -> Result:
    found, executor = replay_fit(recorded)
    return _result(
        OURS,
        recorded,
        0,
        probes=executor.probes,
        out_of_memory=executor.out_of_memory,
        seconds=executor.clock_s,
        **_of_row(recorded, found.proof.config if found.proof else None),
    )


# Tools over the micro batch


def defaults_of(start: TrainingConfig) -> TrainingConfig:
    """The settings that all these tools leave a training at: nothing checkpointed, the trainer's own dtypes."""
    return replace(
        settings_of(start),
        gradient_checkpointing="off",
        attention=Attention.SDPA,
        loss=LossPath.FULL,
        upcast=TRAINER_UPCAST[start.trainer],
        allocator=AllocatorSetting.DEFAULT,
        packing=False,
    )


def closest_settings(recorded: Recorded) -> tuple[TrainingConfig, tuple[str, ...]]:
    """The recorded settings nearest to the tools' defaults, and the fields in which they differ from those."""
    wanted = defaults_of(recorded.start)

    def differing(settings: TrainingConfig) -> list[str]:
        names = (item.name for item in dataclasses.fields(settings))
        return [name for name in names if getattr(settings, name) != getattr(wanted, name)]

    def distance(settings: TrainingConfig) -> tuple[bool, int, int]:
        differs = differing(settings)
        return "gradient_checkpointing" in differs, len(differs), -len(recorded.lines[settings])

    nearest = min(recorded.lines, key=distance)
    return nearest, tuple(differing(nearest))


def _tool(name: str, tool: Tool, recorded: Recorded) -> Result:
    settings, _ = closest_settings(recorded)
    samples = recorded.samples
    spots: dict[int, Spot] = {}
    seconds = recorded.header.fresh_start_s if tool.in_process else 0.0

    def answer(batch: int) -> Run:
        nonlocal seconds
        spot = spots.setdefault(batch, recorded.spot(settings, batch))
        step = spot.micro_s + spot.optimizer_s
        seconds += 0.0 if tool.in_process else recorded.header.fresh_start_s
        seconds += tool.warm_up * spot.micro_s + tool.steps * step if spot.fits else recorded.filling_s(settings)
        accumulation = math.ceil(samples / batch)
        whole = accumulation * spot.micro_s + spot.optimizer_s
        return Run(fits=spot.fits, memory=spot.memory, speed=accumulation * batch / whole if spot.fits else 0.0)

    found = follow(tool.tries(samples, _estimate(recorded, settings)), answer)
    returned, regret = None, None
    if found.batch is not None:
        accumulation = math.ceil(samples / found.batch)
        returned = replace(settings, micro_batch_size=found.batch, gradient_accumulation_steps=accumulation)
        spot = recorded.spot(settings, found.batch)
        if spot.fits:  # seconds of as many samples as the request's step has
            step = accumulation * spot.true_micro_s + spot.optimizer_s
            regret = recorded.regret(step * samples / (accumulation * found.batch))
    return _result(
        name,
        recorded,
        0,
        probes=len(found.runs),
        out_of_memory=sum(not run.fits for _, run in found.runs),
        seconds=seconds,
        returned=returned,
        runs=regret is not None,
        was_run=found.was_run,
        regret=regret,
    )


def _estimate(recorded: Recorded, settings: TrainingConfig) -> int:
    """The largest batch that the landscape's own line holds: more than DeepSpeed's profile could tell it."""
    return max((size for size in range(1, recorded.samples + 1) if recorded.spot(settings, size).fits), default=1)


# Samplers over all settings


def _sampled(name: str, recorded: Recorded, seed: int, cold: bool) -> Result:
    rows = list(recorded.rows.values())
    executor = ReplayExecutor(recorded)
    ran: dict[TrainingConfig, float] = {}

    def probe(row: Row) -> float | None:
        """The step time that a probe of this row measures; None where it does not fit."""
        report = executor.probe(_request(recorded, row.config), fresh=cold)
        step = _step_s(row, report)
        if step is not None:
            ran[row.config] = step
        return step

    if name == "exhaustive":
        for row in rows:
            probe(row)
    elif name == "random":
        for row in random.Random(f"{seed}|{recorded.header.name}").sample(rows, min(TRIALS, len(rows))):
            probe(row)
    else:
        _optuna(name, recorded, rows, probe, seed)
    best = min(ran, key=lambda config: ran[config], default=None)
    return _result(
        name,
        recorded,
        seed,
        probes=executor.probes,
        out_of_memory=executor.out_of_memory,
        seconds=executor.clock_s,
        **_of_row(recorded, best),
    )


def _request(recorded: Recorded, config: TrainingConfig) -> ProbeRequest:
    header = recorded.header
    return ProbeRequest(
        model=header.model,
        config=config,
        device=header.device.id,
        memory_limit_bytes=header.memory_limit_bytes,
        headroom_bytes=header.headroom_bytes,
    )


def _step_s(row: Row, report: ProbeReport) -> float | None:
    if row.verdict is not Verdict.FITS:
        return None
    return report.step_time_s(row.config.gradient_accumulation_steps)


def _optuna(
    name: str, recorded: Recorded, rows: Sequence[Row], probe: Callable[[Row], float | None], seed: int
) -> None:
    """Ask and tell over every setting that varies, with what fits as the constraint."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    choices = _choices(rows)
    by_choice = {_chosen(row.config, choices): row for row in rows}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constraints are an experimental feature
        sampler_of = optuna.samplers.TPESampler if name == "tpe" else optuna.samplers.GPSampler
        study = optuna.create_study(sampler=sampler_of(seed=seed, constraints_func=_constraint))
        told: dict[tuple[int, ...], tuple[float | None, float]] = {}
        ran = 0
        for _ in range(TRIALS * _ASKS):
            if ran == min(TRIALS, len(rows)):
                return
            trial = study.ask()
            picked = tuple(_suggest(trial, field, values) for field, values in choices.items())
            row = by_choice.get(picked)
            if picked not in told:
                step = probe(row) if row else None
                ran += row is not None
                told[picked] = (step, _excess(recorded, row))
            step, excess = told[picked]
            trial.set_user_attr("excess", excess)
            slowest = max((known for known, _ in told.values() if known), default=1.0)
            study.tell(trial, math.log(step or slowest))


def _choices(rows: Sequence[Row]) -> dict[str, tuple[Any, ...]]:
    """Field: its values, of those that vary; accumulation follows from the batch."""
    found: dict[str, tuple[Any, ...]] = {}
    for item in dataclasses.fields(TrainingConfig):
        values = dict.fromkeys(getattr(row.config, item.name) for row in rows)
        if len(values) > 1 and item.name != "gradient_accumulation_steps":
            found[item.name] = tuple(sorted(values, key=lambda value: (value is None, value)))
    return found


def _chosen(config: TrainingConfig, choices: dict[str, tuple[Any, ...]]) -> tuple[int, ...]:
    return tuple(values.index(getattr(config, name)) for name, values in choices.items())


def _suggest(trial: Any, name: str, values: Sequence[Any]) -> int:
    """The place of a value: a number where the values have an order, else a category."""
    if name in _IN_ORDER:
        return int(trial.suggest_int(name, 0, len(values) - 1))
    return int(trial.suggest_categorical(name, tuple(range(len(values)))))


def _excess(recorded: Recorded, row: Row | None) -> float:
    """Above zero what does not fit, or has no row: by how much, where the landscape knows it."""
    if row is None:
        return 1.0
    if row.needed_bytes is None or recorded.allowed_bytes is None:
        return 0.0 if row.verdict is Verdict.FITS else 0.1
    over = row.needed_bytes / recorded.allowed_bytes - 1.0
    return min(over, 0.0) if row.verdict is Verdict.FITS else max(over, 0.01)


def _constraint(trial: Any) -> tuple[float]:
    return (float(trial.user_attrs["excess"]),)
