"""What works on this machine and what is missing, check by check, each with what to do next."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from autotune.hardware.ask import Ask, NoAnswer, ask
from autotune.hardware.environment import is_own_python
from autotune.hardware.nvml import NvmlReading, read_nvml
from autotune.hardware.readers import Machine, read_machine
from autotune.hardware.sizes import format_bytes
from autotune.hardware.system import is_wsl
from autotune.values import GIB, MIB, Device
from gpu_db.store import default_home

DISTRIBUTION = "autotune-qlora"
OPTIONAL = {
    "trl": "fits that run TRL's training step need it",
    "flash-attn": "FlashAttention 2 needs it; PyTorch's own attention works without",
    "liger-kernel": "Liger's fused loss needs it",
}
#: What a worker needs of a trainer's environment; the rest runs in autotune's own.
_WORKER = frozenset({"torch", "transformers", "peft", "bitsandbytes", "accelerate"})
_NVML_LIMIT_S = 20.0
_IMPORT_LIMIT_S = 60.0  # torch, from a cold disk
_LOW_DISK_BYTES = GIB
_NO_DISK_BYTES = 50 * MIB


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    message: str
    next_step: str | None = None  # what to do; None where all is well


def ok(name: str, message: str) -> Check:
    return Check(name=name, status=Status.OK, message=message)


def warn(name: str, message: str, next_step: str) -> Check:
    return Check(name=name, status=Status.WARN, message=message, next_step=next_step)


def fail(name: str, message: str, next_step: str) -> Check:
    return Check(name=name, status=Status.FAIL, message=message, next_step=next_step)


def run_checks(
    python: str | None = None,
    *,
    ask: Ask = ask,
    nvml: Callable[[Mapping[str, str]], NvmlReading] = read_nvml,
    machine: Callable[[NvmlReading], Machine] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Check]:
    """Every check in turn, of `python`'s environment (None: this one). Never raises, and each wait has a limit."""
    environment = os.environ if environ is None else environ
    driver = _within(_NVML_LIMIT_S, lambda: nvml(environment))
    if driver is None:
        yield fail("driver", f"NVML gave no answer within {_NVML_LIMIT_S:g} s", "reset the GPU or restart the machine")
        driver = NvmlReading(unavailable="no answer")
    else:
        yield check_driver(driver)
    known = driver
    here = machine(known) if machine else read_machine(python=python, nvml=lambda _: known)
    yield from _check_python(python, here, ask)
    yield from check_disk(default_home(environment))
    yield from check_platform(here, environment, driver.count)


def _within(limit_s: float, call: Callable[[], NvmlReading]) -> NvmlReading | None:
    """The call's result, or None after `limit_s`: a wedged card lets a driver call hang."""
    results: list[NvmlReading] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(limit_s)
    return results[0] if results else None


def check_driver(driver: NvmlReading) -> Check:
    """The NVIDIA driver."""
    name = "driver"
    if driver.no_driver:
        return warn(
            name,
            "no NVIDIA driver (libnvidia-ml is not installed)",
            "install the driver if this machine has an NVIDIA card; without a GPU, fits rehearse on the CPU",
        )
    if driver.unavailable:
        return fail(
            name,
            f"the NVIDIA driver does not answer: {driver.unavailable}",
            "load or reinstall the driver; after a driver update restart the machine",
        )
    about = f"NVIDIA {driver.driver or 'of unknown version'}, CUDA {driver.cuda or 'unknown'}, {_counted(driver.count)}"
    if driver.problems:
        return warn(name, f"{about}; {'; '.join(driver.problems)}", "`nvidia-smi` and `dmesg` say more")
    return ok(name, about)


