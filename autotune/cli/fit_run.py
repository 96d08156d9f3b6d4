"""What `autotune fit` does once its options are parsed: join the rooms, run the flow, print."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from autotune.cli.fit_dataset import Dataset, dataset_document, read_dataset, with_dataset
from autotune.cli.fit_space import narrowing_of
from autotune.cli.words import say
from autotune.consent import consents
from autotune.errors import GpuUnavailable, Interrupted, InvalidRequest, NothingFits, UsageError
from autotune.fitfile import write_file, write_fit
from autotune.frontier import BUDGET_S, KNOWN_BUDGET_S, candidates_of, frontier
from autotune.hardware.cpu import card_of_cpu
from autotune.hardware.environment import is_own_python, read_environment
from autotune.hardware.readers import read_machine
from autotune.hardware.select import check_headroom, check_memory_limit, default_headroom_bytes, select_device
from autotune.hardware.sizes import InvalidSize, format_bytes, parse_bytes
from autotune.predict.store import TraceStore
from autotune.probe.dry_run import DryRunner
from autotune.probe.predictor import FitPredictor, target_of_device
from autotune.recommendation import closest_trial, fit_document, fit_file_document, missing_bytes
from autotune.search.space import build_space
from autotune.tuner import Seams, fit, observe, request_id
from autotune.values import (
    GIB,
    LIBRARIES,
    MIB,
    TRAINER_ADAPTER_DTYPE,
    TRAINER_LOSS,
    TRAINER_UPCAST,
    Attention,
    Consent,
    Device,
    Environment,
    FitRequest,
    FitStatus,
    Isolation,
    ModelSource,
    Recommendation,
    Trainer,
    TrainingConfig,
    Upcast,
)
from autotune.workload.models import check_optimizer, check_sequence_length, resolve_model
from gpu_db.store import GpuStore, default_home, open_store
from strategies import LADDER


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What is asked where the user does not say."""

    model: str
    sequence_length: int
    effective_batch_size: int
    memory_limit_bytes: int | None
    max_probes: int


LEARNED_FROM = 500  # of the device's stored trials the newest: reading one takes 0.2 ms

GPU_DEFAULTS = Defaults(
    model="meta-llama/Meta-Llama-3-8B",
    sequence_length=2048,
    effective_batch_size=16,
    memory_limit_bytes=None,
    max_probes=24,
)
CPU_DEFAULTS = Defaults(
    model="HuggingFaceTB/SmolLM2-135M",
    sequence_length=256,
    effective_batch_size=8,
    memory_limit_bytes=1500 * MIB,
    max_probes=10,
)


def defaults_for(device: Device) -> Defaults:
    return CPU_DEFAULTS if device.kind == "cpu" else GPU_DEFAULTS


def run(options: dict[str, Any]) -> None:
    """Fit and print. Raises `AutotuneError`; `NothingFits` after the result is printed."""
    dataset = read_dataset(options["dataset"], options["tokenizer"])
    for name in ("output", "plot"):
        _check_output(options[name], f"--{name}", force=options["force"])
    if options["plot"] and options["plot"] == options["output"]:
        raise UsageError(f"--plot and --output are both {options['plot']}: give one of them another name")
    device = choose_device(options["gpu"], options["python"])
    request, headroom = build_request(options, device)
    request = with_dataset(request, dataset)
    with stop_flag() as stopped:  # until here a signal ends the command at once: nothing is measured yet
        result = _fit(request, device, headroom, options, stopped)
    _report(result, dataset, options)


def choose_device(wanted: str, python: str | None) -> Device:
    """The device named, with its choice and other tenants told on stderr. Raises `GpuUnavailable`."""
    device, sentence = select_device(wanted, read_machine(python=python).devices)
    if sentence:
        say(sentence)
    if device.kind == "xpu":
        raise GpuUnavailable(f"{device.name}: fit runs on NVIDIA and AMD GPUs and on the CPU; try --gpu cpu")
    for tenant in device.tenants:
        held = format_bytes(tenant.used_bytes) if tenant.used_bytes is not None else "unknown memory"
        say(f"Note: process {tenant.pid} ({tenant.name or 'unknown'}) holds {held} of this card; it is left alone.")
    return device


