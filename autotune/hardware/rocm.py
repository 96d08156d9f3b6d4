"""AMD's GPUs (ROCm) and Intel's (XPU): what only torch knows, asked of a short-lived process, and what amdsmi adds."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.hardware.ask import Ask, NoAnswer, ask
from autotune.hardware.ask_versions import torch_build
from autotune.hardware.nvml import own_process_tree
from autotune.hardware.system import is_wsl
from autotune.values import Device, Tenant

_log = logging.getLogger(__name__)

_KFD = Path("/dev/kfd")  # ROCm's device node
_TORCH_LIMIT_S = 60.0  # importing torch from a cold disk takes tens of seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchReading:
    """GPUs as torch sees them, in its order; `problems` in words."""

    devices: tuple[Device, ...] = ()
    problems: tuple[str, ...] = ()


def worth_asking(build: dict[str, str | None] | None = None, kfd: Path = _KFD) -> bool:
    """Whether starting torch (seconds) could find a GPU that NVML does not know.

    `build` is `ask_versions.torch_build()`'s answer: a CPU or CUDA build sees no other card.
    """
    facts = torch_build() if build is None else build
    if not facts.get("version"):
        return False
    if facts.get("xpu"):
        return True
    return bool(facts.get("hip")) and (kfd.exists() or _amdsmi_importable() or is_wsl())


def _amdsmi_importable() -> bool:
    return importlib.util.find_spec("amdsmi") is not None


def read_torch_devices(
    python: str | None = None,
    *,
    ask: Ask = ask,
    amd: Callable[[], list[AmdFacts]] | None = None,
    own_pids: Iterable[int] | None = None,
) -> TorchReading:
    """ROCm and XPU devices that `python`'s torch sees. Never raises; what went wrong is in `problems`."""
    try:
        facts = ask("torch", python=python, timeout_s=_TORCH_LIMIT_S)
    except NoAnswer as error:
        return TorchReading(problems=(f"torch could not be asked for devices: {error}",))
    found = [item for item in facts.get("devices", []) if item.get("kind") in ("rocm", "xpu")]
    extras = (amd or read_amdsmi)() if any(item["kind"] == "rocm" for item in found) else []
    pids = frozenset(own_process_tree() if own_pids is None else own_pids)
    devices = tuple(_device(item, facts, extras, pids, alone=len(found) == 1) for item in found)
    return TorchReading(devices=devices, problems=tuple(facts.get("problems", ())))


@dataclass(frozen=True, slots=True, kw_only=True)
class AmdFacts:
    """What amdsmi says of one GPU."""

    pci: tuple[int, int, int] | None  # domain, bus, device
    driver: str | None = None
    tenants: tuple[Tenant, ...] = ()


def read_amdsmi(module: Any = None) -> list[AmdFacts]:
    """Facts of each AMD GPU; an empty list where amdsmi is missing or cannot be asked."""
    amdsmi = _import_amdsmi() if module is None else module
    if amdsmi is None:
        return []
    try:
        amdsmi.amdsmi_init()
    except amdsmi.AmdSmiException as error:
        _log.info("amdsmi: %s", error)
        return []
    try:
        handles = _attempt(amdsmi, amdsmi.amdsmi_get_processor_handles) or []
        return [_amd_facts(amdsmi, handle) for handle in handles]
    finally:
        _attempt(amdsmi, amdsmi.amdsmi_shut_down)


def _import_amdsmi() -> Any:
    try:
        import amdsmi
    except (ImportError, KeyError, OSError) as error:  # KeyError: 'libamd_smi.so' where the library is missing
        _log.info("amdsmi: %s", error)
        return None
    return amdsmi


def _attempt(amdsmi: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except amdsmi.AmdSmiException as error:
        _log.info("amdsmi: %s", error)
        return None


def _amd_facts(amdsmi: Any, handle: Any) -> AmdFacts:
    driver = _attempt(amdsmi, amdsmi.amdsmi_get_gpu_driver_info, handle)
    processes = _attempt(amdsmi, amdsmi.amdsmi_get_gpu_process_list, handle) or []
    return AmdFacts(
        pci=_parse_bdf(_attempt(amdsmi, amdsmi.amdsmi_get_gpu_device_bdf, handle)),
        driver=driver.get("driver_version") if isinstance(driver, dict) else None,
        tenants=tuple(_amd_tenant(item) for item in processes if isinstance(item, dict) and "pid" in item),
    )


def _parse_bdf(text: object) -> tuple[int, int, int] | None:
    """ "0000:03:00.0" as numbers."""
    try:
        domain, bus, rest = str(text).split(":")
        return int(domain, 16), int(bus, 16), int(rest.split(".")[0], 16)
    except ValueError:
        return None


def _amd_tenant(process: dict[str, Any]) -> Tenant:
    usage = process.get("memory_usage")
    used = usage.get("vram_mem") if isinstance(usage, dict) else process.get("mem")
    name = process.get("name")
    return Tenant(
        pid=int(process["pid"]),
        name=name if isinstance(name, str) and name != "N/A" else None,
        used_bytes=used if isinstance(used, int) else None,
    )


def _device(
    item: dict[str, Any], facts: dict[str, Any], extras: list[AmdFacts], own_pids: frozenset[int], *, alone: bool
) -> Device:
    device = Device(
        kind=item["kind"],
        index=item["index"],
        name=item.get("name") or "GPU",
        uuid=item.get("uuid"),
        total_bytes=item.get("total_bytes"),
        free_bytes=item.get("free_bytes"),
        compute_capability=item.get("architecture"),
        driver=item.get("driver"),
        runtime=facts.get("hip") if item["kind"] == "rocm" else None,
        unified_memory=bool(item.get("integrated")),
        wsl=is_wsl(),
    )
    pci = (item.get("pci_domain_id"), item.get("pci_bus_id"), item.get("pci_device_id"))
    extra = next((one for one in extras if one.pci is not None and one.pci == pci), None)
    if extra is None and alone and len(extras) == 1:  # older torch does not say where a device is
        extra = extras[0]
    if extra is None:
        return device
    tenants = tuple(tenant for tenant in extra.tenants if tenant.pid not in own_pids)
    return replace(device, driver=extra.driver or device.driver, tenants=tenants)
