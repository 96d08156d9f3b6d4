"""Where jobs run: this machine's devices as slots, and which waiting job goes to which."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autotune.errors import GpuUnavailable
from autotune.recover.job import Waiting

_READ_LIMIT_S = 120.0  # torch is asked where a ROCm or XPU build is installed: seconds
ALL = "all"  # a job that takes every GPU: a distributed launcher's


@dataclass(frozen=True, slots=True)
class Slot:
    """A device that jobs are started on."""

    id: str  # "cuda:0", "cpu"
    kind: str = "cpu"
    name: str = ""
    uuid: str | None = None

    @property
    def is_gpu(self) -> bool:
        return self.kind != "cpu"

    def accepts(self, wanted: str) -> bool:
        """Whether `wanted` (an id, a UUID or the beginning of one, or words of its name) means this device."""
        text = wanted.strip().lower()
        if text in (self.id, self.id.removesuffix(":0")):
            return True
        if text.startswith(("gpu-", "mig-")):
            return self.uuid is not None and self.uuid.lower().startswith(text)
        asked = _words(text)
        return self.is_gpu and bool(asked) and asked <= _words(self.name)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\d+", text.lower()))


CPU = Slot("cpu")


def read_slots() -> tuple[Slot, ...]:
    """The GPUs that are visible here, then the CPU. Another process reads them: its libraries are no daemon's load.

    Raises GpuUnavailable where they cannot be read.
    """
    words = [sys.executable, "-P", "-m", "autotune.cli.main", "gpus", "--json"]
    try:
        done = subprocess.run(words, capture_output=True, timeout=_READ_LIMIT_S, check=True, stdin=subprocess.DEVNULL)
        devices = json.loads(done.stdout)["devices"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        raise GpuUnavailable(f"this machine's devices cannot be read ({error}): `autotune gpus` says why") from error
    gpus = [device for device in devices if device["kind"] != "cpu" and device["id"] is not None]
    gpus.sort(key=lambda device: (device["kind"], device["index"]))
    return (*(Slot(device["id"], device["kind"], device["name"], device["uuid"]) for device in gpus), CPU)


def place(
    waiting: Sequence[Waiting], slots: Sequence[Slot], busy: Mapping[str, int], share: int
) -> list[tuple[Waiting, str]]:
    """Which of the waiting jobs start now, and on which device; `share` jobs at most run on one at once.

    `busy`: device → jobs there. A job that waits for every GPU lets none overtake it on one.
    """
    gpus = wanted_slots(ALL, slots)
    taken = {slot.id: busy.get(slot.id, 0) + (share if slot in gpus and busy.get(ALL) else 0) for slot in slots}
    free = {slot.id: share - taken[slot.id] for slot in slots}
    placed: list[tuple[Waiting, str]] = []
    for job in waiting:
        if job.gpu == ALL:
            if all(free[slot.id] == share for slot in gpus):
                placed.append((job, ALL))
            free.update({slot.id: 0 for slot in gpus})
            continue
        possible = [slot for slot in wanted_slots(job.gpu, slots) if free[slot.id] > 0]
        if possible:
            best = max(possible, key=lambda slot: free[slot.id])  # the first of the emptiest
            free[best.id] -= 1
            placed.append((job, best.id))
    return placed


def wanted_slots(wanted: str, slots: Sequence[Slot]) -> list[Slot]:
    """Those that a job may run on; "auto" is any GPU, or the CPU where there is none."""
    gpus = [slot for slot in slots if slot.is_gpu]
    if wanted in ("auto", ALL):
        return gpus or list(slots)
    return [slot for slot in slots if slot.accepts(wanted)]


def slot_environ(device: str, slots: Sequence[Slot], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables under which a supervisor and its command see that device alone."""
    slot = next((slot for slot in slots if slot.id == device), None)
    if slot is None:  # all
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if not slot.is_gpu:
        return {"CUDA_VISIBLE_DEVICES": ""}
    variable = {"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "HIP_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}[slot.kind]
    number = int(slot.id.partition(":")[2] or 0)
    shown = [entry.strip() for entry in environ.get(variable, "").split(",") if entry.strip()]
    entry = shown[number] if number < len(shown) else str(number)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", variable: slot.uuid if slot.kind == "cuda" and slot.uuid else entry}
