"""NVIDIA's GPUs as their driver describes them, through NVML.

No call is taken for granted: old drivers lack symbols, MIG, vGPU, WSL2 and unified-memory machines answer "Not
Supported". A call that fails costs its own field alone, and says so in `Device.problems`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from autotune.hardware.cpu import host_memory
from autotune.hardware.system import is_wsl
from autotune.hardware.visible import Card, Place, visible_places
from autotune.values import Device, Tenant

_MIG_ENABLED = 1  # NVML_DEVICE_MIG_ENABLE
_VIRTUALIZATION_VGPU = 2  # NVML_GPU_VIRTUALIZATION_MODE_VGPU: this is a guest's slice of a card
_MIG_PROFILE = re.compile(r"\s*\bMIG ((?:\d+c\.)?\d+g\.\d+gb\S*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlReading:
    """What NVML said: visible GPUs in CUDA's order, then MIG parents and slices that CUDA will not enumerate."""

    devices: tuple[Device, ...] = ()
    driver: str | None = None
    cuda: str | None = None  # newest CUDA version that the driver runs
    count: int = 0  # GPUs that NVML sees, hidden ones too
    unavailable: str | None = None  # why NVML could not be asked at all
    no_driver: bool = False  # that is because no driver is installed
    problems: tuple[str, ...] = ()  # GPUs that could not be opened, in words


@dataclass(slots=True)
class _Calls:
    """Calls pynvml's functions by name, turning a failure into None and a sentence."""

    pynvml: Any
    problems: list[str] = field(default_factory=list)

    def get(self, what: str, name: str, *args: Any, expected: tuple[int, ...] = ()) -> Any:
        """What the call gives, or None. Error codes in `expected` are an answer, not a problem."""
        value, error = self.attempt(name, *args)
        if error is not None and getattr(error, "value", None) not in expected:
            self.problems.append(f"{what}: {error}")
        return value

    def attempt(self, name: str, *args: Any) -> tuple[Any, Exception | None]:
        # NVMLLibraryMismatchError (a driver without a versioned symbol) is a plain Exception, not an NVMLError.
        try:
            return getattr(self.pynvml, name)(*args), None
        except (self.pynvml.NVMLError, self.pynvml.NVMLLibraryMismatchError) as error:
            return None, error


@dataclass(slots=True)
class _Opened:
    """A GPU's handle and what places it."""

    handle: Any
    pci: tuple[int, int, int] | None  # domain, bus, device
    uuid: str | None
    mig: bool
    slices: list[tuple[Any, str | None]]  # handle, UUID
    problems: list[str]

    @property
    def card(self) -> Card:
        return Card(self.uuid, tuple(uuid for _, uuid in self.slices) if self.mig else None)


def read_nvml(environ: Mapping[str, str] | None = None, own_pids: Iterable[int] | None = None) -> NvmlReading:
    """Every GPU that CUDA_VISIBLE_DEVICES in `environ` (default: this process's) shows. Never raises.

    Processes in `own_pids` (default: this one and its descendants) are not tenants.
    """
    visible = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    pids = frozenset(own_process_tree() if own_pids is None else own_pids)
    import pynvml

    try:
        with _session(pynvml):
            return _read(_Calls(pynvml), visible, pids)
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as error:
        missing = getattr(error, "value", None) == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        return NvmlReading(unavailable=str(error), no_driver=missing)


def own_process_tree() -> set[int]:
    """Pids of this process and its descendants. Not its ancestors: a notebook that started it is a tenant."""
    me = psutil.Process()
    try:
        return {me.pid, *(child.pid for child in me.children(recursive=True))}
    except psutil.Error:
        return {me.pid}


@contextmanager
def _session(pynvml: Any) -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        _Calls(pynvml).attempt("nvmlShutdown")


def _read(calls: _Calls, visible: str | None, own_pids: frozenset[int]) -> NvmlReading:
    driver = calls.get("driver version", "nvmlSystemGetDriverVersion")
    cuda = _cuda_version(calls)
    count = calls.get("GPU count", "nvmlDeviceGetCount") or 0
    opened = [gpu for number in range(count) if (gpu := _open(calls, number))]
    opened.sort(key=lambda gpu: gpu.pci or (2**32, 0, 0))  # stable: NVML's order where PCI is unknown
    places = visible_places([gpu.card for gpu in opened], visible)
    shared = Device(kind="cuda", index=None, name="", driver=driver, runtime=cuda, wsl=is_wsl())
    reader = _Reader(calls.pynvml, shared, own_pids)
    return NvmlReading(
        devices=tuple(reader.devices(opened, places, all_slices=visible is None)),
        driver=driver,
        cuda=cuda,
        count=count,
        problems=tuple(calls.problems),
    )


