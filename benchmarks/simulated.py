"""Landscapes of simulated cards: predictions of `surfaces`, distorted at random, so that no search sees its own model.

`python -m benchmarks.simulated --seed 0 --output FOLDER`
"""

from __future__ import annotations

import functools
import random
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import click

from autotune.hardware.cards import Card
from autotune.landscape import Header, Landscape, Row, line_of
from autotune.predict.forecast import Target
from autotune.values import (
    TRAINER_ADAPTER_DTYPE,
    TRAINER_LOSS,
    TRAINER_UPCAST,
    Device,
    LossPath,
    Trainer,
    TrainingConfig,
    Verdict,
)
from autotune.workload.models import resolve_model
from benchmarks.distortion import FAMILIES, Distortion, text_of
from benchmarks.records import one_line_errors
from benchmarks.surfaces import (
    CARDS,
    EFFECTIVE_BATCH,
    LENGTHS,
    MODELS,
    Point,
    Surface,
    card_named,
    compute_dtype_of,
    read_surfaces,
    target_named,
)

WITH_LIGER = CARDS[::2]  # where the liger_kernel package counts as installed
MICRO_BATCH_SAMPLES, OPTIMIZER_SAMPLES = 8, 6
STARTUP_S, FRESH_START_S = (1.0, 3.0), (20.0, 35.0)  # of a landscape, seconds
_STARTUP_NOISE = 0.2  # of one probe's, either way
_FREE_AT_DEATH = 0.05  # at most, of what a run may take, when an allocation fails
_SMALLEST = 512  # bytes, of an allocation


def landscapes(
    seed: int = 0,
    *,
    distortion: str = "usual",
    cards: Collection[str] | None = None,
    models: Collection[str] | None = None,
    lengths: Collection[int] | None = None,
) -> Iterator[Landscape]:
    """One for each card, model and length of the surfaces; each draws its own distortion, whichever others are asked.

    `distortion`: "usual", or "other", which is kept apart. Raises `InvalidRequest` where surfaces are missing.
    """
    for model in MODELS:
        if models is not None and model not in models:
            continue
        for surface in _surfaces(model):
            wanted = cards is None or surface.card in cards
            if wanted and (lengths is None or surface.sequence_length in lengths):
                yield landscape_of(surface, seed, distortion=distortion)


@functools.lru_cache(maxsize=len(MODELS))
def _surfaces(model: str) -> tuple[Surface, ...]:
    return tuple(read_surfaces(model))


def landscape_of(surface: Surface, seed: int, *, distortion: str = "usual") -> Landscape:
    """One problem as this seed distorts it."""
    card, target = card_named(surface.card), target_named(surface.card)
    assert target.context is not None
    installed = ("liger_kernel",) if surface.card in WITH_LIGER else ()
    points = [point for point in surface.points if installed or point.config.loss is not LossPath.LIGER]
    problem = f"{surface.card}|{surface.model}|{surface.sequence_length}|{seed}"
    drawn = FAMILIES[distortion](problem, points, target.context)
    rng = random.Random(f"times|{distortion}|{problem}")
    fresh_start_s, startup_s = rng.uniform(*FRESH_START_S), rng.uniform(*STARTUP_S)
    names = (distortion, str(seed), surface.card, surface.model.rpartition("/")[2], str(surface.sequence_length))
    return Landscape(
        header=Header(
            name="-".join(names).lower().replace(" ", "-"),
            origin="simulated",
            device=device_of(card),
            model=resolve_model(surface.model),
            start=start_of(card, surface.sequence_length),
            headroom_bytes=target.headroom_bytes,
            installed=installed,
            fresh_start_s=round(fresh_start_s, 3),
        ),
        rows=tuple(_row(point, drawn, target, startup_s, f"{distortion}|{problem}") for point in points),
    )


def device_of(card: Card) -> Device:
    """That card in this machine, with nothing else on it."""
    return Device(
        kind="cuda",
        index=0,
        name=card.name,
        total_bytes=card.memory_bytes,
        free_bytes=card.memory_bytes,
        compute_capability=card.compute_capability,
        driver="580.65.06",
        runtime="13.0",
    )


