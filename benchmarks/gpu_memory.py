"""Predicted memory and step time beside what real probes measure on this card, config by config, with bars.

`python -m benchmarks.gpu_memory --output benchmarks/results`
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from autotune.cli.bench import check_environment, optional_packages, stop_flag
from autotune.cli.fit_request import default_compute_dtype
from autotune.errors import GpuUnavailable, InvalidRequest
from autotune.hardware.environment import read_environment
from autotune.hardware.readers import read_machine, watcher
from autotune.hardware.select import check_memory_limit, select_device
from autotune.hardware.sizes import format_bytes, parse_bytes
from autotune.predict.forecast import Forecast, Target
from autotune.predict.store import TraceStore
from autotune.probe.dry_run import DryRunFailed, DryRunner
from autotune.probe.executor import SubprocessExecutor
from autotune.probe.predictor import target_of_device
from autotune.values import (
    GIB,
    TRAINER_ADAPTER_DTYPE,
    Attention,
    Device,
    Isolation,
    LossPath,
    ModelSource,
    Prediction,
    ProbeReport,
    ProbeRequest,
    Quantization,
    Trainer,
    TrainingConfig,
    Upcast,
    Verdict,
    to_json,
)
from autotune.verdict.machine import MachineJudge
from autotune.workload.models import resolve_model
from benchmarks.allocator_history import figures, read_history, replay
from benchmarks.memory_accuracy import BARS as MEMORY_BARS
from benchmarks.memory_accuracy import Bar, error_percent, mean_and_worst
from benchmarks.records import (
    circumstances,
    model_folder,
    one_line_errors,
    plain_table,
    private_roots,
    record_path,
    shareable,
    usable_cores,
    write_record,
)
from benchmarks.speed_rank import BAR as RANK_BAR
from benchmarks.speed_rank import Group, Speed, groups

SCHEMA = "autotune.gpu_memory/1"
MODELS = "meta-llama/Llama-3.2-1B,Qwen/Qwen2.5-1.5B,meta-llama/Meta-Llama-3-8B"
FRESH_EVERY = 5  # the last of each five probes has a worker of its own
HISTORY_LIMIT_S = 240.0

#: |error| in %: (mean, worst). Reserved has the bar of what it is the most of.
BARS = {**MEMORY_BARS, "reserved": MEMORY_BARS["process"]}
MEASURES = ("allocated", "reserved", "process", "step time")

#: What is measured of each model, in this order: early rows differ in most ways, for a budget that ends. A warm worker
#: serves one quantisation and one trainer, so the rows that need another stand where a fresh one is due anyway.
TABLE = """
tokens batch checkpointing loss     attention          upcast  quantization  other
  1024     2 full          full     sdpa               fp32    nf4           -
  2048     1 every_2       chunked  sdpa               none    nf4           -
   512     4 off           full     eager              none    nf4           -
  4096     1 full          chunked  sdpa               none    nf4           -
  1024     1 full          full     sdpa               none    none          -

  2048     2 full          full     eager              fp32    nf4           -
  1024     1 off           full     sdpa               none    nf4           -
  1024     4 every_2       chunked  eager              none    nf4           -
   512     2 full          full     sdpa               none    nf4           adamw_8bit
  1024     2 full          chunked  sdpa               none    nf4           trl

  4096     1 every_2       full     sdpa               fp32    nf4           -
  2048     4 full          chunked  sdpa               none    nf4           -
  1024     1 off           chunked  eager              none    nf4           -
   512     1 off           full     sdpa               fp32    nf4           -
  2048     2 full          chunked  eager              none    nf4           -

  4096     1 full          full     eager              none    nf4           -
  2048     1 off           chunked  sdpa               none    nf4           -
   512     4 full          full     eager              fp32    nf4           -
  2048     4 every_2       full     sdpa               none    nf4           -
   512     1 full          chunked  eager              fp32    nf4           -

  4096     2 full          chunked  sdpa               none    nf4           -
  1024     4 off           chunked  eager              none    nf4           -
  2048     1 every_2       chunked  eager              fp32    nf4           -
  4096     1 off           full     sdpa               none    nf4           -
   512     2 every_2       chunked  sdpa               none    none          -

  2048     2 full          chunked  flash_attention_2  none    nf4           -
  1024     1 off           full     flash_attention_2  fp32    nf4           -
  4096     1 every_2       chunked  flash_attention_2  none    nf4           -
