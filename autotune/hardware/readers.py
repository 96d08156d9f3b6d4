"""All devices of this machine in one reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from autotune.hardware.ask_versions import torch_build
from autotune.hardware.cpu import read_cpu
from autotune.hardware.nvml import NvmlReading, read_nvml
from autotune.hardware.rocm import TorchReading, read_torch_devices, worth_asking
from autotune.values import Device

_ROCM_PERHAPS: dict[str, str | None] = {"version": "unknown", "hip": "unknown"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is here: GPUs, most free memory first within a kind, then the CPU; and what could not be read."""

    devices: tuple[Device, ...]
    problems: tuple[str, ...] = ()

    @property
    def gpus(self) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.kind != "cpu")


def read_machine(
    *,
    environ: Mapping[str, str] | None = None,
    python: str | None = None,
    nvml: Callable[[Mapping[str, str] | None], NvmlReading] = read_nvml,
    torch: Callable[[str | None], TorchReading] = read_torch_devices,
    cpu: Callable[[], Device] = read_cpu,
) -> Machine:
    """Every device that a worker would see. Never raises.

    torch is asked (seconds) only where it could see a card that NVML does not know: a ROCm or XPU build. Of another
    `python` the build is not known; it is asked where there is no NVIDIA GPU and ROCm's device node exists.
    """
    nvidia = nvml(environ)
    problems = [*nvidia.problems]
    if nvidia.unavailable and not nvidia.no_driver:
        problems.append(f"NVML: {nvidia.unavailable}")
    build = torch_build() if python is None else _ROCM_PERHAPS if not nvidia.devices else {}
    other = torch(python) if worth_asking(build) else TorchReading()
    gpus = sorted([*_beside(nvidia.devices, other), *other.devices], key=_best_memory_first)
    return Machine(devices=(*gpus, cpu()), problems=(*problems, *other.problems))


def _beside(nvidia: Sequence[Device], other: TorchReading) -> list[Device]:
    """NVIDIA's cards, out of reach where torch is built for ROCm and sees a card: its "cuda:0" is that card."""
    if not any(device.kind == "rocm" for device in other.devices):
        return list(nvidia)
    note = "not reachable: torch here is a ROCm build"
    return [replace(device, index=None, problems=(*device.problems, note)) for device in nvidia]


def _best_memory_first(device: Device) -> tuple[str, bool, int, int]:
    """Devices that a worker cannot reach (no index) come last within their kind."""
    index = device.index
    return device.kind, index is None, -(device.free_bytes or 0), index or 0


@dataclass(frozen=True, slots=True)
class MachineReader:
    """The `DeviceReader` of this machine."""

    python: str | None = None

    def devices(self) -> tuple[Device, ...]:
        return read_machine(python=self.python).devices


def watcher(device: Device) -> Callable[[], Device | None]:
    """A reading of this card now: NVML's; elsewhere nothing is read."""
    if device.kind != "cuda":
        return lambda: None

    def read() -> Device | None:
        return next((found for found in read_nvml().devices if found.uuid == device.uuid), None)

    return read
