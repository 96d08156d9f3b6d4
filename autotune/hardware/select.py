"""Which device is meant by "auto", "cuda:1", a UUID or a name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from autotune.errors import GpuUnavailable, InvalidRequest
from autotune.hardware.sizes import format_bytes
from autotune.values import GIB, MIB, Device

MIN_LIMIT_BYTES = 64 * MIB
_MIN_GPU_HEADROOM_BYTES = 256 * MIB

#: Words that say which variant of a model a card is: without them the plain desktop card is meant.
_VARIANTS = frozenset({"ti", "super", "laptop", "mobile", "max", "q", "d", "xt", "xtx", "gre"})
#: Words that do not tell one model from another.
_NOISE = re.compile(r"nvidia|geforce|amd|radeon|tesla|intel|gpu|graphics|sxm\d*|pcie|hbm\d\w*|\d+gb")
_GLUED = re.compile(r"\b(rtx|gtx|rx)(?=\d)|(?<=\d)(?=(?:ti|super|xtx|xt|gre)\b)")
_SIZE = re.compile(r"(\d+)\s*gi?b\b")


def select_device(wanted: str, devices: Sequence[Device]) -> tuple[Device, str | None]:
    """The device that `wanted` names, and a sentence to print about the choice.

    `wanted`: "auto" (the GPU with most free memory, else the CPU), "cuda:N", "xpu:N", "cpu", a UUID or an unambiguous
    beginning of one, or a name, of which every word must be a word of the device's. Raises GpuUnavailable.
    """
    text = wanted.strip()
    lowered = text.lower()
    if lowered == "auto":
        return _auto(devices)
    if lowered == "cpu":
        return _cpu(devices), None
    if re.fullmatch(r"(cuda|rocm|xpu)(:.*)?", lowered):
        return _by_id(lowered, devices), None
    if lowered.startswith(("gpu-", "mig-")):
        return _by_uuid(text, devices), None
    return _by_name(text, devices)


def usable(devices: Sequence[Device]) -> list[Device]:
    """GPUs that a worker can be given: a MIG parent, or a slice that CUDA does not enumerate, has no index."""
    return [device for device in devices if device.kind != "cpu" and device.index is not None]


def default_headroom_bytes(device: Device, limit_bytes: int | None = None) -> int:
    """What is kept free: on a GPU 2 % of the limit (None: its memory), at least 256 MiB; on the CPU nothing."""
    return 0 if device.kind == "cpu" else headroom_of_card(limit_bytes or device.total_bytes or 0)


def headroom_of_card(memory_bytes: int) -> int:
    """2 % of a card's memory, at least 256 MiB."""
    return max(memory_bytes // 50, _MIN_GPU_HEADROOM_BYTES)


def check_memory_limit(limit_bytes: int, device: Device) -> None:
    """Raises InvalidRequest for a limit above the device's memory, or too small to hold anything."""
    if limit_bytes < MIN_LIMIT_BYTES:
        raise InvalidRequest(
            f"--memory-limit {format_bytes(limit_bytes)} is below {format_bytes(MIN_LIMIT_BYTES)}, the least that"
            f" a probe can use: give more ({device.name} has {format_bytes(device.total_bytes)})"
        )
    if device.total_bytes is not None and limit_bytes > device.total_bytes:
        raise InvalidRequest(
            f"--memory-limit {format_bytes(limit_bytes)} is above the {format_bytes(device.total_bytes)} of"
            f" {device.name}: give at most that"
        )


def check_headroom(headroom_bytes: int, limit_bytes: int | None, device: Device) -> None:
    """Raises InvalidRequest where less than a probe can use is left of the limit (None: the device's memory)."""
    room = limit_bytes if limit_bytes is not None else device.total_bytes
    if room is not None and room - headroom_bytes < MIN_LIMIT_BYTES:
        raise InvalidRequest(
            f"--headroom {format_bytes(headroom_bytes)} leaves less than {format_bytes(MIN_LIMIT_BYTES)} of"
            f" {format_bytes(room)}, the least that a probe can use: give less, or a larger --memory-limit"
        )


def _auto(devices: Sequence[Device]) -> tuple[Device, str]:
    gpus = usable(devices)
    if gpus:
        best = _most_free(gpus)
        among = f", the one of {len(gpus)} GPUs with most free memory" if len(gpus) > 1 else ""
        return best, f"Using {_described(best)}{among}."
    cpu = _cpu(devices)
    hidden = [device for device in devices if device.kind != "cpu"]
    why = "A GPU is here, but CUDA enumerates none of it" if hidden else "No GPU is visible here"
    hint = " (`autotune gpus` says why)" if hidden else ""
    return cpu, f"{why}{hint}: this is a rehearsal on the CPU, {cpu.name}; its numbers are not a card's."


def _cpu(devices: Sequence[Device]) -> Device:
    found = next((device for device in devices if device.kind == "cpu"), None)
    if found is None:
        raise GpuUnavailable("the CPU could not be read: `autotune doctor` says what is wrong")
    return found


def _by_id(wanted: str, devices: Sequence[Device]) -> Device:
    kind, _, number = wanted.replace("rocm", "cuda").partition(":")
    name = f"{kind}:{number or 0}"
    found = next((device for device in usable(devices) if device.id == name), None)
    if found is None:
        raise GpuUnavailable(f"{wanted} is not in this machine: {_what_is_here(devices)}")
    return found


def _by_uuid(wanted: str, devices: Sequence[Device]) -> Device:
    found = [device for device in devices if device.uuid and device.uuid.lower().startswith(wanted.lower())]
    if not found:
        raise GpuUnavailable(f"{wanted} is not in this machine or not visible here: {_what_is_here(devices)}")
    if len(found) > 1:
        raise GpuUnavailable(f"{wanted} begins {len(found)} UUIDs: give more of it; {_listed(found)}")
    return _reachable(found[0])


def _by_name(wanted: str, devices: Sequence[Device]) -> tuple[Device, str | None]:
    words = _words(wanted)
    found = [device for device in devices if device.kind != "cpu" and words and _matches(words, device)]
    found = [device for device in found if device.mig != "enabled"] or found  # slices before their card
    if not found:
        raise GpuUnavailable(
            f'"{wanted}" is not in this machine: fit runs on a card that is here; `autotune gpus` lists what is'
        )
    candidates = _plain(words, found)
    if not candidates:
        raise GpuUnavailable(f'"{wanted}" alone means the card without suffix, and here is {_listed(found)}: name it')
    if len({_model(device) for device in candidates}) > 1:
        raise GpuUnavailable(f'"{wanted}" could be any of {_listed(candidates)}: name one of them in full')
    chosen = _reachable(_largest(candidates))
    return chosen, f"Using {_described(chosen)}." if len(found) > 1 or words != _words(chosen.name) else None


def _plain(words: frozenset[str], found: Sequence[Device]) -> list[Device]:
    """Of the matches, those that are no variant ("Ti", "Laptop") that was not asked for."""
    return [device for device in found if not (_model(device) & _VARIANTS) - words]


def _largest(devices: Sequence[Device]) -> Device:
    """Most memory; of equal cards the one that CUDA reaches and that has most free."""
    return max(
        devices,
        key=lambda device: (
            round((device.total_bytes or 0) / GIB),
            device.index is not None,
            device.free_bytes or 0,
            -(device.index or 0),
        ),
    )


def _most_free(devices: Sequence[Device]) -> Device:
    def free(device: Device) -> int:
        known = device.free_bytes if device.free_bytes is not None else device.total_bytes
        return known or 0

    return max(devices, key=lambda device: (free(device), -(device.index or 0)))


def _matches(words: frozenset[str], device: Device) -> bool:
    size = f"{round((device.total_bytes or 0) / GIB)}gb"
    return words <= _words(device.name) | _words(device.mig or "") | {size}


def _words(text: str) -> frozenset[str]:
    """ "RTX3060Ti 12 GiB" → rtx, 3060, ti, 12gb."""
    spaced = _SIZE.sub(r"\1gb", _GLUED.sub(lambda match: f"{match[0]} ", text.lower()))
    return frozenset(re.findall(r"[a-z0-9]+", spaced))


def _model(device: Device) -> frozenset[str]:
    """The words that tell this model from others; a slice is not its card."""
    words = frozenset(word for word in _words(device.name) if not _NOISE.fullmatch(word))
    return words | {device.mig} if device.mig else words


def _reachable(device: Device) -> Device:
    if device.index is not None:
        return device
    if device.mig == "enabled":
        raise GpuUnavailable(f"{device.name} is in MIG mode: use one of its slices; `autotune gpus` lists them")
    raise GpuUnavailable(
        f"{device.name} MIG {device.mig} cannot be reached from here: start again with"
        f" CUDA_VISIBLE_DEVICES={device.uuid}"
    )


def _described(device: Device) -> str:
    free = f"{format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} free"
    return f"{device.id} {device.name} ({free})"


def _listed(devices: Sequence[Device]) -> str:
    def one(device: Device) -> str:
        where = device.id if device.index is not None else device.uuid or "not reachable"
        return f"{device.name} ({where}, {format_bytes(device.total_bytes)})"

    return ", ".join(one(device) for device in devices)


def _what_is_here(devices: Sequence[Device]) -> str:
    gpus = usable(devices)
    if not gpus:
        return "no GPU is visible here, only the CPU; `--gpu cpu` rehearses on it, `autotune doctor` says why"
    return f"here is {_listed(sorted(gpus, key=lambda device: device.index or 0))}"
