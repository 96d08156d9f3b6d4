"""Which processes are a run's, and an end to those that a killed supervisor left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autotune.recover.keeper import Process, boot_id, members, read_processes, send

MARK = "AUTOTUNE_ATTEMPT"  # in the environment of all that an attempt starts: the attempt's folder
PROCESS_FILE = "process.json"
_GRACE_S = 5.0
_KILLED_S = 10.0
_POLL_S = 0.05


def marked(folder: Path, processes: dict[int, Process] | None = None) -> list[Process]:
    """Living processes of this user whose environment says that they were started for the attempt of this folder."""
    processes = read_processes() if processes is None else processes
    spared = _this_and_its_parents(processes)
    wanted = f"{MARK}={folder}".encode()
    return [
        process
        for process in processes.values()
        if process.alive and process.pid not in spared and wanted in _environ(process.pid)
    ]


def _environ(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return []


def _this_and_its_parents(processes: dict[int, Process]) -> set[int]:
    found: set[int] = set()
    pid = os.getpid()
    while pid in processes and pid not in found:
        found.add(pid)
        pid = processes[pid].parent
    return found


def end(find: Callable[[], Sequence[Process]], *, grace_s: float = _GRACE_S) -> list[int]:
    """SIGTERM to all that `find` gives, SIGKILL after `grace_s`, until it gives none; the pids that were ended.

    One that waits for a device may outlive SIGKILL: after ten seconds it is left alone.
    """
    found = find()
    ended = {process.pid for process in found}
    for process in found:
        send(process, signal.SIGTERM)
        send(process, signal.SIGCONT)  # a stopped one hears nothing else
    kill_at = time.monotonic() + grace_s
    while found and time.monotonic() < kill_at + _KILLED_S:
        time.sleep(_POLL_S)
        found = find()
        ended |= {process.pid for process in found}
        if time.monotonic() >= kill_at:
            for process in found:
                send(process, signal.SIGKILL)
    return sorted(ended - {process.pid for process in found})


def end_leftovers(process_file: Path, *, grace_s: float = _GRACE_S) -> list[int]:
    """End what a supervisor that was killed left behind, as its `process.json` tells; the pids that were ended.

    To be asked only once that supervisor is known to be gone. A process is ours by its pid with its start, by the
    mark in its environment, or as a child of one that is; whatever else has one of the pids by now is spared.
    """
    try:
        record = json.loads(process_file.read_text())
        if record["boot"] != boot_id():  # pids of another boot mean nothing
            return []
        known = [(int(record["keeper"]), int(record["keeper_ticks"])), (int(record["pid"]), int(record["ticks"]))]
    except (OSError, ValueError, KeyError, TypeError):
        known = []
    return end(lambda: _leftovers(process_file.resolve().parent, known), grace_s=grace_s)


def _leftovers(folder: Path, known: Sequence[tuple[int, int]]) -> list[Process]:
    processes = read_processes()
    roots = [processes[pid] for pid, ticks in known if pid in processes and processes[pid].ticks == ticks]
    found = {process.pid: process for process in (*roots, *marked(folder, processes)) if process.alive}
    for pid in tuple(found):
        found |= {process.pid: process for process in members(pid, processes)}
    spared = _this_and_its_parents(processes)
    return [process for process in found.values() if process.pid not in spared]
