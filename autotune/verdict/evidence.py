"""What the system recorded about memory: the cgroup's counters and the kernel's log. What cannot be read is None."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from autotune.verdict.judge import Evidence as Evidence
from autotune.verdict.judge import oom_kills_between as oom_kills_between

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_KMSG = Path("/dev/kmsg")
_DMESG = ("dmesg",)
_READ_S = 2.0
_RECORD_BYTES = 8192  # the kernel gives one record a read, and none is longer
_CLOCK_SLACK_S = 5.0  # the log's clock is not corrected by NTP and drifts from CLOCK_MONOTONIC
_NO_LIMIT = 2**60  # version 1 writes "no limit" as the largest multiple of a page

_KILL_LINE = re.compile(r"out of memory|oom-kill|oom_reaper|killed process", re.IGNORECASE)
_VICTIM = re.compile(r"(?:killed process|kill process|reaped process|\bpid=)\s*(\d+)", re.IGNORECASE)
_DEVICE_LINE = re.compile(r"nvrm: xid|fallen off the bus|amdgpu[^\n]*(?:reset|lost|hang)", re.IGNORECASE)
_DMESG_TIME = re.compile(r"^(?:<\d+>)?\[\s*(\d+\.\d+)\] ?(.*)$")


def read_evidence(
    pids: Collection[int] = (),
    since: float | None = None,
    *,
    cgroup_root: Path = _CGROUP_ROOT,
    membership: Path = _MEMBERSHIP,
    kmsg: Path = _KMSG,
    dmesg: tuple[str, ...] | None = _DMESG,
) -> Evidence:
    """Read the counters of this process's memory cgroup, and the kernel log's lines about `pids`.

    `since` is a `time.time()`: older log lines are left out. Without pids every memory kill since then is taken for
    ours. In a container the kernel log, where it can be read at all, has the host's pids. Never raises; takes two
    seconds at most for each of the two logs.
    """
    counters = _counters(cgroup_root, membership)
    log = _kernel_log(kmsg, dmesg)
    if log is None:
        return counters
    oldest = -1.0 if since is None else since - (time.time() - time.monotonic()) - _CLOCK_SLACK_S
    recent = [line for seconds, line in log if seconds >= oldest]
    kills = [line for line in recent if _KILL_LINE.search(line) and _VICTIM.search(line)]
    if not pids and since is not None:
        pids = frozenset().union(*map(_victims, kills))
    ours = [line for line in kills if not _victims(line).isdisjoint(pids)]
    others = frozenset().union(*map(_victims, kills)).difference(pids)
    return replace(
        counters,
        kernel_lines=tuple(ours),
        other_kills=len(others),
        device_lines=tuple(line for line in recent if _DEVICE_LINE.search(line)),
    )


def _victims(line: str) -> frozenset[int]:
    return frozenset(int(pid) for pid in _VICTIM.findall(line))


def _counters(root: Path, membership: Path) -> Evidence:
    """The memory cgroup's counters, of version 2 where it has them, else of version 1."""
    paths = _memberships(membership)
    folder = _first_folder([root, root / "unified"], paths.get("", "/"), "memory.events")
    if folder is not None:
        events = _table(folder / "memory.events")
        return Evidence(
            oom_kills=events.get("oom_kill"),
            oom_events=events.get("oom"),
            limit_hits=events.get("max"),
            memory_max_bytes=_number(folder / "memory.max"),
            memory_current_bytes=_number(folder / "memory.current"),
        )
    folder = _first_folder([root / "memory"], paths.get("memory", "/"), "memory.oom_control")
    if folder is None:
        return Evidence()
    return Evidence(
        oom_kills=_table(folder / "memory.oom_control").get("oom_kill"),
        limit_hits=_number(folder / "memory.failcnt"),
        memory_max_bytes=_number(folder / "memory.limit_in_bytes"),
        memory_current_bytes=_number(folder / "memory.usage_in_bytes"),
    )


def _memberships(path: Path) -> dict[str, str]:
    """The cgroup of each controller of this process; version 2's has the name ""."""
    groups = {}
    for line in (_text(path) or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, found, group = rest.partition(":")
        if found:
            groups.update(dict.fromkeys(controllers.split(","), group))
    return groups


def _first_folder(roots: Iterable[Path], group: str, name: str) -> Path | None:
    """The cgroup's folder, or the nearest above it that has the file: a container sees its own cgroup as the root."""
    for root in roots:
        here = root / group.lstrip("/")
        for folder in (here, *here.parents):
            if (folder / name).is_file():
                return folder
            if folder == root:
                break
    return None


def _table(path: Path) -> dict[str, int]:
    """Lines of "name number"."""
    pairs = (line.split() for line in (_text(path) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _kernel_log(kmsg: Path, dmesg: tuple[str, ...] | None) -> list[tuple[float, str]] | None:
    """Lines of the kernel log with their seconds since boot; None where it may not be read."""
    try:
        return list(_kmsg_lines(kmsg))
    except OSError:
        return None if dmesg is None else _dmesg_lines(dmesg)


def _kmsg_lines(path: Path) -> Iterator[tuple[float, str]]:
    """Records of /dev/kmsg, "priority,sequence,microseconds,flags;text". Raises OSError where it may not be read."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        deadline = time.monotonic() + _READ_S
        while time.monotonic() < deadline:
            try:
                record = os.read(descriptor, _RECORD_BYTES)
            except BlockingIOError:
                return
            except BrokenPipeError:
                continue  # the record was overwritten meanwhile; the next read goes on
            if not record:
                return
            for line in record.decode(errors="replace").splitlines():
                head, found, text = line.partition(";")
                fields = head.split(",")
                if found and len(fields) >= 3 and fields[2].isdigit():
                    yield int(fields[2]) / 1e6, text
    finally:
        os.close(descriptor)


def _dmesg_lines(command: tuple[str, ...]) -> list[tuple[float, str]] | None:
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_READ_S, check=True, stdin=subprocess.DEVNULL, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    matches = (_DMESG_TIME.match(line) for line in done.stdout.splitlines())
    return [(float(match[1]), match[2]) for match in matches if match]