def start_of(card: Card, sequence_length: int) -> TrainingConfig:
    """As `autotune fit` has it where only the length is stated: one micro batch of the whole effective batch."""
    trainer = Trainer.TRANSFORMERS
    return TrainingConfig(
        sequence_length=sequence_length,
        micro_batch_size=EFFECTIVE_BATCH,
        compute_dtype=compute_dtype_of(card),
        loss=TRAINER_LOSS[trainer],
        upcast=TRAINER_UPCAST[trainer],
        adapter_dtype=TRAINER_ADAPTER_DTYPE[trainer],
        trainer=trainer,
    )


def _row(point: Point, drawn: Distortion, target: Target, startup_s: float, key: str) -> Row:
    """What running the config gives on the distorted card.

    It fits where tensors, and what the allocator cannot give back, find room beside the context. Where the rest of
    the cache does not, the allocator gives it back and time is lost.
    """
    assert target.allowed_bytes is not None
    rng = random.Random(f"row|{key}|{text_of(point.config)}")
    startup_s = round(startup_s * rng.uniform(1 - _STARTUP_NOISE, 1 + _STARTUP_NOISE), 4)
    row = Row(config=point.config, verdict=Verdict.FITS, startup_s=startup_s, predicted=point.prediction(target))
    share = drawn.allocated_share(point)
    allocated, cached = round(point.peak_allocated_bytes * share), drawn.cached_bytes(point)
    beside = drawn.context_bytes + point.paged_bytes
    room = target.allowed_bytes - beside
    least = allocated + round(cached * drawn.stuck(point.config))
    if least > room:
        return _out_of_memory(row, rng, room, least - room)
    reserved = min(allocated + cached, room)
    micro_s = drawn.micro_batch_s(point) * (drawn.retries if allocated + cached > room else 1.0)
    optimizer_s = drawn.optimizer_s(point)
    return replace(
        row,
        needed_bytes=reserved + beside,
        peak_allocated_bytes=round(point.training_peak_allocated_bytes * share),
        peak_reserved_bytes=reserved,
        micro_batch_times_s=_samples(drawn, micro_s, MICRO_BATCH_SAMPLES, rng),
        optimizer_times_s=_samples(drawn, optimizer_s, OPTIMIZER_SAMPLES, rng),
        true_step_time_s=micro_s * point.config.gradient_accumulation_steps + optimizer_s,
    )


def _out_of_memory(row: Row, rng: random.Random, room: int, missing: int) -> Row:
    """The peaks are those at death: some is free still, but less than was asked for."""
    room = max(0, room)
    free = round(room * rng.uniform(0.0, _FREE_AT_DEATH))
    tried = free + max(_SMALLEST, round(missing * rng.random()))
    return replace(
        row,
        verdict=Verdict.DEVICE_OOM,
        peak_allocated_bytes=room - free,
        peak_reserved_bytes=room,
        tried_bytes=tried,
    )


def _samples(drawn: Distortion, seconds: float, count: int, rng: random.Random) -> tuple[float, ...]:
    return tuple(float(f"{drawn.sample(seconds, rng):.6g}") for _ in range(count))


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the files.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the distortions.")
@click.option("--distortion", type=click.Choice(tuple(FAMILIES)), default="usual", show_default=True)
@click.option("--card", "cards", multiple=True, type=click.Choice(CARDS), help="Only this one, repeatable.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="Only this one, repeatable.")
@click.option("--length", "lengths", multiple=True, type=click.Choice([str(n) for n in LENGTHS]), help="Only this one.")
def main(
    output: Path, seed: int, distortion: str, cards: tuple[str, ...], models: tuple[str, ...], lengths: tuple[str, ...]
) -> None:
    """One file a landscape."""
    output.mkdir(parents=True, exist_ok=True)
    found = landscapes(
        seed,
        distortion=distortion,
        cards=cards or None,
        models=models or None,
        lengths=[int(length) for length in lengths] or None,
    )
    with one_line_errors():
        for landscape in found:
            lines: tuple[Header | Row, ...] = (landscape.header, *landscape.rows)
            (output / f"{landscape.header.name}.jsonl").write_bytes(b"".join(map(line_of, lines)))
            click.echo(summary(landscape), err=True)


def summary(landscape: Landscape) -> str:
    """One line: how many rows, how many fit."""
    fits = sum(row.verdict is Verdict.FITS for row in landscape.rows)
    return f"{landscape.header.name}: {len(landscape.rows)} rows, {fits} fit"


if __name__ == "__main__":
    main()
