from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sqlite_utils  # noqa: F401 - so that each new queue is made here and not in a process of its own

from autotune.recover.daemon_file import daemon_path, read_daemon, write_daemon
from autotune.recover.identity import own_process_id
from autotune.recover.job import ENDED, Job, NewJob, State
from autotune.recover.jobs import JobStore, open_jobs
from autotune.recover.supervisors import supervisor_log

ROOT = Path(__file__).parent.parent
LIMIT_S = 30.0

SERVE = """
import logging, sys
from pathlib import Path
from autotune.recover.daemon import DaemonLimits, serve
from autotune.recover.slots import Slot

home, share, cancel_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
slots = tuple(Slot(word, "cuda", "A", f"GPU-{word}") if word != "cpu" else Slot("cpu") for word in sys.argv[4:])
logging.basicConfig(level=logging.INFO)

def command(job):
    return [sys.executable, "tests/supervisor_stand_in.py", str(home), str(job.id)]

serve(home, lambda: slots, limits=DaemonLimits(tick_s=0.05, share=share, cancel_s=cancel_s), command=command)
"""


class Served:
    """A home, its queue, and daemons over it."""

    def __init__(self, home: Path, store: JobStore) -> None:
        self.home, self.store = home, store
        self.daemons: list[subprocess.Popen[str]] = []

    def start(self, *slots: str, share: int = 1, cancel_s: float = 30.0, wait: bool = True) -> subprocess.Popen[str]:
        daemon = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(self.home), str(share), str(cancel_s), *(slots or ("cpu",))],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.daemons.append(daemon)
        if wait:
            self.until(lambda: (facts := read_daemon(self.home)) is not None and facts.process.pid == daemon.pid)
        return daemon

    def submit(self, *words: str, **changes: object) -> int:
        new = NewJob(command=words, cwd=str(ROOT), environ={"PYTHONPATH": str(ROOT)})
        return self.store.submit(replace(new, **changes)).id  # type: ignore[arg-type]

    def hold(self, on: bool = True) -> None:
        """Whether the stand-in waits after its first step."""
        if on:
            (self.home / "hold").touch()
        else:
            (self.home / "hold").unlink()

    def until(self, holds: Callable[[], object]) -> None:
        limit = time.monotonic() + LIMIT_S
        while not holds():
            assert time.monotonic() < limit, self.store.jobs()
            time.sleep(0.01)

    def ended(self, job_id: int) -> Job:
        self.until(lambda: self.store.job(job_id).state in ENDED)
        return self.store.job(job_id)

    def under_way(self, job_id: int, *, other_than: int | None = None) -> int:
        """The pid of its supervisor, once it has done a step."""

        def begun() -> bool:
            job = self.store.job(job_id)
            return bool(job.step and job.supervisor and job.supervisor.is_alive and job.supervisor.pid != other_than)

        self.until(begun)
        supervisor = self.store.job(job_id).supervisor
        assert supervisor is not None
        return supervisor.pid

    def starts(self, job_id: int) -> list[int]:
        path = self.home / f"starts-{job_id}"
        return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []

    def said(self, daemon: subprocess.Popen[str]) -> str:
        """Its log, once it has been asked to end."""
        daemon.terminate()
        return daemon.communicate(timeout=LIMIT_S)[1]

    def clean_up(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
            daemon.communicate()
        for path in self.home.glob("starts-*"):
            for pid in self.starts(int(path.name.removeprefix("starts-"))):
                self._kill(pid)

    def _kill(self, pid: int) -> None:
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists() and str(self.home).encode() in command.read_bytes():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    home = tmp_path / "home"
    with open_jobs(home) as store:
        served = Served(home, store)
        try:
            yield served
        finally:
            served.clean_up()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_jobs_run_one_after_the_other_in_order(served: Served) -> None:
    ids = [served.submit("steps", "3") for _ in range(3)]
    served.start()
    for job_id in ids:
        assert served.ended(job_id).state is State.FINISHED
    assert [len(served.starts(job_id)) for job_id in ids] == [1, 1, 1]
    times = [(served.home / f"starts-{job_id}").stat().st_mtime_ns for job_id in ids]
    assert times == sorted(times)


def test_a_job_that_is_submitted_while_the_daemon_idles_is_started(served: Served) -> None:
    served.start()
    assert served.ended(served.submit("steps", "2")).state is State.FINISHED


def test_each_gpu_has_one_job_which_sees_that_gpu_alone(served: Served) -> None:
    served.hold()
    ids = [served.submit("steps", "2") for _ in range(3)]
    served.start("cuda:0", "cuda:1", "cpu")
    for job_id in ids[:2]:
        served.under_way(job_id)
    assert [served.store.job(job_id).device for job_id in ids] == ["cuda:0", "cuda:1", None]
    served.hold(False)
    served.ended(ids[2])
    seen = [(served.home / f"starts-{job_id}").read_text().split()[1] for job_id in ids[:2]]
    assert seen == ["GPU-cuda:0", "GPU-cuda:1"]


def test_a_shared_gpu_has_several_jobs(served: Served) -> None:
    served.hold()
    ids = [served.submit("steps", "2") for _ in range(3)]
    served.start("cuda:0", share=2)
    for job_id in ids[:2]:
        served.under_way(job_id)
    assert served.store.job(ids[2]).state is State.QUEUED


def test_a_job_for_a_device_that_is_not_here_waits_and_says_so(served: Served) -> None:
    job_id = served.submit("steps", "2", gpu="cuda:5")
    served.start()
    served.until(lambda: "waits for cuda:5, which is not here (here: cpu)" in served.store.job(job_id).message)
    assert served.ended(served.submit("steps", "2")).state is State.FINISHED


@pytest.mark.parametrize(("code", "state"), [(0, State.FINISHED), (3, State.FAILED)])
def test_a_supervisor_that_leaves_without_a_word_has_said_it_by_its_exit_code(
    served: Served, code: int, state: State
) -> None:
    job_id = served.submit("leave", str(code))
    served.start()
    found = served.ended(job_id)
    assert (found.state, found.exit_code) == (state, code)
    assert found.message == f"its supervisor ended with exit code {code}"


def test_a_job_whose_folder_has_gone_fails_and_the_next_one_runs(served: Served) -> None:
    lost, next_one = served.submit("steps", "1", cwd="/nowhere"), served.submit("steps", "1")
    served.start()
    assert "cannot be started (/nowhere: No such file" in served.ended(lost).message
    assert served.ended(next_one).state is State.FINISHED


# Deaths --------------------------------------------------------------------------------------------------------------


def test_a_killed_daemon_is_replaced_by_one_that_adopts_its_jobs(served: Served) -> None:
    served.hold()
    job_id = served.submit("steps", "3")
    kill(served.start().pid)
    served.daemons[0].wait(LIMIT_S)
    served.start()
    pid = served.under_way(job_id)
    served.hold(False)
    assert served.ended(job_id).state is State.FINISHED
    assert served.starts(job_id) == [pid]


def test_a_job_goes_on_and_ends_while_no_daemon_runs(served: Served) -> None:
    served.hold()
    job_id = served.submit("steps", "3")
    daemon = served.start()
    served.under_way(job_id)
    assert "1 supervisors go on" in served.said(daemon)
    served.hold(False)
    assert served.ended(job_id).state is State.FINISHED
    assert not daemon_path(served.home).exists()


def test_a_killed_supervisor_is_replaced_and_goes_on_from_its_step(served: Served) -> None:
    served.hold()
    job_id = served.submit("steps", "3")
    served.start()
    first = served.under_way(job_id)
    kill(first)
    second = served.under_way(job_id, other_than=first)
    served.hold(False)
    found = served.ended(job_id)
    assert (found.state, found.step) == (State.FINISHED, 3)
    assert served.starts(job_id) == [first, second]


def test_an_adopted_supervisor_that_is_killed_is_replaced(served: Served) -> None:
    served.hold()
    job_id = served.submit("steps", "3")
    first_daemon = served.start()
    first = served.under_way(job_id)
    kill(first_daemon.pid)
    first_daemon.wait(LIMIT_S)
    served.start()
    kill(first)
    second = served.under_way(job_id, other_than=first)
    served.hold(False)
    assert served.ended(job_id).state is State.FINISHED
    assert served.starts(job_id) == [first, second]


def test_when_daemon_and_supervisor_are_killed_the_job_is_resumed_before_others(served: Served) -> None:
    served.hold()
    job_id, other = served.submit("steps", "3"), served.submit("steps", "1")
    daemon = served.start()
    first = served.under_way(job_id)
    kill(daemon.pid)
    kill(first)
    daemon.wait(LIMIT_S)
    served.start()
    second = served.under_way(job_id, other_than=first)
    assert served.starts(other) == []
    served.hold(False)
    assert served.ended(other).state is State.FINISHED
    assert served.store.job(job_id).state is State.FINISHED
    assert served.starts(job_id) == [first, second]


def test_a_supervisor_that_dies_again_and_again_is_given_up(served: Served) -> None:
    job_id = served.submit("die")
    served.start()
    found = served.ended(job_id)
    assert (found.state, found.message) == (State.FAILED, "its supervisor died 4 times without progress")
    assert len(served.starts(job_id)) == 4


def test_after_a_reboot_jobs_resume_and_it_is_not_held_against_them(served: Served) -> None:
    job_id = served.submit("steps", "3")
    served.store.claim(job_id, "cpu")
    served.store.attach(job_id, replace(own_process_id(), boot="the boot before"))  # our pid is another's by now
    served.start()
    found = served.ended(job_id)
    assert (found.state, found.restarts) == (State.FINISHED, 0)


def test_a_supervisor_that_a_dying_daemon_did_not_note_leaves_no_second_run(served: Served) -> None:
    """Killed between starting it and writing down its pid; whichever says first that it has the job, has it."""
    served.hold()
    job_id = served.submit("steps", "3")
    served.store.claim(job_id, "cpu")
    unnoted = subprocess.Popen(
        [sys.executable, "tests/supervisor_stand_in.py", str(served.home), str(job_id)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    served.start()
    served.until(lambda: len(served.starts(job_id)) == 2 or served.store.job(job_id).step)
    served.under_way(job_id)
    served.hold(False)
    assert served.ended(job_id).step == 3
    unnoted.wait(LIMIT_S)


def test_what_a_killed_supervisor_left_running_is_ended_before_the_job_is_resumed(served: Served) -> None:
    served.hold()
    folder = served.home / "runs" / "r"
    attempt = folder / "attempt-1"
    attempt.mkdir(parents=True)
    job_id = served.submit("steps", "3")
    orphan = subprocess.Popen(["sleep", "60"], env={**os.environ, "AUTOTUNE_ATTEMPT": str(attempt)})
    served.start()
    first = served.under_way(job_id)
    served.store.update(job_id, run_folder=str(folder))
    kill(first)
    served.under_way(job_id, other_than=first)
    assert orphan.wait(LIMIT_S) == -signal.SIGTERM


# Cancelling ----------------------------------------------------------------------------------------------------------


def test_a_queued_job_is_cancelled_and_never_started(served: Served) -> None:
    served.hold()
    first, second = served.submit("steps", "2"), served.submit("steps", "2")
    served.start()
    served.under_way(first)
    served.store.cancel(second)
    served.hold(False)
    served.ended(first)
    assert served.ended(served.submit("steps", "1")).state is State.FINISHED
    assert served.starts(second) == []


@pytest.mark.parametrize(("word", "cancel_s"), [("steps", 30.0), ("deaf", -29.0)])
def test_a_running_job_is_asked_to_end_and_killed_if_it_does_not(served: Served, word: str, cancel_s: float) -> None:
    """With a grace of 30 s for the command, -29 makes it one second."""
    served.hold()
    job_id = served.submit(word)
    served.start(cancel_s=cancel_s)
    pid = served.under_way(job_id)
    served.store.cancel(job_id)
    assert served.ended(job_id).state is State.CANCELLED
    assert served.starts(job_id) == [pid]


def test_a_cancel_that_was_asked_for_while_no_daemon_ran_is_seen_to(served: Served) -> None:
    served.hold()
    job_id = served.submit("steps")
    daemon = served.start()
    served.under_way(job_id)
    kill(daemon.pid)
    daemon.wait(LIMIT_S)
    served.store.cancel(job_id)
    served.start()
    assert served.ended(job_id).state is State.CANCELLED


# One daemon ----------------------------------------------------------------------------------------------------------


def test_a_second_daemon_says_who_the_first_is_and_leaves(served: Served) -> None:
    first = served.start()
    second = served.start(wait=False)
    said = second.communicate(timeout=LIMIT_S)[1]
    assert second.returncode == 1
    assert f"a daemon runs in {served.home} already (pid {first.pid})" in said
    facts = read_daemon(served.home)
    assert facts is not None
    assert facts.process.pid == first.pid


def test_the_file_of_a_dead_daemon_is_told_of_and_replaced(served: Served) -> None:
    first = served.start()
    kill(first.pid)
    first.wait(LIMIT_S)
    second = served.start()
    assert f"the daemon before this one (pid {first.pid}) died without a word" in served.said(second)


def test_a_file_with_the_pid_of_another_process_stops_nobody(served: Served) -> None:
    facts = read_daemon(served.home)
    assert facts is None
    first = served.start()
    found = read_daemon(served.home)
    assert found is not None
    kill(first.pid)
    first.wait(LIMIT_S)
    write_daemon(served.home, replace(found, process=replace(own_process_id(), started=1.0)))
    served.start()
    assert served.ended(served.submit("steps", "1")).state is State.FINISHED


def test_a_queue_that_is_moved_away_is_opened_anew(served: Served) -> None:
    daemon = served.start()
    served.store.close()
    for path in served.home.glob("jobs.db*"):
        path.rename(path.with_name(f"old-{path.name}"))
    served.store = open_jobs(served.home)
    assert served.ended(served.submit("steps", "1")).state is State.FINISHED
    assert "was moved away" in served.said(daemon)


def test_a_job_that_cannot_be_started_now_is_tried_again_and_told_of_once(served: Served) -> None:
    daemon = served.start()
    loop = served.home / "supervisors"
    loop.symlink_to("supervisors")  # where the logs' folder is to be: "too many levels of symbolic links"
    job_id = served.submit("steps", "1")
    served.until(lambda: "cannot be started now: " in served.store.job(job_id).message)
    time.sleep(0.5)  # ten turns
    loop.unlink()
    found = served.ended(job_id)
    assert (found.state, found.restarts) == (State.FINISHED, 0)
    assert served.said(daemon).count("a turn failed") == 1


def test_a_supervisors_log_is_private_and_its_own(served: Served) -> None:
    job_id = served.submit("steps", "1")
    served.start()
    served.ended(job_id)
    assert supervisor_log(served.home, job_id).stat().st_mode & 0o777 == 0o600


# Hooks ---------------------------------------------------------------------------------------------------------------


def hook(path: Path) -> Sequence[str]:
    script = "import os, sys; open(sys.argv[1], 'a').write(os.environ['AUTOTUNE_EVENT'] + os.environ['AUTOTUNE_JOB'])"
    return (sys.executable, "-c", script, str(path))


def test_a_job_that_is_given_up_is_told_of_once(served: Served, tmp_path: Path) -> None:
    job_id = served.submit("leave", "3", hooks={"failed": hook(tmp_path / "told"), "finished": hook(tmp_path / "no")})
    daemon = served.start()
    served.ended(job_id)
    served.said(daemon)  # it waits for its hooks
    assert (tmp_path / "told").read_text() == f"failed{job_id}"
    assert not (tmp_path / "no").exists()


def test_a_hook_that_cannot_run_harms_nothing(served: Served) -> None:
    job_id = served.submit("leave", "3", hooks={"failed": ("/no/such/hook",)})
    daemon = served.start()
    served.ended(job_id)
    assert served.ended(served.submit("steps", "1")).state is State.FINISHED
    assert "the hook on failed could not be started" in served.said(daemon)
