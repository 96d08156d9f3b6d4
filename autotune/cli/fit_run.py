"""What `autotune fit` does once its options are parsed: join the rooms, run the flow, print."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from autotune.dataset import DatasetFacts, describe_dataset
from autotune.errors import GpuUnavailable, InvalidRequest, NothingFits
from autotune.fitfile import write_fit
from autotune.hardware.readers import read_machine
from autotune.hardware.select import check_memory_limit, default_headroom_bytes, select_device
from autotune.hardware.sizes import format_bytes, parse_bytes
from autotune.recommendation import closest_trial, fit_document, fit_file_document
from autotune.tuner import Seams, fit, request_id
from autotune.values import (
    MIB,
    TRAINER_ADAPTER_DTYPE,
    TRAINER_LOSS,
    TRAINER_UPCAST,
    Attention,
    Device,
    FitRequest,
    FitStatus,
    Isolation,
    ModelSource,
    Recommendation,
    Trainer,
    TrainingConfig,
    Upcast,
)
from autotune.workload.models import check_sequence_length, resolve_model
from gpu_db.store import open_store
from strategies import LADDER


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What is asked where the user does not say."""

    model: str
    sequence_length: int
    effective_batch_size: int
    memory_limit_bytes: int | None
    max_probes: int


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
    with stop_flag() as stopped:
        dataset = describe_dataset(options["dataset"]) if options["dataset"] else None
        _check_output(options["output"], force=options["force"])
        device = choose_device(options["gpu"], options["python"])
        request, headroom = build_request(options, device)
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
    """The request and its headroom in bytes. Raises `InvalidRequest`."""
    defaults = defaults_for(device)
    model = resolve_model(options["model"] or defaults.model, weights=options["weights"], say=say)
    limit = parse_bytes(options["memory_limit"]) if options["memory_limit"] else defaults.memory_limit_bytes
    if limit is not None:
        check_memory_limit(limit, device)
    headroom = parse_bytes(options["headroom"]) if options["headroom"] else default_headroom_bytes(device)
    room = limit if limit is not None else device.total_bytes
    if room is not None and headroom >= room:
        raise InvalidRequest(f"--headroom {format_bytes(headroom)} leaves nothing of {format_bytes(room)}: give less")
    start = start_config(options, model, defaults, device)
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
        ), headroom
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def start_config(options: dict[str, Any], model: ModelSource, defaults: Defaults, device: Device) -> TrainingConfig:
    """What was asked, as one micro batch of the whole effective batch. Raises `InvalidRequest`."""
    length = options["sequence_length"]
    if length is not None:
        check_sequence_length(model, length)
    else:
        length = min(defaults.sequence_length, model.max_positions or defaults.sequence_length)
        length = max(length, options["min_sequence_length"] or 0)
        check_sequence_length(model, length)
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
        raise InvalidRequest(str(error)) from error


def default_compute_dtype(device: Device) -> str:
    """bfloat16, but for NVIDIA cards before compute capability 8.0, which have no bfloat16 arithmetic."""
    major = (device.compute_capability or "").split(".")[0]
    return "float16" if device.kind == "cuda" and major.isdecimal() and int(major) < 8 else "bfloat16"


def _fit(
    request: FitRequest, device: Device, headroom: int, options: dict[str, Any], stopped: Callable[[], bool]
) -> Recommendation:
    from autotune.cli.progress import FitProgress
    from autotune.hardware.environment import read_environment
    from autotune.probe.executor import SubprocessExecutor
    from autotune.verdict.machine import MachineJudge

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = read_environment(options["python"], device, threads if device.kind == "cpu" else None)
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
        try:
            return fit(
                request,
                device,
                seams,
                ladder=LADDER,
                installed=optional_packages(options["python"]),
                headroom_bytes=headroom,
                fresh=options["fresh"],
                max_probes=options["max_probes"] or defaults_for(device).max_probes,
            )
        finally:
            executor.close()


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
    from autotune.hardware.environment import is_own_python

    names = {"flash-attn": "flash_attn", "liger-kernel": "liger_kernel"}
    versions = (
        installed_versions(list(names)) if is_own_python(python) else ask("versions", *names, python=python)["versions"]
    )
    return frozenset(module for name, module in names.items() if versions[name] is not None)


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM set a flag that the flow asks; whatever is measured by then is kept."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda got, frame: seen.append(got)) for number in _STOPPING}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if seen:
        raise KeyboardInterrupt


_STOPPING = (signal.SIGINT, signal.SIGTERM)


def _check_output(path: Path | None, *, force: bool) -> None:
    """Before minutes of probing, not after."""
    if path is None:
        return
    if path.exists() and not force:
        raise InvalidRequest(f"{path} exists: give --force to overwrite it, or another --output")
    if not path.parent.is_dir():
        raise InvalidRequest(f"{path.parent} is no folder: make it first, or give another --output")


def _report(result: Recommendation, dataset: DatasetFacts | None, options: dict[str, Any]) -> None:
    """The result to stdout, the file where asked. Raises `NothingFits`."""
    from autotune.cli.fit_text import print_fit, time_of_training

    training = time_of_training(result, dataset, options["epochs"])
    if options["as_json"]:
        document = fit_document(result)
        if training:
            document["training"] = training
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        print_fit(result, training)
    if result.status is not FitStatus.FITTED:
        raise NothingFits(nothing_fits_line(result), closest=closest_trial(result))
    if options["output"]:
        document = fit_file_document(result)
        document["autotune"] = importlib.metadata.version("autotune-qlora") if _packaged() else None
        write_fit(options["output"], document, force=options["force"])
        trainer = "trl" if result.request.start.trainer is Trainer.TRL else "transformers"
        say(f"Written to {options['output']}. Next: autotune export {options['output']} --to {trainer}")


def _packaged() -> bool:
    try:
        importlib.metadata.version("autotune-qlora")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def nothing_fits_line(result: Recommendation) -> str:
    """One line: what came closest, and the consents that are left to give."""
    request, closest = result.request, closest_trial(result)
    near = ""
    if closest is not None:
        near = (
            f"; closest: sequence length {closest.config.sequence_length}, micro batch"
            f" {closest.config.micro_batch_size}, checkpointing {closest.config.gradient_checkpointing}"
        )
    ways = []
    if request.min_sequence_length is None and request.sequence_length_stated:
        ways.append(f"--min-sequence-length {max(1, request.start.sequence_length // 2)}")
    if request.min_lora_rank is None:
        ways.append("--min-lora-rank 4")
    if not request.allow_near:
        ways.append("--allow near")
    ways.append("a smaller --model or a larger --memory-limit")
    return f"nothing fits{near}. Try {', '.join(ways)}"


def say(line: str) -> None:
    """A line for people: stderr."""
    click.echo(line, err=True)
