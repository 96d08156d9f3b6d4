from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sqlite3
import subprocess
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from gpu_db.migrations import SCHEMA_VERSION, STEPS, migrate, schema_version
from gpu_db.store import database_path, open_store
from tests.trial_records import DEVICE, trial

PROCESSES, APPENDS = 10, 10

APPEND_FOREVER = """
import sys
from pathlib import Path
from autotune.errors import StoreError
from gpu_db.store import open_store
from tests.trial_records import DEVICE, report, trial

with open_store(Path(sys.argv[1]), DEVICE) as store:
    if len(sys.argv) > 2:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        while True:
            print(store.append(trial(report=report(log_tail="x" * 2000))).id, flush=True)
    except StoreError as error:
        print(error, file=sys.stderr)
"""

ANSWER_FROM_THE_DATABASE = """
import sys
from pathlib import Path
from gpu_db.store import open_store
from tests.trial_records import DEVICE, trial

with open_store(Path(sys.argv[1]), DEVICE) as store:
    assert len(store.trials(request_id=trial().request_id)) == 1
    store.append(trial())
print(*sys.modules, sep="\\n")
"""


def child(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def append_many(home: Path, name: str, barrier: Barrier) -> None:
    barrier.wait(timeout=100)
    with open_store(home, DEVICE) as store:
        for step in range(APPENDS):
            store.append(trial(request_id=name, sequence_length=step + 1))


def add_a_column(db: Any) -> None:
    db["trials"].add_column("note", str)


def upgrade(home: Path, barrier: Barrier) -> None:
    with contextlib.closing(sqlite3.connect(database_path(home, DEVICE), isolation_level=None)) as connection:
        barrier.wait(timeout=100)
        migrate(connection, (*STEPS, add_a_column))
        assert schema_version(connection) == SCHEMA_VERSION + 1


def assert_intact(home: Path) -> None:
    with contextlib.closing(sqlite3.connect(database_path(home, DEVICE))) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("exists", [False, True], ids=["making the file", "file there"])
def test_ten_processes_append_at_once_and_lose_nothing(tmp_path: Path, exists: bool) -> None:
    if exists:
        open_store(tmp_path, DEVICE).close()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES)
    processes = [
        context.Process(target=append_many, args=(tmp_path, f"process {n}", barrier)) for n in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    with open_store(tmp_path, DEVICE) as store:
        for n in range(PROCESSES):
            lengths = [record.config.sequence_length for record in store.trials(request_id=f"process {n}")]
            assert lengths == list(range(1, APPENDS + 1))
    assert_intact(tmp_path)


def test_processes_that_upgrade_a_database_at_once_upgrade_it_once(tmp_path: Path) -> None:
    with open_store(tmp_path, DEVICE) as store:
        store.append(trial())
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    processes = [context.Process(target=upgrade, args=(tmp_path, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * 4
    with contextlib.closing(sqlite3.connect(database_path(tmp_path, DEVICE))) as connection:
        assert connection.execute("SELECT id, note FROM trials").fetchall() == [(1, None)]


def test_a_killed_process_loses_no_trial_that_it_had_shown(tmp_path: Path) -> None:
    process = child(APPEND_FOREVER, str(tmp_path))
    assert process.stdout is not None
    shown = [process.stdout.readline() for _ in range(50)]
    process.kill()
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    shown += rest.splitlines(keepends=True)
    with open_store(tmp_path, DEVICE) as store:
        ids = [record.id for record in store.trials()]
        assert ids[: len(shown)] == [int(line) for line in shown if line.endswith("\n")]
        assert store.append(trial()).id == len(ids) + 1
    assert_intact(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_when_no_more_can_be_written_it_says_so_and_keeps_what_was_shown(tmp_path: Path) -> None:
    process = child(APPEND_FOREVER, str(tmp_path), str(300_000))
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "try again" in errors
    assert len(errors.splitlines()) == 1
    with open_store(tmp_path, DEVICE) as store:
        ids = [record.id for record in store.trials()]
        assert ids == [int(line) for line in shown.splitlines()]
        assert len(ids) > 10
        assert store.append(trial()).id == len(ids) + 1
    assert_intact(tmp_path)


def test_an_answer_from_the_database_imports_no_heavy_library(tmp_path: Path) -> None:
    with open_store(tmp_path, DEVICE) as store:
        store.append(trial())
    output, errors = child(ANSWER_FROM_THE_DATABASE, str(tmp_path)).communicate(timeout=120)
    assert errors == ""
    assert not {"sqlite_utils", "pandas", "numpy", "torch", "filelock", "platformdirs"} & set(output.split())
    assert "gpu_db.store" in output.split()
