"""The device and the request that the options of a fit ask for, defaults filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autotune.cli.fit_space import narrowing_of
from autotune.cli.words import say
from autotune.errors import GpuUnavailable, UsageError
from autotune.hardware.environment import is_own_python
from autotune.hardware.readers import read_machine
from autotune.hardware.select import check_headroom, check_memory_limit, default_headroom_bytes, select_device
from autotune.hardware.sizes import InvalidSize, format_bytes, parse_bytes
from autotune.values import (
    MIB,
    TRAINER_ADAPTER_DTYPE,
    TRAINER_LOSS,
    TRAINER_UPCAST,
    Attention,
    Device,
    FitRequest,
    Isolation,
    ModelSource,
    Trainer,
    TrainingConfig,
    Upcast,
)
from autotune.workload.models import check_optimizer, check_sequence_length, resolve_model


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
    headroom = default_headroom_bytes(device, limit) if stated is None else stated
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
