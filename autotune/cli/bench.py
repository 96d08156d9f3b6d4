"""What a command that probes works with: interpreter, executor, judge, store and predictor, opened and closed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from autotune.errors import GpuUnavailable, Interrupted, InvalidRequest
from autotune.hardware.cpu import card_of_cpu
from autotune.hardware.environment import is_own_python, read_environment
from autotune.hardware.readers import watcher
from autotune.predict.store import TraceStore
from autotune.probe.dry_run import DryRunner
from autotune.probe.predictor import FitPredictor, target_of_device
from autotune.tuner import Seams, request_id
from autotune.values import LIBRARIES, Device, Environment, FitRequest
from gpu_db.store import GpuStore, default_home, open_store

if TYPE_CHECKING:
    from autotune.cli.progress import FitProgress

LEARNED_FROM = 500  # of the device's stored trials the newest: reading one takes 0.2 ms
_NEEDED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
_STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A fit's seams, with what of them a command asks beyond the flow."""

    seams: Seams
    store: GpuStore
    predictor: FitPredictor | None  # None: --no-prediction


@contextmanager
def open_bench(
    request: FitRequest,
    device: Device,
    headroom_bytes: int,
    environment: Environment,
    options: dict[str, Any],
    stopped: Callable[[], bool],
    progress: FitProgress,
) -> Iterator[Bench]:
    """The seams for this request on this device, its processes ended afterwards. Raises `StoreError`."""
    from autotune.probe.executor import SubprocessExecutor
    from autotune.verdict.machine import MachineJudge

    with open_store(None, device) as store, progress:
        store.add_request(request_id(request, headroom_bytes), request)
        executor = SubprocessExecutor(
            environment,
            python=options["python"],
            isolation=request.isolation,
            stop=stopped,
            watch=watcher(device),
            progress=progress.phase,
        )
        predictor = None
        if not options["no_prediction"]:
            predictor = predictor_of(
                request, device, headroom_bytes, environment, store, python=options["python"], stop=stopped
            )
        seams = Seams(
            executor=executor,
            store=store,
            judge=MachineJudge(device),
            observer=progress,
            now_utc=lambda: datetime.now(UTC).isoformat(timespec="seconds"),
            monotonic=time.monotonic,
            predictor=predictor,
        )
        try:
            yield Bench(seams=seams, store=store, predictor=predictor)
        finally:
            executor.close()
            if predictor:
                predictor.close()


def predictor_of(
    request: FitRequest,
    device: Device,
    headroom_bytes: int,
    environment: Environment,
    store: GpuStore,
    *,
    python: str | None,
    stop: Callable[[], bool],
) -> FitPredictor:
    """Predicts for this request, and learns from the device's stored trials."""
    target = replace(target_of_device(device, request.memory_limit_bytes), headroom_bytes=headroom_bytes)
    traces = TraceStore(default_home() / "traces", {name: getattr(environment, name) for name in LIBRARIES})
    return FitPredictor(
        DryRunner(traces, python=python, stop=stop),
        request.model,
        target,
        environment,
        lambda: store.trials(latest=LEARNED_FROM),
        card=card_of_cpu(device, environment.threads or 1) if device.kind == "cpu" else None,
        lengths=request.lengths,
    )


def read_checked_environment(device: Device, python: str | None) -> Environment:
    """What probes of this device run in. Raises as `check_environment` does."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = read_environment(python, device, threads if device.kind == "cpu" else None)
    check_environment(environment, device, python)
    return environment


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