def _cuda_version(calls: _Calls) -> str | None:
    number = calls.get("CUDA version", "nvmlSystemGetCudaDriverVersion_v2")
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _open(calls: _Calls, number: int) -> _Opened | None:
    """The GPU that NVML counts as `number`; None, and a problem of the machine, where it cannot be opened."""
    handle = calls.get(f"GPU {number}", "nvmlDeviceGetHandleByIndex", number)
    if handle is None:
        return None
    own = _Calls(calls.pynvml)
    unsupported = (calls.pynvml.NVML_ERROR_NOT_SUPPORTED,)
    pci = own.get("PCI address", "nvmlDeviceGetPciInfo", handle)
    mode = own.get("MIG mode", "nvmlDeviceGetMigMode", handle, expected=unsupported)
    mig = bool(mode) and mode[0] == _MIG_ENABLED
    return _Opened(
        handle=handle,
        pci=(pci.domain, pci.bus, pci.device) if pci is not None else None,
        uuid=own.get("UUID", "nvmlDeviceGetUUID", handle),
        mig=mig,
        slices=_slices(own, handle) if mig else [],
        problems=own.problems,
    )


def _slices(calls: _Calls, parent: Any) -> list[tuple[Any, str | None]]:
    absent = (calls.pynvml.NVML_ERROR_NOT_FOUND, calls.pynvml.NVML_ERROR_INVALID_ARGUMENT)
    slots = calls.get("MIG slice count", "nvmlDeviceGetMaxMigDeviceCount", parent) or 0
    found: list[tuple[Any, str | None]] = []
    for slot in range(slots):
        name = "nvmlDeviceGetMigDeviceHandleByIndex"
        handle = calls.get(f"MIG slice {slot}", name, parent, slot, expected=absent)
        if handle is not None:
            found.append((handle, calls.get(f"MIG slice {slot} UUID", "nvmlDeviceGetUUID", handle)))
    return found


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns opened GPUs into devices."""

    pynvml: Any
    shared: Device  # driver, runtime, wsl
    own_pids: frozenset[int]

    def devices(self, opened: Sequence[_Opened], places: Sequence[Place], *, all_slices: bool) -> Iterator[Device]:
        """Visible ones by index, then the parents of visible slices, then (`all_slices`) the other slices."""
        wholes = {number: self._whole(gpu) for number, gpu in enumerate(opened) if _concerned(number, gpu, places)}
        for index, place in enumerate(places):
            device = wholes[place.card]
            if place.slice is not None:
                device = self._slice(device, opened[place.card], place.slice)
            yield replace(device, index=index)
        for number, gpu in enumerate(opened):
            if gpu.mig and (number in wholes or all_slices):
                parent = wholes.get(number) or self._whole(gpu)
                yield parent
                hidden = range(len(gpu.slices)) if all_slices else ()
                for position in hidden:
                    if Place(number, position) not in places:
                        yield self._unreachable(self._slice(parent, gpu, position))

    def _whole(self, gpu: _Opened) -> Device:
        calls = _Calls(self.pynvml, list(gpu.problems))
        unsupported = (self.pynvml.NVML_ERROR_NOT_SUPPORTED,)
        capability = calls.get("compute capability", "nvmlDeviceGetCudaComputeCapability", gpu.handle)
        mode = calls.get("virtualisation", "nvmlDeviceGetVirtualizationMode", gpu.handle, expected=unsupported)
        display = calls.get("display", "nvmlDeviceGetDisplayActive", gpu.handle, expected=unsupported)
        name = calls.get("name", "nvmlDeviceGetName", gpu.handle)
        total, free, unified = _memory(calls, gpu.handle)
        return replace(
            self.shared,
            name=name or "NVIDIA GPU",
            uuid=gpu.uuid,
            total_bytes=total,
            free_bytes=free,
            unified_memory=unified,
            compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
            power_limit_w=_power_limit_w(calls, gpu.handle),
            mig="enabled" if gpu.mig else None,
            virtual=None if mode is None else mode == _VIRTUALIZATION_VGPU,
            display_active=None if display is None else bool(display),
            tenants=_tenants(calls, gpu.handle, self.own_pids),
            problems=tuple(calls.problems),
        )

    def _slice(self, parent: Device, gpu: _Opened, position: int) -> Device:
        """A MIG slice: its own memory, tenants and UUID, and the rest of its parent's."""
        handle, uuid = gpu.slices[position]
        calls = _Calls(self.pynvml)
        total, free, _ = _memory(calls, handle, may_be_unified=False)
        return replace(
            parent,
            uuid=uuid,
            mig=_profile(calls, handle),
            total_bytes=total,
            free_bytes=free,
            power_limit_w=None,  # the whole card's
            tenants=_tenants(calls, handle, self.own_pids),
            problems=tuple(calls.problems),
        )

    def _unreachable(self, device: Device) -> Device:
        hint = f"CUDA shows a process one MIG slice: start with CUDA_VISIBLE_DEVICES={device.uuid} to use this one"
        return replace(device, index=None, problems=(*device.problems, hint))


