"""Whoever is killed (supervisor, keeper, both), nothing of a run goes on unseen; nobody else's process is touched."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.recover import keeper as keeper_module
from autotune.recover.keeper import Process, boot_id, members, read_process, read_processes, send
from autotune.recover.processes import MARK, PROCESS_FILE, end, end_leftovers, marked
from tests.attempts import living, python, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs are supervised on Linux and WSL2")

SUPERVISOR = """
import os, sys
from pathlib import Path
from tests.attempts import Attempt
from autotune.recover.watching import AttemptLimits
attempt = Attempt(Path(sys.argv[1]), limits=AttemptLimits(grace_s=float(sys.argv[2]), end_grace_s=1.0))
with attempt.stop.handled():
    ended = attempt.run(tuple(sys.argv[3:]))
print(ended.exit_code, ended.ended_by, *ended.notes)
"""

#: A trainer with a child, a grandchild, a child in a session of its own, and one that has left its parents.
FAMILY = """
import pathlib
nap = "import signal, time; %s; time.sleep(120)"
deaf = nap % "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
def child(code, **options):
    return subprocess.Popen([sys.executable, "-S", "-c", code, sys.argv[1]], **options)
child(deaf)
child(nap % "pass", start_new_session=True)
child("import os, subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(120)', "
      "sys.argv[1]]); import time; time.sleep(120)")