def build_request(options: dict[str, Any], device: Device) -> tuple[FitRequest, int]:
    """The request and its headroom in bytes. Raises `InvalidRequest`, `UsageError`."""
    defaults = defaults_for(device)
    model = resolve_model(options["model"] or defaults.model, weights=options["weights"], say=say)
    limit = _stated_bytes(options, "memory_limit") or defaults.memory_limit_bytes
    if limit is not None:
        check_memory_limit(limit, device)
    stated = _stated_bytes(options, "headroom", smallest=0)
    headroom = default_headroom_bytes(device) if stated is None else stated
    check_headroom(headroom, limit, device)
    start = start_config(options, model, defaults, device)
    narrowing = narrowing_of(options)
    try:
        return FitRequest(
            model=model,
            start=start,
            min_sequence_length=options["min_sequence_length"],
            sequence_length_stated=options["sequence_length"] is not None,
            allow_near=options["allow"] == "near",
            min_lora_rank=options["min_lora_rank"],
            allow_fewer_modules=options["allow_fewer_modules"],
            memory_limit_bytes=limit,
            isolation=Isolation(options["isolation"]),
            fixed=narrowing.fixed,
            excluded=narrowing.excluded,
        ), headroom
    except ValueError as error:
        raise UsageError(str(error)) from error


def _stated_bytes(options: dict[str, Any], name: str, *, smallest: int = 1) -> int | None:
    """A size as stated, in bytes; None where it is not. Raises `InvalidSize`, naming the option."""
    if options[name] is None:
        return None
    try:
        return parse_bytes(options[name], smallest=smallest)
    except InvalidSize as error:
        raise InvalidSize(f"--{name.replace('_', '-')}: {error}") from error