"""

#: Of a `ProbeReport`, what a record keeps: facts, with neither logs nor process ids.
FACTS = (
    "after_load_bytes",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_used_bytes",
    "device_used_before_bytes",
    "limit_bytes",
    "optimizer_state_bytes",
    "micro_batch_times_s",
    "optimizer_times_s",
    "loss",
    "phases_s",
    "wall_time_s",
    "startup_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One config: what was predicted, then measured. Errors are (predicted − measured) ÷ measured in %."""

    model: str
    number: int  # among the model's configs, from 0
    config: TrainingConfig
    isolation: Isolation
    skipped: str | None = None  # why it was not measured
    prediction: Prediction | None = None
    predicted_fits: bool | None = None
    verdict: Verdict | None = None
    evidence: tuple[str, ...] = ()
    measured: dict[str, Any] = field(default_factory=dict)  # bytes and seconds, by the names of `ProbeReport`
    step_time_s: float | None = None  # measured
    errors: dict[str, float] = field(default_factory=dict)  # by `MEASURES`; of what can be compared


# Configs


def configs(compute_dtype: str, packages: Collection[str]) -> list[TrainingConfig]:
    """The table's rows that `packages` ("flash_attn", "trl") allow, in order: two micro batches to a step."""
    found = [_config(row.split(), compute_dtype) for row in TABLE.strip().splitlines()[1:] if row]
    return [config for config in found if _needs(config) <= set(packages)]


def _config(cells: Sequence[str], compute_dtype: str) -> TrainingConfig:
    tokens, batch, checkpointing, loss, attention, upcast, quantization, other = cells
    trainer = Trainer.TRL if other == "trl" else Trainer.TRANSFORMERS
    return TrainingConfig(
        sequence_length=int(tokens),
        micro_batch_size=int(batch),
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        loss=LossPath(loss),
        attention=Attention(attention),
        upcast=Upcast(upcast),
        quantization=Quantization(quantization),
        trainer=trainer,
        adapter_dtype=TRAINER_ADAPTER_DTYPE[trainer],
        compute_dtype=compute_dtype,
        optimizer=other if other.startswith("adamw") else "adamw_torch_fused",
    )


def _needs(config: TrainingConfig) -> set[str]:
    flash = {"flash_attn"} if config.attention is Attention.FLASH_ATTENTION_2 else set()
    return flash | ({"trl"} if config.trainer is Trainer.TRL else set())


def label(config: TrainingConfig) -> str:
    """ "1024×2 full full sdpa fp32 nf4": as the table has it."""
    cells = [f"{config.sequence_length}×{config.micro_batch_size}", config.gradient_checkpointing, config.loss]
    cells += [config.attention, config.upcast, config.quantization]
    cells += ["trl"] if config.trainer is Trainer.TRL else []
    return " ".join(map(str, cells + ([config.optimizer] if config.optimizer == "adamw_8bit" else [])))


def isolation_of(number: int) -> Isolation:
    """Every fifth config is measured in a fresh worker."""
    return Isolation.FRESH if number % FRESH_EVERY == FRESH_EVERY - 1 else Isolation.WARM


