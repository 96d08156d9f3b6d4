"""What is predicted of a grid of configs on cards of the catalogue, kept small: `benchmarks.simulated` distorts it.

`python -m benchmarks.surfaces --output benchmarks/data/surfaces`
"""

from __future__ import annotations

import atexit
import functools
import gzip
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from autotune.cli.estimate_question import with_headroom
from autotune.errors import InvalidRequest
from autotune.hardware.cards import Card, find_card
from autotune.predict.forecast import Target, forecast, target_of_card
from autotune.predict.kernels import KernelSet
from autotune.predict.memory import forecast_memory
from autotune.predict.steptime import forecast_time
from autotune.predict.store import TraceStore, library_versions
from autotune.predict.trace import NotAlike, Trace
from autotune.probe.dry_run import DryRunner
from autotune.values import (
    AllocatorSetting,
    LossPath,
    ModelSource,
    Prediction,
    TrainingConfig,
    Upcast,
    from_json,
    to_json,
)
from autotune.workload.models import resolve_model
from benchmarks.records import one_line_errors

SCHEMA = "autotune.surfaces/1"
FOLDER = Path(__file__).parent / "data" / "surfaces"

#: Names as `find_card` knows them, from 8 to 80 GB.
CARDS = (
    *("Tesla T4", "V100-SXM2 16GB", "RTX 3060 12GB", "RTX 4060", "A10G", "L4", "RTX 4090", "RTX 5090"),
    *("A100-SXM4 40GB", "A100-SXM4 80GB", "H100 SXM 80GB"),
)
MODELS = ("meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-3B", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen2.5-14B")
LENGTHS = (1024, 2048, 4096)
EFFECTIVE_BATCH = 16
MICRO_BATCHES = (1, 2, 4, 8, 16)

#: What tells one config of a grid from another, as the columns of a file.
SETTINGS = ("gradient_checkpointing", "loss", "upcast", "optimizer", "allocator", "micro_batch_size")
_DIGITS = 5  # of a predicted time; more would say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is predicted of one config on one card, with nothing learned."""

    config: TrainingConfig
    training_peak_allocated_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int  # where the card sets no limit
    limited_reserved_bytes: int | None  # where it does, and the allocator gives its cache back in time
    paged_bytes: int
    seconds_by_kind: dict[str, float]  # of an optimizer step

    def prediction(self, target: Target) -> Prediction:
        """As a fit's predictor gives it on that target."""
        reserved = self.peak_reserved_bytes if self.limited_reserved_bytes is None else self.limited_reserved_bytes
        context = target.context.likely_bytes if target.context else 0
        return Prediction(
            training_peak_allocated_bytes=self.training_peak_allocated_bytes,
            peak_allocated_bytes=self.peak_allocated_bytes,
            peak_reserved_bytes=reserved,
            device_used_bytes=reserved + self.paged_bytes + context,
            step_time_s=sum(self.seconds_by_kind.values()),
            memory_factor=1.0,
            time_factor=1.0,
            seconds_by_kind=self.seconds_by_kind,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """All points of one problem: a model at a length on a card."""

    model: str
    card: str
    sequence_length: int
    points: tuple[Point, ...]


def card_named(name: str) -> Card:
    return find_card(name).card


def compute_dtype_of(card: Card) -> str:
    """bfloat16 where the card has units for it."""
    return "bfloat16" if card.bf16_flops_per_s else "float16"


def target_named(name: str) -> Target:
    """The card of that name with the usual headroom, as a fit sees it."""
    return with_headroom(target_of_card(card_named(name)))


def grid(sequence_length: int, compute_dtype: str) -> list[TrainingConfig]:
    """Every checkpointing × loss × allocator × micro batch, and some with float32 copies or a paged optimizer."""
    product: list[dict[str, Any]] = [
        {"gradient_checkpointing": kept, "loss": loss, "allocator": allocator}
        for kept, loss, allocator in itertools.product(
            ("off", "every_2", "every_4", "full", "offload"), LossPath, AllocatorSetting
        )
    ]
    product += [
        {"gradient_checkpointing": kept, "loss": loss, "upcast": Upcast.FP32}
        for kept, loss in itertools.product(("off", "every_2", "full"), (LossPath.FULL, LossPath.CHUNKED))
    ]
    product += [
        {"gradient_checkpointing": kept, "loss": LossPath.CHUNKED, "optimizer": "paged_adamw_32bit"}
        for kept in ("off", "full")
    ]
    return [
        TrainingConfig(
            sequence_length=sequence_length,
            micro_batch_size=micro_batch,
            gradient_accumulation_steps=EFFECTIVE_BATCH // micro_batch,
            compute_dtype=compute_dtype,
            **settings,
        )
        for settings in product
        for micro_batch in MICRO_BATCHES
    ]


def problems(
    source: ModelSource,
    cards: Sequence[str],
    lengths: Sequence[int],
    runner: DryRunner,
    configs_at: Callable[[int, str], list[TrainingConfig]] = grid,
) -> list[dict[str, Any]]:
    """A file's entries for these cards, one for each kernel set and length."""
    alike: dict[tuple[KernelSet, str], list[str]] = {}
    for name in cards:
        card = card_named(name)
        alike.setdefault((target_of_card(card).kernels, compute_dtype_of(card)), []).append(name)
    found = []
    for (kernels, compute_dtype), names in alike.items():
        runner.prepare(source, [c for length in lengths for c in configs_at(length, compute_dtype)], kernels)
        for length in lengths:
            found.append(_problem(source, configs_at(length, compute_dtype), kernels, names, runner))
    return found


def _problem(
    source: ModelSource, configs: list[TrainingConfig], kernels: KernelSet, names: Sequence[str], runner: DryRunner
) -> dict[str, Any]:
    """One model at one length on cards of one kernel set."""
    traced = list(_traced(source, configs, kernels, runner))
    memory = [forecast_memory(trace, config, kernels) for config, trace in traced]
    rows = [[m.training_peak_allocated_bytes, m.peak_allocated_bytes, m.peak_reserved_bytes] for m in memory]
    return {
        "sequence_length": configs[0].sequence_length,
        "compute_dtype": configs[0].compute_dtype,
        "kernels": asdict(kernels),
        "configs": [[to_json(getattr(config, name)) for name in SETTINGS] for config, _ in traced],
        "bytes": [[*row, one.paged_bytes] for row, one in zip(rows, memory, strict=True)],
        "cards": {name: _on_card(name, traced) for name in names},
    }


def _traced(
    source: ModelSource, configs: list[TrainingConfig], kernels: KernelSet, runner: DryRunner
) -> Iterator[tuple[TrainingConfig, Trace]]:
    """Those that can be predicted."""
    for config in configs:
        try:
            yield config, runner.trace(source, config, kernels)
        except (InvalidRequest, NotAlike) as error:
            click.echo(f"left out: {error}", err=True)


def _on_card(name: str, traced: Sequence[tuple[TrainingConfig, Trace]]) -> dict[str, Any]:
    """Seconds by kind of operator, and what is reserved where the card's memory is the limit."""
    card, target = card_named(name), replace(target_named(name), card=None)  # None: the time is reckoned apart
    seconds = [forecast_time(trace, config, card).by_kind for config, trace in traced]
    kinds = sorted({kind for one in seconds for kind in one})
    limited = []
    for number, (config, trace) in enumerate(traced):
        free = forecast_memory(trace, config, target.kernels).peak_reserved_bytes
        reserved = forecast(trace, config, target).memory.peak_reserved_bytes
        if reserved != free:
            limited.append([number, reserved])
    return {
        "kinds": kinds,
        "seconds": [[float(f"{one.get(kind, 0.0):.{_DIGITS}g}") for kind in kinds] for one in seconds],
        "limited": limited,
    }


def write_surfaces(folder: Path, source: ModelSource, found: Sequence[dict[str, Any]]) -> Path:
    """One model's file: the same content gives the same bytes."""
    document = {
        "schema": SCHEMA,
        "model": source.name,
        "versions": library_versions(),
        "effective_batch_size": EFFECTIVE_BATCH,
        "settings": SETTINGS,
        "problems": found,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, source.name)
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    return path


def read_surfaces(model: str, folder: Path = FOLDER) -> Iterator[Surface]:
    """One model's surfaces, by card and length. Raises `InvalidRequest` where there are none."""
    path = _path(folder, model)
    if not path.is_file():
        raise InvalidRequest(f"no surfaces of {model} in {folder.name}: `python -m benchmarks.surfaces` makes them")
    document = json.loads(gzip.decompress(path.read_bytes()))
    if document.get("schema") != SCHEMA:
        raise InvalidRequest(f"{path.name} is of {document.get('schema')!r}, not {SCHEMA}: make it anew")
    for problem in document["problems"]:
        configs = [_config(problem, document, values) for values in problem["configs"]]
        for name, on_card in problem["cards"].items():
            yield Surface(
                model=document["model"],
                card=name,
                sequence_length=problem["sequence_length"],
                points=tuple(_points(configs, problem["bytes"], on_card)),
            )


def _path(folder: Path, model: str) -> Path:
    return folder / f"{model.rpartition('/')[2].lower()}.json.gz"


def _config(problem: dict[str, Any], document: dict[str, Any], values: list[Any]) -> TrainingConfig:
    settings = dict(zip(document["settings"], values, strict=True))
    settings |= {name: problem[name] for name in ("sequence_length", "compute_dtype")}
    settings["gradient_accumulation_steps"] = document["effective_batch_size"] // settings["micro_batch_size"]
    return from_json(TrainingConfig, settings)


def _points(configs: list[TrainingConfig], sizes: list[list[int]], on_card: dict[str, Any]) -> Iterator[Point]:
    limited: dict[int, int] = dict(on_card["limited"])
    for number, (config, row, seconds) in enumerate(zip(configs, sizes, on_card["seconds"], strict=True)):
        training, allocated, reserved, paged = row
        kinds = zip(on_card["kinds"], seconds, strict=True)
        yield Point(
            config=config,
            training_peak_allocated_bytes=training,
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            limited_reserved_bytes=limited.get(number),
            paged_bytes=paged,
            seconds_by_kind={kind: value for kind, value in kinds if value},
        )


def _made(model: str, cards: Sequence[str], lengths: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    return problems(resolve_model(model), cards, lengths, _runner(folder))


@functools.cache
def _runner(folder: Path) -> DryRunner:
    """One for all models of this process: its workers import the training libraries once."""
    runner = DryRunner(TraceStore(folder))
    atexit.register(runner.close)
    return runner


@click.command(help=__doc__)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the files.")
@click.option("--model", "models", multiple=True, default=MODELS, show_default=True, help="A built-in id, repeatable.")
@click.option("--card", "cards", multiple=True, default=CARDS, show_default=True, help="A card's name, repeatable.")
@click.option("--traces", type=click.Path(path_type=Path, file_okay=False), help="Folder that keeps traces for later.")
@click.option("--processes", type=click.IntRange(1, 64), default=2, show_default=True)
def main(output: Path, models: tuple[str, ...], cards: tuple[str, ...], traces: Path | None, processes: int) -> None:
    """One task for each model: minutes each, half an hour in all."""
    with one_line_errors(), tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes) as pool:
        made = {pool.submit(_made, model, cards, LENGTHS, traces or Path(folder)): model for model in models}
        for done in as_completed(made):
            path = write_surfaces(output, resolve_model(made[done]), done.result())
            click.echo(f"written: {path}", err=True)


if __name__ == "__main__":
    main()