def _counted(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def _check_python(python: str | None, here: Machine, ask: Ask) -> Iterator[Check]:
    bounds = lower_bounds()
    try:
        facts = ask("versions", *bounds, *OPTIONAL, python=python)
    except NoAnswer as error:
        yield fail("python", f"{python} cannot be run: {error}", "give --python the interpreter of your trainer")
        return
    yield check_python_version(facts["python"])
    if not bounds:
        yield warn("packages", f"{DISTRIBUTION} is not installed as a package", "`pip install autotune-qlora`")
    for name, bound in bounds.items():
        if is_own_python(python) or name in _WORKER:
            yield check_package(name, facts["versions"].get(name), bound)
    if facts["versions"].get("torch"):
        yield check_torch(here, python, ask)
    if facts["versions"].get("bitsandbytes"):
        yield check_bitsandbytes(python, ask)
    for name, why in OPTIONAL.items():
        version = facts["versions"].get(name)
        yield ok(name, version or f"not installed (optional: {why})")


def lower_bounds() -> dict[str, str]:
    """The lowest version of each core package, from this package's own metadata; empty where it is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    needed = [Requirement(line) for line in lines]
    return {
        one.name: next((item.version for item in one.specifier if item.operator == ">="), "0")
        for one in needed
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }


def check_python_version(version: str) -> Check:
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (3, 11):
        return fail("python", f"Python {version}", "autotune needs Python 3.11 or newer")
    return ok("python", f"Python {version}")


def check_package(name: str, version: str | None, bound: str) -> Check:
    """One package against its lower bound."""
    from packaging.version import InvalidVersion, Version

    install = f"`pip install '{name}>={bound}'`"
    if version is None:
        return fail(name, "not installed", install)
    try:
        old = Version(version) < Version(bound)
    except InvalidVersion:
        return warn(name, f"version {version} cannot be compared with {bound}", install)
    if old:
        return fail(name, f"{version} is older than {bound}", install)
    return ok(name, version)


def check_torch(here: Machine, python: str | None, ask: Ask) -> Check:
    """torch's build, whether it starts, and whether it sees the GPUs that the driver lists."""
    name = "torch and GPU"
    try:
        facts = ask("torch", python=python, timeout_s=_IMPORT_LIMIT_S)
    except NoAnswer as error:
        return fail(name, f"torch does not start: {error}", "reinstall torch (pytorch.org says how)")
    build = _build(facts)
    seen = facts["devices"]
    listed = [device for device in here.gpus if device.kind == "cuda" and device.index is not None]
    trouble = "; ".join(facts.get("problems", ()))
    if not listed and not seen:
        return ok(name, f"{build}; no GPU to see" + (f" ({trouble})" if trouble else ""))
    if not seen:
        return fail(name, f"{build} sees none of {_counted(len(listed))}. {trouble}".strip(), _remedy(facts, listed))
    if listed and len(seen) != len(listed):
        counts = f"{build} sees {_counted(len(seen))}, the driver lists {len(listed)}"
        return warn(name, counts, "choose the device by UUID: CUDA_VISIBLE_DEVICES=GPU-…")
    if trouble:
        return warn(name, f"{build} sees {_counted(len(seen))}; {trouble}", "free the card's memory, or reset it")
    return ok(name, f"{build} sees {_counted(len(seen))}")


def _build(facts: Mapping[str, Any]) -> str:
    if facts.get("hip"):
        return f"torch {facts['torch']} (ROCm {facts['hip']})"
    return f"torch {facts['torch']} ({'CUDA ' + facts['cuda'] if facts.get('cuda') else 'CPU build'})"


def _remedy(facts: Mapping[str, Any], listed: list[Device]) -> str:
    if not facts.get("cuda"):
        return "install a CUDA build of torch: pytorch.org/get-started gives the command"
    offered = listed[0].runtime
    if offered and _numbers(offered) < _numbers(facts["cuda"]):
        return f"the driver runs CUDA {offered} at most: update it, or install a torch built for that version"
    return "restart the machine or the container; then `nvidia-smi` and a new `autotune doctor`"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def check_bitsandbytes(python: str | None, ask: Ask) -> Check:
    """Whether the 4-bit kernels load."""
    name = "bitsandbytes library"
    next_step = "reinstall bitsandbytes for this torch build: `python -m bitsandbytes` says what it looked for"
    try:
        facts = ask("bitsandbytes", python=python, timeout_s=_IMPORT_LIMIT_S)
    except NoAnswer as error:
        return fail(name, f"it does not load: {error}", next_step)
    if not facts.get("loaded"):
        return fail(name, "no native library for this torch build could be loaded", next_step)
    return ok(name, f"loads ({facts.get('library')})")


def check_disk(home: Path) -> Iterator[Check]:
    """Room in the data folder, and whether databases can be written there. Creates nothing that stays."""
    folder = home / "gpus"
    standing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(standing).free
    next_step = f"free some room, or point AUTOTUNE_HOME elsewhere (now {home})"
    if free < _NO_DISK_BYTES:
        yield fail("disk", f"{format_bytes(free)} free at {standing}", next_step)
    elif free < _LOW_DISK_BYTES:
        yield warn("disk", f"{format_bytes(free)} free at {standing}", next_step)
    else:
        yield ok("disk", f"{format_bytes(free)} free at {standing}")
    try:
        with tempfile.TemporaryFile(dir=standing) as file:
            file.write(b"autotune")
    except OSError as error:
        reason = error.strerror or str(error)
        yield fail("database", f"{folder} cannot be written: {reason}", "point AUTOTUNE_HOME at a folder of yours")
    else:
        yield ok("database", str(folder))


def check_platform(here: Machine, environ: Mapping[str, str], nvidia_count: int = 0) -> Iterator[Check]:
    """What is particular about this machine and its cards, and who else is on them.

    `nvidia_count` is how many GPUs the driver has, hidden ones too.
    """
    for problem in here.problems:
        yield warn("devices", problem, "`autotune gpus` shows what could be read")
    if platform.system() == "Linux" and is_wsl() and here.gpus:
        yield warn(
            "WSL2",
            "over-full card memory can spill to system memory here instead of failing, 10-100 times slower",
            'set "CUDA - Sysmem Fallback Policy" to "Prefer No Sysmem Fallback" in the NVIDIA Control Panel',
        )
    if nvidia_count > 1 and _counts_in_unstated_order(environ):
        yield warn(
            "device order",
            "CUDA_VISIBLE_DEVICES counts by PCI address in autotune, by speed in CUDA's default",
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or write UUIDs in CUDA_VISIBLE_DEVICES",
        )
    for device in here.gpus:
        yield from check_device(device)


def _counts_in_unstated_order(environ: Mapping[str, str]) -> bool:
    ordinals = re.match(r"\s*\d", environ.get("CUDA_VISIBLE_DEVICES", ""))
    return ordinals is not None and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"


def check_device(device: Device) -> Iterator[Check]:
    """One card: MIG, vGPU, unified memory, other processes, calls that failed."""
    name = device.id if device.index is not None else device.name
    if device.mig == "enabled":
        yield ok(name, f"{device.name} is in MIG mode: its slices are the devices")
    elif device.mig:
        yield ok(name, f"MIG slice {device.mig} of {device.name}: what is learned is kept for this slice size")
    if device.virtual:
        yield warn(name, "a vGPU: its speed depends on its neighbours", "measure again when results look odd")
    if device.unified_memory:
        yield warn(
            name,
            "its memory is the machine's own, so every program takes from it",
            "close other programs, or give --memory-limit",
        )
    if device.tenants:
        users = ", ".join(
            f"{tenant.name or 'a process'} (pid {tenant.pid}, {format_bytes(tenant.used_bytes)})"
            for tenant in device.tenants
        )
        yield warn(name, f"also used by {users}", "end what is not needed: a fit counts on the memory that is free")
    for problem in device.problems:
        yield warn(name, problem, "autotune goes on without it; a newer driver may know more")