# Measuring


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a run is made with."""

    device: Device
    target: Target
    limit_bytes: int | None
    runner: DryRunner
    executor: SubprocessExecutor
    judge: MachineJudge

    def close(self) -> None:
        """End every worker."""
        self.executor.close()
        self.runner.close()


def open_bench(device: Device, limit_bytes: int | None, traces: Path, stop: Callable[[], bool]) -> Bench:
    """Everything that a run needs, with nothing started. Raises `InvalidRequest`, `GpuUnavailable`."""
    environment = read_environment(None, device, usable_cores() if device.kind == "cpu" else None)
    check_environment(environment, device, None)
    return Bench(
        device=device,
        target=target_of_device(device, limit_bytes),  # with nothing of ours on the card yet
        limit_bytes=limit_bytes,
        runner=DryRunner(TraceStore(traces), stop=stop),
        executor=SubprocessExecutor(environment, stop=stop, watch=watcher(device)),
        judge=MachineJudge(device),
    )


def rows_of(
    bench: Bench, source: ModelSource, wanted: Sequence[TrainingConfig], is_over: Callable[[], bool]
) -> Iterator[Row]:
    """Yields each config's `Row` until `is_over`. Raises `Interrupted`."""
    limit = source.max_positions
    for number, config in enumerate(wanted):
        if is_over():
            say(f"{source.name}: its share of --budget-s is spent after {number} of {len(wanted)} configs.")
            return
        if limit is not None and config.sequence_length > limit:
            yield skip(source, number, config, f"the model has {limit:,} positions")
            continue
        if number % FRESH_EVERY == 0:  # dry runs side by side, and none beside a probe, whose time counts
            alike = [one for one in wanted[number : number + FRESH_EVERY] if one.sequence_length <= (limit or 10**9)]
            bench.runner.prepare(source, alike, bench.target.kernels)
        row = measure(bench, source, number, config)
        yield row
        if row.verdict is Verdict.DEVICE_LOST:
            say(f"{bench.device.name} is lost: {'; '.join(row.evidence)}.")
            return


def skip(source: ModelSource, number: int, config: TrainingConfig, why: str, found: Forecast | None = None) -> Row:
    """A row that is not measured, said on stderr."""
    say(f"{source.name} {label(config)}: skipped: {why}.")
    return Row(
        model=source.name,
        number=number,
        config=config,
        isolation=isolation_of(number),
        skipped=why,
        prediction=found.prediction() if found else None,
        predicted_fits=found.fits if found else None,
    )


def measure(bench: Bench, source: ModelSource, number: int, config: TrainingConfig) -> Row:
    """The prediction, then the probe. Raises `Interrupted`; a probe that dies is a row."""
    try:
        found = bench.runner.forecast(source, config, bench.target)
    except DryRunFailed as error:
        return skip(source, number, config, str(error))
    if found.fits is False:
        needs = f"predicted to need {format_bytes(found.device_used_bytes)} of {format_bytes(found.allowed_bytes)}"
        return skip(source, number, config, needs, found)
    request = ProbeRequest(model=source, config=config, device=bench.device.id, memory_limit_bytes=bench.limit_bytes)
    bench.judge.begin()
    report = bench.executor.probe(request, fresh=isolation_of(number) is Isolation.FRESH)
    judgement = bench.judge.judge(report, request)
    row = row_of(
        source, number, found, report, judgement.verdict, judgement.evidence, on_gpu=bench.device.kind != "cpu"
    )
    say(f"{source.name} {' '.join(cells_of(row))}")
    return row


def row_of(
    source: ModelSource,
    number: int,
    found: Forecast,
    report: ProbeReport,
    verdict: Verdict,
    evidence: tuple[str, ...],
    *,
    on_gpu: bool,
) -> Row:
    """Both sides of a config; errors only where it fitted."""
    prediction = found.prediction()
    step = report.step_time_s(found.config.gradient_accumulation_steps)
    errors = errors_of(prediction, report, step, on_gpu=on_gpu) if verdict is Verdict.FITS else {}
    return Row(
        model=source.name,
        number=number,
        config=found.config,
        isolation=report.isolation,
        prediction=prediction,
        predicted_fits=found.fits,
        verdict=verdict,
        evidence=evidence,
        measured={**{name: to_json(getattr(report, name)) for name in FACTS}, "failure": failure_of(report)},
        step_time_s=step,
        errors=errors,
    )


def failure_of(report: ProbeReport) -> str | None:
    """How it died, in one line."""
    failure = report.failure
    if failure is None:
        return None
    first = (failure.message.splitlines() or [""])[0][:300]
    return f"{failure.phase}: {failure.exception}: {first}"


def errors_of(
    prediction: Prediction, report: ProbeReport, step_time_s: float | None, *, on_gpu: bool
) -> dict[str, float]:
    """By measure, in %: of what both sides know.

    Allocated is that of training alone: a probe does not evaluate. Reserved and the process count in a fresh worker of
    a GPU alone: a warm one's reserved memory depends on its past, and the CPU has no caching allocator.
    """
    pairs: dict[str, tuple[float | None, float | None]] = {
        "allocated": (prediction.training_peak_allocated_bytes, report.peak_allocated_bytes),
        "step time": (prediction.step_time_s, step_time_s),
    }
    if on_gpu and report.isolation is Isolation.FRESH:
        pairs["reserved"] = (prediction.peak_reserved_bytes, report.peak_reserved_bytes)
        pairs["process"] = (prediction.device_used_bytes, report.device_used_bytes)
    known = {name: (pairs[name][0], pairs[name][1]) for name in MEASURES if name in pairs}
    return {name: error_percent(ours, theirs) for name, (ours, theirs) in known.items() if ours and theirs}


