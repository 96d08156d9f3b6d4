"""The CPU as a device: its name, and the memory that this process may really use."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from autotune.hardware.cards import AttentionKernels, Card
from autotune.values import GIB, Device

_CGROUPS = Path("/sys/fs/cgroup")
_SELF_CGROUP = Path("/proc/self/cgroup")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """One cgroup's limit and what is used of it, in bytes; page cache that can be dropped does not count as used."""

    limit_bytes: int
    used_bytes: int


def read_cpu(cpuinfo: Path = _CPUINFO, cgroups: Path = _CGROUPS, self_cgroup: Path = _SELF_CGROUP) -> Device:
    """This machine's processor, with the host's memory or the cgroup's limit where that is smaller."""
    total, free = host_memory(cgroups, self_cgroup)
    return Device(kind="cpu", index=None, name=processor_name(cpuinfo), total_bytes=total, free_bytes=free)


def processor_name(cpuinfo: Path = _CPUINFO) -> str:
    """As /proc/cpuinfo names it; elsewhere, and on Arm, what `platform` knows."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine() or "CPU"


def host_memory(cgroups: Path = _CGROUPS, self_cgroup: Path = _SELF_CGROUP) -> tuple[int, int]:
    """Total and available bytes: the machine's, or those of the tightest cgroup around this process."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for group in cgroup_memory(cgroups, self_cgroup):
        total = min(total, group.limit_bytes)
        free = min(free, max(0, group.limit_bytes - group.used_bytes))
    return total, free


def cgroup_memory(cgroups: Path = _CGROUPS, self_cgroup: Path = _SELF_CGROUP) -> list[CgroupMemory]:
    """The memory limits around this process, version 2 and 1, its own cgroup first. Unlimited ones are left out.

    Every ancestor counts. A container may see its host's path in /proc/self/cgroup while its own cgroup is mounted
    as the root, so folders that are not there are passed over.
    """
    try:
        lines = self_cgroup.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[CgroupMemory] = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            found += _limits(cgroups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _limits(cgroups / "memory", path, *names)
    return found


def _limits(root: Path, path: str, limit_file: str, used_file: str, cache_key: str) -> Iterator[CgroupMemory]:
    relative = PurePosixPath(path.lstrip("/"))
    for parent in (relative, *relative.parents):
        folder = root / parent
        limit = _number(folder / limit_file)
        if limit is not None and limit < 2**60:  # version 1 writes "no limit" as the largest page-aligned number
            used = (_number(folder / used_file) or 0) - _statistic(folder / "memory.stat", cache_key)
            yield CgroupMemory(limit, max(0, used))


def _number(file: Path) -> int | None:
    """The file's one number; None where it is missing or says "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _statistic(file: Path, key: str) -> int:
    try:
        pairs = (line.split() for line in file.read_text(encoding="ascii").splitlines())
        return next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == key), 0)
    except (OSError, ValueError):
        return 0


#: FLOP/s of one thread in a large float32 product, and bytes a second that all stream: of the order that server
#: processors reach. Nobody is told them: a search uses their ratios, and learns how far they are off.
_FLOPS_PER_THREAD = 40e9
_BANDWIDTH = 15e9


def card_of_cpu(device: Device, threads: int) -> Card:
    """The processor as a card, so that its steps can be reckoned: rough, to be corrected by what is measured."""
    rate = _FLOPS_PER_THREAD * max(1, threads)
    total = device.total_bytes or 0
    return Card(
        name=device.name,
        aliases=(),
        vendor="intel",
        segment="server",
        architecture="cpu",
        compute_capability=None,
        memory_bytes=total,
        memory_nominal_gib=round(total / GIB),
        bandwidth_bytes_per_s=round(_BANDWIDTH),
        fp32_flops_per_s=rate,
        tf32_flops_per_s=None,
        fp16_flops_per_s=rate,
        bf16_flops_per_s=rate,
        sm_count=max(1, threads),
        boost_clock_mhz=None,
        l2_bytes=None,
        dtypes=("float32", "bfloat16"),
        attention=AttentionKernels(
            sdpa_flash=False, sdpa_efficient=False, sdpa_math=True, sdpa_cudnn_first=False, flash_attention_2=False
        ),
        bitsandbytes=True,
        bus="none",
        sources={},
    )