child("import os, sys, time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); time.sleep(120)")
print("ready", flush=True)
time.sleep(120)
"""
COUNT = 6


class Supervised:
    """A supervisor in a process of its own, and the family of its trainer."""

    def __init__(self, folder: Path, mark: str, *, grace_s: float = 5.0) -> None:
        self.folder, self.mark = folder, mark
        self.output = folder / "stdout"
        command = [sys.executable, "-c", SUPERVISOR, str(folder), str(grace_s), *python(FAMILY, mark)]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
        wait_until(lambda: self.output.exists() and b"ready" in self.output.read_bytes() and len(self.family) == COUNT)

    @property
    def family(self) -> list[int]:
        return [pid for pid in living(self.mark) if pid != self.process.pid and pid != self.keeper]

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "attempt-1" / PROCESS_FILE).read_text())  # type: ignore[no-any-return]

    @property
    def keeper(self) -> int:
        return int(self.record["keeper"])

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.communicate()
        end(lambda: [process for pid in living(self.mark) if (process := read_process(pid))], grace_s=0.0)


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    found = Supervised(tmp_path, f"family-{os.getpid()}-{time.monotonic_ns()}")
    yield found
    found.close()


def test_a_killed_supervisor_leaves_nothing(supervised: Supervised) -> None:
    supervised.process.kill()
    wait_until(lambda: not living(supervised.mark), limit_s=keeper_module.GRACE_S + 5)


def test_a_killed_keeper_leaves_nothing(supervised: Supervised) -> None:
    os.kill(supervised.keeper, signal.SIGKILL)
    told, _ = supervised.process.communicate(timeout=20)
    assert living(supervised.mark) == []
    assert told.startswith("-9 itself the process that kept the command was killed")


def test_what_is_left_when_both_are_killed_is_found_and_ended(supervised: Supervised) -> None:
    supervised.process.send_signal(signal.SIGSTOP)  # so that it cannot act between the two
    os.kill(supervised.keeper, signal.SIGKILL)
    supervised.process.kill()
    supervised.process.wait(5)
    trainer = supervised.record["pid"]
    wait_until(lambda: trainer not in living(supervised.mark))  # the kernel ends it with its keeper
    left = supervised.family
    assert left
    ended = end_leftovers(supervised.folder / "attempt-1" / PROCESS_FILE, grace_s=0.5)
    assert set(left) <= set(ended)
    assert living(supervised.mark) == []


def test_a_second_ctrl_c_leaves_nothing(supervised: Supervised) -> None:
    supervised.process.send_signal(signal.SIGINT)
    time.sleep(0.4)  # two presses of a key
    supervised.process.send_signal(signal.SIGINT)
    told, _ = supervised.process.communicate(timeout=20)
    assert "user" in told
    assert living(supervised.mark) == []


def test_a_record_of_the_process_is_kept(tmp_path: Path) -> None:
    from tests.attempts import Attempt

    Attempt(tmp_path).run(("sh", "-c", "exit 4"))
    path = tmp_path / "attempt-1" / PROCESS_FILE
    record = json.loads(path.read_text())
    assert (record["schema"], record["exit_code"], record["boot"]) == ("autotune.process/1", 4, boot_id())
    assert record["supervisor"] == os.getpid()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_keeper_whose_supervisor_is_gone_starts_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    command = [sys.executable, "-I", "-S", keeper_module.__file__, "1", str(write), str(tmp_path / "p"), "0"]
    subprocess.run([*command, "touch", str(tmp_path / "begun")], pass_fds=(write,), check=True)
    os.close(write)
    assert os.read(read, 10) == b""
    os.close(read)
    assert not (tmp_path / "begun").exists()


# -------------------------------------------------------------------------------- whom it spares


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def write_record(folder: Path, **changes: Any) -> Path:
    record = {"boot": boot_id(), "keeper": 0, "keeper_ticks": 0, "pid": 0, "ticks": 0, **changes}
    path = folder / PROCESS_FILE
    path.write_text(json.dumps(record))
    return path


def ticks(pid: int) -> int:
    process = read_process(pid)
    assert process is not None
    return process.ticks


def test_the_process_of_a_record_is_ended(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    path = write_record(tmp_path, pid=bystander.pid, ticks=ticks(bystander.pid))
    assert end_leftovers(path) == [bystander.pid]
    assert bystander.wait(5) == -signal.SIGTERM


@pytest.mark.parametrize("role", ["pid", "keeper"])
def test_a_process_that_has_taken_over_a_pid_is_spared(
    tmp_path: Path, bystander: subprocess.Popen[bytes], role: str
) -> None:
    path = write_record(tmp_path, **{role: bystander.pid, "ticks" if role == "pid" else "keeper_ticks": 1})
    assert end_leftovers(path) == []
    assert bystander.poll() is None


def test_pids_of_another_boot_mean_nothing(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    path = write_record(tmp_path, boot="another", pid=bystander.pid, ticks=ticks(bystander.pid))
    assert end_leftovers(path) == []
    assert bystander.poll() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"boot": 1}', "\x00"])
def test_a_broken_record_ends_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / PROCESS_FILE).write_text(text)
    assert end_leftovers(tmp_path / PROCESS_FILE) == []


def test_a_missing_record_ends_those_that_carry_the_mark(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: str(tmp_path.resolve())})
    wait_until(lambda: bool(marked(tmp_path.resolve())))  # it has become `sleep`
    assert end_leftovers(tmp_path / PROCESS_FILE) == [process.pid]
    process.wait(5)


def test_the_one_who_asks_and_its_parents_are_spared(tmp_path: Path) -> None:
    code = f"""
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        from autotune.recover.processes import end_leftovers
        print(end_leftovers(Path(os.environ["AUTOTUNE_ATTEMPT"], "process.json")))
    """
    env = {**os.environ, MARK: str(tmp_path.resolve())}
    done = subprocess.run(python(code), env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_signal_goes_to_no_successor(bystander: subprocess.Popen[bytes]) -> None:
    process = read_process(bystander.pid)
    assert process is not None
    process.ticks -= 1
    assert not send(process, signal.SIGKILL)
    assert bystander.poll() is None
    process.ticks += 1
    assert send(process, signal.SIGKILL)
    assert bystander.wait(5) == -signal.SIGKILL
    assert not send(process, signal.SIGKILL)


# -------------------------------------------------------------------------------- reading /proc


def a_process(pid: int, parent: int, session: int, state: str = "S") -> Process:
    fields = [state, parent, pid, session, *[0] * 15, 1000 + pid]
    return Process(pid, f"{pid} (a ) b) {' '.join(map(str, fields))}\n".encode())


def test_members_are_the_session_and_all_descendants_that_live() -> None:
    table = [
        a_process(1, 0, 1),
        a_process(10, 1, 10),  # the keeper
        a_process(11, 10, 10),
        a_process(12, 11, 12),  # a session of its own
        a_process(13, 12, 12),
        a_process(14, 1, 10),  # its parent is gone
        a_process(15, 14, 15),
        a_process(16, 10, 10, state="Z"),
        a_process(20, 1, 20),
    ]
    found = members(10, {process.pid: process for process in table})
    assert sorted(process.pid for process in found) == [11, 12, 13, 14, 15]


def test_a_name_with_spaces_and_brackets_is_read(tmp_path: Path) -> None:
    process = a_process(7, 3, 5)
    assert (process.pid, process.parent, process.session, process.ticks) == (7, 3, 5, 1007)


def test_this_process_is_read_as_the_system_has_it() -> None:
    process = read_processes()[os.getpid()]
    assert (process.parent, process.session, process.group) == (os.getppid(), os.getsid(0), os.getpgid(0))
    assert process.alive