# The allocator's history


def history_of(model: str, config: TrainingConfig, bench: Bench, file: Path) -> dict[str, Any]:
    """Records one config's history in a process of its own and replays it; a failure is told in the answer."""
    say(f"{model} {label(config)}: recording the allocator's history …")
    known = {"model": model, "config": to_json(config)}
    with tempfile.TemporaryDirectory(prefix="autotune-history-") as folder:
        config_file = Path(folder) / "config.json"
        config_file.write_text(json.dumps(to_json(config)), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.allocator_history", "--record", str(file)]
        command += ["--gpu", bench.device.id, "--model", model, "--config", str(config_file)]
        command += ["--memory-limit", str(bench.limit_bytes)] if bench.limit_bytes else []
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HISTORY_LIMIT_S, check=False
            )
            if done.returncode:
                return {**known, "failed": (done.stderr.strip().splitlines() or ["no last words"])[-1]}
            history = read_history(file)
            return {**known, **figures(history, replay(history))}
        except (subprocess.TimeoutExpired, InvalidRequest) as error:
            return {**known, "failed": str(error).splitlines()[0]}


# Summary


def summary(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """By model and measure: how many rows, the mean and the worst of the absolute errors in %."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model in dict.fromkeys(row.model for row in rows):
        for measure_name in MEASURES:
            errors = [row.errors[measure_name] for row in rows if row.model == model and measure_name in row.errors]
            sizes = mean_and_worst(errors)
            if sizes:
                facts = {"rows": len(errors), "mean": sizes[0], "worst": sizes[1]}
                found.setdefault(model, {})[measure_name] = facts
    return found


def bars_of(rows: Sequence[Row]) -> list[Bar]:
    """Every model's measures that have a bar."""
    return [
        Bar(
            source=model,
            measure=name,
            rows=int(facts["rows"]),
            mean=facts["mean"],
            worst=facts["worst"],
            passed=facts["mean"] <= BARS[name][0] and facts["worst"] <= BARS[name][1],
        )
        for model, measures in summary(rows).items()
        for name, facts in measures.items()
        if name in BARS
    ]


def ranks_of(rows: Sequence[Row], card: str) -> list[Group]:
    """Each model's configs with both speeds, and Spearman's coefficient of them (`published` is measured)."""
    return groups(
        Speed(
            card=card,
            model=row.model,
            label=label(row.config),
            published=row.config.tokens_per_step / row.step_time_s,
            predicted=row.config.tokens_per_step / row.prediction.step_time_s,
        )
        for row in rows
        if row.verdict is Verdict.FITS and row.step_time_s and row.prediction and row.prediction.step_time_s
    )


# Output


_HEAD = (
    "config",
    "verdict",
    "worker",
    "predicted, GiB",  # allocated; of the other measures the table has what was measured
    "allocated",
    "%",
    "reserved",
    "%",
    "process",
    "%",
    "predicted, s",
    "step",
    "%",
)


def cells_of(row: Row) -> list[str]:
    """A line of the table: of each measure what was measured, and the prediction's error."""
    measured, errors = row.measured, row.errors
    predicted = row.prediction.training_peak_allocated_bytes if row.prediction else None
    return [
        label(row.config),
        "skipped" if row.skipped else str(row.verdict),
        row.isolation.value,
        _gib(predicted),
        _gib(measured.get("peak_allocated_bytes")),
        _percent(errors.get("allocated")),
        _gib(measured.get("peak_reserved_bytes")),
        _percent(errors.get("reserved")),
        _gib(measured.get("device_used_bytes")),
        _percent(errors.get("process")),
        _seconds(row.prediction.step_time_s if row.prediction else None),
        _seconds(row.step_time_s),
        _percent(errors.get("step time")),
    ]


def _gib(size: float | None) -> str:
    return "–" if size is None else f"{size / GIB:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def report(rows: Sequence[Row], card: str, history: dict[str, Any] | None, *, on_gpu: bool) -> str:
    """Every model's table, means and worst, bars, ranks, the history."""
    parts = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [cells_of(row) for row in rows if row.model == model]
        parts.append(f"{model}\n{plain_table([_HEAD, *mine])}")
    parts.append(_summary_text(rows))
    parts += ["\n".join(bar_lines(rows, card))] if on_gpu else ["A rehearsal on the CPU: no bars."]
    if history:
        parts.append(f"{_held(history.get('passed', False))}  allocator history: {_history_text(history)}")
    return "\n\n".join(parts)


def _summary_text(rows: Sequence[Row]) -> str:
    lines = [("model", "measure", "rows", "mean |error|, %", "worst, %")]
    for model, measures in summary(rows).items():
        for name, facts in measures.items():
            lines.append((model, name, str(int(facts["rows"])), f"{facts['mean']:.2f}", f"{facts['worst']:.2f}"))
    return plain_table(lines)


def bar_lines(rows: Sequence[Row], card: str) -> list[str]:
    """pass or FAIL of each model's measures and ranks."""
    lines = [
        f"{_held(bar.passed)}  {bar.source}: {bar.measure}, {bar.rows} rows: mean {bar.mean:.2f} %"
        f" (bar {BARS[bar.measure][0]:g}), worst {bar.worst:.2f} % (bar {BARS[bar.measure][1]:g})"
        for bar in bars_of(rows)
    ]
    for group in ranks_of(rows, card):
        value = "undefined" if group.spearman is None else f"{group.spearman:.3f}"
        if group.has_bar:
            lines.append(f"{_held(group.passed)}  {group.model}: tokens/s, Spearman {value} (bar {RANK_BAR})")
        else:
            lines.append(f"–     {group.model}: tokens/s, {len(group.speeds)} configs: too few to rank")
    return lines


def _held(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def _history_text(history: dict[str, Any]) -> str:
    if "failed" in history:
        return str(history["failed"])
    simulated, recorded = history["simulated"], history["recorded"]
    return (
        f"reserved {_gib(simulated['peak_reserved_bytes'])} GiB simulated, {_gib(recorded['max_reserved_bytes'])}"
        f" recorded ({_percent(history['reserved_error_percent'])} %, bar {history['bar_percent']:g}); allocated"
        f" {_percent(history['allocated_error_percent'])} %"
    )


def is_passed(rows: Sequence[Row], card: str, history: dict[str, Any] | None) -> bool:
    """Whether every bar holds, and there is one."""
    bars = [bar.passed for bar in bars_of(rows)] + [group.passed for group in ranks_of(rows, card)]
    bars += [bool(history.get("passed"))] if history else []
    return bool(bars) and all(bars)


# Command


@click.command()
@click.option("--gpu", default="auto", show_default=True, help="auto, cuda:N or a name; cpu rehearses the benchmark.")
@click.option("--models", default=MODELS, show_default=True, help="With commas: public ids, folders or config.json.")
@click.option("--limit-configs", type=click.IntRange(min=1), help="Of each model the first so many.")
@click.option(
    "--budget-s",
    type=click.FloatRange(min=0),
    default=480.0,
    show_default=True,
    help="Start nothing after so many seconds; each model has a share of what is left.",
)
@click.option("--memory-limit", help="Of the whole card, like 12GiB; by default all of it.")
@click.option(
    "--traces", type=click.Path(file_okay=False, path_type=Path), help="Folder that keeps dry runs for later."
)
@click.option("--no-history", is_flag=True, help="Record no allocator history.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the raw JSON, written after every config.",
)
def command(
    gpu: str,
    models: str,
    limit_configs: int | None,
    budget_s: float,
    memory_limit: str | None,
    traces: Path | None,
    no_history: bool,
    output: Path | None,
) -> None:
    """Predict each config, then probe it with real training steps on this GPU; compare.

    Exit 1 where a bar is missed, 4 without a GPU.

    \b
    Example:
      python -m benchmarks.gpu_memory --models meta-llama/Llama-3.2-1B --output benchmarks/results
    """
    began = time.monotonic()
    with one_line_errors():
        device = choose_device(gpu)
        limit = limit_of(memory_limit, device)
        names = [name.strip() for name in models.split(",") if name.strip()]
        sources = [resolve_model(name, say=say) for name in names]
        if not sources:
            raise InvalidRequest("--models names none: write it like meta-llama/Llama-3.2-1B,Qwen/Qwen2.5-1.5B")
        wanted = configs(default_compute_dtype(device), installed())[:limit_configs]
        options = {
            "models": [source.name for source in sources],
            "limit_configs": limit_configs,
            "budget_s": budget_s,
            "memory_limit_bytes": limit,
        }
        keeper = Keeper(device, options, output, names)
        with stop_flag() as stopped, tempfile.TemporaryDirectory(prefix="autotune-traces-") as folder:
            bench = open_bench(device, limit, traces or Path(folder), stopped)
            try:
                if not no_history and device.kind in ("cuda", "rocm"):
                    file = keeper.history_file(Path(folder))
                    keeper.keep_history(history_of(names[0], wanted[0], bench, file))
                for number, source in enumerate(sources):
                    over = _share(began + budget_s, len(sources) - number)
                    for row in rows_of(bench, source, wanted, over):
                        keeper.keep(row)
            finally:
                bench.close()
                keeper.show()
        sys.exit(0 if device.kind == "cpu" or is_passed(keeper.rows, device.name, keeper.history) else 1)


def _share(end: float, models_left: int) -> Callable[[], bool]:
    """Whether the next model's part of the time until `end` is over."""
    now = time.monotonic()
    mine = now + (end - now) / models_left
    return lambda: time.monotonic() >= mine


def choose_device(wanted: str) -> Device:
    """The card that `autotune fit` would take. Raises `GpuUnavailable`."""
    device, _ = select_device(wanted, read_machine().devices)
    if device.kind == "cpu" and wanted.lower() != "cpu":
        raise GpuUnavailable(
            "no GPU is visible here, and this benchmark is about one: `autotune doctor` says why;"
            " --gpu cpu --models config.json --limit-configs 2 rehearses it with a small model"
        )
    return device


def limit_of(text: str | None, device: Device) -> int | None:
    """Bytes. Raises `InvalidRequest` for what is no size or more than the device has."""
    if text is None:
        return None
    limit = parse_bytes(text)
    check_memory_limit(limit, device)
    return limit


def installed() -> set[str]:
    """Which of the packages that a config may need are here."""
    import importlib.util

    trl = {"trl"} if importlib.util.find_spec("trl") else set()
    return {*optional_packages(None), *trl}


class Keeper:
    """The record so far, written anew after every row."""

    def __init__(self, device: Device, options: dict[str, Any], output: Path | None, models: Sequence[str]) -> None:
        self.device = device
        self.rows: list[Row] = []
        self.history: dict[str, Any] | None = None
        self._roots = private_roots(*(model_folder(model) for model in models))
        self._record = {"schema": SCHEMA, **circumstances(device), "options": options}
        self._path = record_path(output, "gpu_memory", device, self._record["time_utc"][:10]) if output else None

    def history_file(self, otherwise: Path) -> Path:
        """Beside the record, else in the folder given."""
        return self._path.with_suffix(".history.gz") if self._path else otherwise / "history.gz"

    def keep_history(self, history: dict[str, Any]) -> None:
        self.history = history
        self._write()

    def keep(self, row: Row) -> None:
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        bars = [to_json(bar) for bar in bars_of(self.rows)] if self.device.kind != "cpu" else []
        ranked = ranks_of(self.rows, self.device.name)
        ranks = [{"model": g.model, "configs": len(g.speeds), "spearman": g.spearman} for g in ranked]
        means = [
            {"model": model, "measure": name, **facts}
            for model, measures in summary(self.rows).items()
            for name, facts in measures.items()
        ]
        found = {"history": self.history, "summary": means, "bars": bars, "spearman": ranks}
        record = {**self._record, **found, "rows": [to_json(row) for row in self.rows]}
        write_record(self._path, shareable(record, self._roots))

    def show(self) -> None:
        """The tables to stdout, where there is anything to show."""
        if self.rows:
            click.echo(report(self.rows, self.device.name, self.history, on_gpu=self.device.kind != "cpu"))
        if self._path:
            say(f"Written to {self._path}.")


def say(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    command()