def _concerned(number: int, gpu: _Opened, places: Sequence[Place]) -> bool:
    return any(place.card == number for place in places)


def _memory(calls: _Calls, handle: Any, *, may_be_unified: bool = True) -> tuple[int | None, int | None, bool]:
    """Total bytes, free bytes, and whether the memory is the machine's own.

    GB10 and Jetson answer "Not Supported" to both versions of the call (nvitop#208): there the GPU's memory is the
    host's, so the host's is given.
    """
    memory, newer = calls.attempt("nvmlDeviceGetMemoryInfo", handle, calls.pynvml.nvmlMemory_v2)
    if memory is None:
        memory, older = calls.attempt("nvmlDeviceGetMemoryInfo", handle)
    if memory is not None:
        return int(memory.total), int(memory.free), False
    unsupported = calls.pynvml.NVML_ERROR_NOT_SUPPORTED
    calls.problems.append(f"memory: {older}")
    if may_be_unified and unsupported in (getattr(newer, "value", None), getattr(older, "value", None)):
        total, free = host_memory()
        return total, free, True
    return None, None, False


def _power_limit_w(calls: _Calls, handle: Any) -> float | None:
    milliwatts, _ = calls.attempt("nvmlDeviceGetEnforcedPowerLimit", handle)
    if milliwatts is None:
        milliwatts = calls.get("power limit", "nvmlDeviceGetPowerManagementLimit", handle)
    return None if milliwatts is None else milliwatts / 1000


def _profile(calls: _Calls, handle: Any) -> str:
    """The slice's profile, "1g.10gb": from its name, else from its attributes."""
    name, _ = calls.attempt("nvmlDeviceGetName", handle)
    if name and (match := _MIG_PROFILE.search(name)):
        return match[1]
    attributes = calls.get("MIG profile", "nvmlDeviceGetAttributes", handle)
    if attributes is None:
        return "slice"
    return f"{attributes.gpuInstanceSliceCount}g.{round(attributes.memorySizeMB / 1024)}gb"


def _tenants(calls: _Calls, handle: Any, own_pids: frozenset[int]) -> tuple[Tenant, ...]:
    """Other processes on the device, by pid. One that computes and draws is listed twice by NVML, once here."""
    used: dict[int, int | None] = {}
    for what, name in (
        ("compute processes", "nvmlDeviceGetComputeRunningProcesses"),
        ("graphics processes", "nvmlDeviceGetGraphicsRunningProcesses"),
    ):
        expected = (calls.pynvml.NVML_ERROR_NOT_SUPPORTED,) if what.startswith("graphics") else ()
        for process in calls.get(what, name, handle, expected=expected) or ():
            sizes = [size for size in (used.get(process.pid), process.usedGpuMemory) if size is not None]
            used[process.pid] = max(sizes, default=None)
    return tuple(
        Tenant(pid=pid, name=_process_name(calls, pid), used_bytes=size)
        for pid, size in sorted(used.items())
        if pid not in own_pids
    )


def _process_name(calls: _Calls, pid: int) -> str | None:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:  # another container's process, or gone
        name, _ = calls.attempt("nvmlSystemGetProcessName", pid)
        return name.rsplit("/", 1)[-1] if name else None