def start_config(options: dict[str, Any], model: ModelSource, defaults: Defaults, device: Device) -> TrainingConfig:
    """What was asked, as one micro batch of the whole effective batch. Raises `InvalidRequest`, `UsageError`."""
    length = options["sequence_length"]
    if length is not None:
        check_sequence_length(model, length)
    else:
        shortest = options["min_sequence_length"] or 0
        check_sequence_length(model, shortest, option="--min-sequence-length")
        length = max(shortest, min(defaults.sequence_length, model.max_positions or defaults.sequence_length))
    if is_own_python(options["python"]):
        check_optimizer(options["optimizer"])
    trainer = Trainer(options["trainer"])
    try:
        return TrainingConfig(
            sequence_length=length,
            micro_batch_size=options["effective_batch_size"] or defaults.effective_batch_size,
            attention=Attention(options["attention"]),
            optimizer=options["optimizer"],
            compute_dtype=options["compute_dtype"] or default_compute_dtype(device),
            loss=TRAINER_LOSS[trainer],
            upcast=Upcast(options["upcast"]) if options["upcast"] else TRAINER_UPCAST[trainer],
            lora_rank=options["lora_rank"],
            lora_alpha=options["lora_alpha"],
            lora_dropout=options["lora_dropout"],
            target_modules=tuple(part.strip() for part in options["target_modules"].split(",") if part.strip()),
            adapter_dtype=TRAINER_ADAPTER_DTYPE[trainer],
            trainer=trainer,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def default_compute_dtype(device: Device) -> str:
    """bfloat16, but for NVIDIA cards before compute capability 8.0, which have no bfloat16 arithmetic."""
    major = (device.compute_capability or "").split(".")[0]
    return "float16" if device.kind == "cuda" and major.isdecimal() and int(major) < 8 else "bfloat16"


def _fit(
    request: FitRequest, device: Device, headroom: int, options: dict[str, Any], stopped: Callable[[], bool]
) -> Recommendation:
    from autotune.cli.progress import FitProgress
    from autotune.probe.executor import SubprocessExecutor
    from autotune.verdict.machine import MachineJudge

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = read_environment(options["python"], device, threads if device.kind == "cpu" else None)
    check_environment(environment, device, options["python"])
    installed = optional_packages(options["python"])
    build_space(request, device, installed=installed)  # refuses an empty one before anything is written
    with open_store(None, device) as store, FitProgress(device, request) as progress:
        store.add_request(request_id(request, headroom), request)
        executor = SubprocessExecutor(
            environment,
            python=options["python"],
            isolation=request.isolation,
            stop=stopped,
            watch=watcher(device),
            progress=progress.phase,
        )
        seams = Seams(
            executor=executor,
            store=store,
            judge=MachineJudge(device),
            observer=progress,
            now_utc=lambda: datetime.now(UTC).isoformat(timespec="seconds"),
            monotonic=time.monotonic,
        )
        predictor = None
        if not options["no_prediction"]:
            predictor = _predictor(request, device, headroom, options, stopped, environment, store)
        try:
            result = fit(
                request,
                device,
                dataclasses.replace(seams, predictor=predictor),
                ladder=LADDER,
                installed=installed,
                headroom_bytes=headroom,
                fresh=options["fresh"],
                max_probes=options["max_probes"] or defaults_for(device).max_probes,
                tolerance=options["tolerance"],
                budget_s=options["budget"],
            )
            return _with_frontier(_with_consents(result, predictor, installed), store, predictor, installed)
        finally:
            executor.close()
            if predictor:
                predictor.close()


def _with_consents(result: Recommendation, predictor: FitPredictor | None, installed: frozenset[str]) -> Recommendation:
    """Where nothing fits, the result with what each consent that is left would bring."""
    if result.status is not FitStatus.NOTHING_FITS or predictor is None:
        return result
    device = result.device
    observed = [observe(trial, on_cpu=device.kind == "cpu") for trial in result.trials]
    found = consents(result.request, device, observed, predictor, ladder=LADDER, installed=installed)
    return dataclasses.replace(result, consents=found)


def _with_frontier(
    result: Recommendation, store: GpuStore, predictor: FitPredictor | None, installed: frozenset[str]
) -> Recommendation:
    """The result with the fastest config at other lengths, from what is stored and what traces at hand predict."""
    stored = store.trials(model_fingerprint=result.request.model.fingerprint, latest=LEARNED_FROM)
    space = build_space(result.request, result.device, installed=installed)
    candidates = candidates_of(space, result.trials)
    budget_s = KNOWN_BUDGET_S if result.from_database else BUDGET_S
    rows, left_out = frontier(result, stored, candidates, predictor, monotonic=time.monotonic, budget_s=budget_s)
    return dataclasses.replace(result, frontier=rows, notes=(*left_out, *result.notes))


def _predictor(
    request: FitRequest,
    device: Device,
    headroom: int,
    options: dict[str, Any],
    stopped: Callable[[], bool],
    environment: Environment,
    store: GpuStore,
) -> FitPredictor:
    target = dataclasses.replace(target_of_device(device, request.memory_limit_bytes), headroom_bytes=headroom)
    traces = TraceStore(default_home() / "traces", {name: getattr(environment, name) for name in LIBRARIES})
    runner = DryRunner(traces, python=options["python"], stop=stopped)
    card = card_of_cpu(device, environment.threads or 1) if device.kind == "cpu" else None
    return FitPredictor(
        runner,
        request.model,
        target,
        environment,
        lambda: store.trials(latest=LEARNED_FROM),
        card=card,
        lengths=request.lengths,
    )


def check_environment(environment: Environment, device: Device, python: str | None) -> None:
    """Before a worker is started: raises `InvalidRequest` for missing packages, `GpuUnavailable` for another torch."""
    missing = [name for name in _NEEDED if getattr(environment, name) is None]
    if missing:
        raise InvalidRequest(
            f"{python or sys.executable} has no {', '.join(missing)}: install what is missing there"
            f" (pip install {' '.join(missing)}), or give --python the interpreter of your trainer's environment"
        )
    build = (environment.torch or "").partition("+")[2]
    if device.kind == "cuda" and build.startswith(("cpu", "rocm", "xpu")):
        raise GpuUnavailable(
            f"torch {environment.torch} is not built for CUDA and cannot use {device.name}: install a CUDA build"
            " (`autotune doctor` says how), give --python an environment that has one, or rehearse with --gpu cpu"
        )


_NEEDED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def watcher(device: Device) -> Callable[[], Device | None]:
    """A reading of this card now: NVML's; elsewhere nothing is read."""
    if device.kind != "cuda":
        return lambda: None

    def read() -> Device | None:
        from autotune.hardware.nvml import read_nvml

        return next((found for found in read_nvml().devices if found.uuid == device.uuid), None)

    return read


def optional_packages(python: str | None) -> frozenset[str]:
    """Which of the packages that widen the search the workers' interpreter has."""
    from autotune.hardware.ask import ask
    from autotune.hardware.ask_versions import installed_versions

    names = {"flash-attn": "flash_attn", "liger-kernel": "liger_kernel"}
    versions = (
        installed_versions(list(names)) if is_own_python(python) else ask("versions", *names, python=python)["versions"]
    )
    return frozenset(module for name, module in names.items() if versions[name] is not None)


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM set a flag that the flow asks; whatever is measured by then is kept.

    Once one came, later ones are ignored, on the way out too.
    """
    seen: list[int] = []
    handled = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup sets it
    before = {number: signal.signal(number, lambda got, frame: seen.append(got)) for number in handled}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if seen else handler)
    if seen:
        raise Interrupted("interrupted; what was measured is kept")


_STOPPING = (signal.SIGINT, signal.SIGTERM)


def _check_output(path: Path | None, option: str, *, force: bool) -> None:
    """Before minutes of probing, not after."""
    if path is None:
        return
    try:
        if path.is_dir():
            raise InvalidRequest(f"{option} {path} is a folder: give the name of a file")
        if path.exists() and not force:
            raise InvalidRequest(f"{path} exists: give --force to overwrite it, or another {option}")
        if not path.parent.is_dir():
            raise InvalidRequest(f"{path.parent} is no folder: make it first, or give another {option}")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written ({error.strerror}): give another {option}") from error


def _report(result: Recommendation, dataset: Dataset | None, options: dict[str, Any]) -> None:
    """The files where asked, the result to stdout. Raises `NothingFits`."""
    try:
        if options["output"] and result.status is FitStatus.FITTED:
            _write(result, options["output"], force=options["force"])
        if options["plot"]:
            _write_plot(result, options["plot"], force=options["force"])
    finally:  # a result that cannot be written is shown; one that cannot be shown is written
        _print(result, dataset, options)
    if result.status is not FitStatus.FITTED:
        raise NothingFits(nothing_fits_line(result), closest=closest_trial(result))


def _print(result: Recommendation, dataset: Dataset | None, options: dict[str, Any]) -> None:
    from autotune.cli.fit_text import print_fit, time_of_training

    training = time_of_training(result, dataset.facts if dataset else None, options["epochs"])
    if options["as_json"]:
        document = fit_document(result)
        if dataset:
            document["dataset"] = dataset_document(dataset, result.request.lengths)
        if training:
            document["training"] = training
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        print_fit(result, training)


def _write(result: Recommendation, path: Path, *, force: bool) -> None:
    document = fit_file_document(result)
    document["autotune"] = importlib.metadata.version("autotune-qlora") if _packaged() else None
    write_fit(path, document, force=force)
    trainer = "trl" if result.request.start.trainer is Trainer.TRL else "transformers"
    say(f"Written to {path}. Next: autotune export {path} --to {trainer}")


def _write_plot(result: Recommendation, path: Path, *, force: bool) -> None:
    """Memory and speed of the frontier, as SVG."""
    from autotune.predict.plot import svg_of_sweep

    points = [
        (row.sequence_length, row.memory_bytes / GIB if row.memory_bytes else None, row.tokens_per_second, is_measured)
        for row in result.frontier
        for is_measured in [row.origin == "measured"]
    ]
    title = f"{result.request.model.name} on {result.device.name}: the fastest config at each length"
    hollow = "predicted, without a speed not to fit; filled: measured"
    picture = svg_of_sweep(points, x_name="sequence length, tokens", title=title, hollow=hollow)
    write_file(path, picture, force=force)
    say(f"Written to {path}.")


def _packaged() -> bool:
    try:
        importlib.metadata.version("autotune-qlora")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def nothing_fits_line(result: Recommendation) -> str:
    """One line: what came closest, how much it lacked, and what would help."""
    why = result.notes[-1] if result.notes else "nothing fits"
    why = why if why.startswith("nothing fits") else f"nothing fits: {why}"
    known = " (known from the database, nothing was run; --fresh measures again)" if result.from_database else ""
    return f"{why}{known}{_closest_words(result)}. {_consents_words(result)}"


def _closest_words(result: Recommendation) -> str:
    closest = closest_trial(result)
    if closest is None:
        return ""
    config, missing = closest.config, missing_bytes(closest.judgement, closest.report)
    lacks = f", which lacked at least {format_bytes(missing)}" if missing else ""
    return (
        f"; closest: sequence length {config.sequence_length}, micro batch {config.micro_batch_size},"
        f" checkpointing {config.gradient_checkpointing}{lacks}"
    )


def _consents_words(result: Recommendation) -> str:
    """What is predicted to make it fit; without a prediction all that could be tried."""
    if not result.consents:
        return f"Try {', '.join(_untried(result.request))}"
    fits = [_offer(one) for one in result.consents if one.fits]
    others = [f"{_offer(one)} (needs {format_bytes(one.needed_bytes)})" for one in result.consents if not one.fits]
    words = f"Predicted to fit with {' or '.join(fits)}" if fits else "Try a smaller --model"
    return f"{words}; not with {', '.join(others)}" if others else words


def _offer(consent: Consent) -> str:
    if consent.kind == "more_memory":
        return consent.option or f"a card with {format_bytes(consent.needed_bytes)}"
    return consent.option or "a search without --fix, --exclude and --space"


def _untried(request: FitRequest) -> list[str]:
    start, ways = request.start, []
    if request.min_sequence_length is None and request.sequence_length_stated and start.sequence_length >= 4:
        ways.append(f"--min-sequence-length {start.sequence_length // 2}")
    if request.min_lora_rank is None and start.lora_rank > 4:
        ways.append("--min-lora-rank 4")
    if not request.allow_near:
        ways.append("--allow near")
    return [*ways, "a smaller --model or a larger --memory-limit"]
