from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlite_utils  # noqa: F401 - so that each new queue is made here and not in a process of its own

from autotune.recover.daemon_file import read_daemon
from autotune.recover.identity import own_process_id
from autotune.recover.job import NewJob, State
from autotune.recover.jobs import JobStore, open_jobs
from tests.test_recover_jobs import incident

SCRIPT = Path(sys.executable).with_name("autotune")
LIMIT_S = 60
STATUS_S = 0.3
TRIES = 5  # the best counts: other processes slow it down, nothing speeds it up


class Shell:
    """The command line with a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environ = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        self.environ |= {"AUTOTUNE_HOME": str(home), "XDG_CONFIG_HOME": str(home / "config"), "COLUMNS": "200"}

    def run(self, *words: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), "daemon", *words],
            cwd=cwd,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def error(self, *words: str, code: int = 1) -> str:
        """Its one line."""
        done = self.run(*words)
        assert (done.returncode, done.stdout) == (code, "")
        assert re.fullmatch(r"Error: [^\n]+\n", done.stderr), done.stderr
        return done.stderr

    def store(self) -> JobStore:
        return open_jobs(self.home)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path / "home")
    yield shell
    if (facts := read_daemon(shell.home)) is not None:
        facts.process.send(signal.SIGKILL)


def submitted(shell: Shell, *words: str) -> int:
    done = shell.run("submit", *words)
    assert done.returncode == 0, done.stderr
    with shell.store() as store:
        return store.jobs()[-1].id


# Submit --------------------------------------------------------------------------------------------------------------


def test_a_submitted_job_keeps_words_options_and_folder(shell: Shell, tmp_path: Path) -> None:
    done = shell.run(
        *("submit", "--name", "first", "--fit", "--memory-limit", "12GiB", "--restarts", "2", "--start-limit", "5min"),
        *("--gpu", "cuda:1", "--on-failed", "mail -s 'it failed' me", "--", "python", "train.py", "--lr", "1; rm"),
        cwd=tmp_path,
        CONDA_PREFIX="/c",
        HF_TOKEN="a secret",
    )
    assert done.stdout == "Job 1 (first) is queued.\n"
    with shell.store() as store:
        job = store.job(1)
    assert job.command == ("python", "train.py", "--lr", "1; rm")
    assert job.hooks == {"failed": ("mail", "-s", "it failed", "me")}
    assert (job.cwd, job.gpu, job.environ["CONDA_PREFIX"]) == (str(tmp_path), "cuda:1", "/c")
    assert sorted(job.options) == sorted(
        ["--memory-limit", "12GiB", "--restarts", "2", "--start-limit", "300.0", "--fit"]
    )
    assert b"a secret" not in (shell.home / "jobs.db").read_bytes()


def test_the_options_of_a_job_are_read_back_by_run(shell: Shell) -> None:
    """As its supervisor reads them."""
    from autotune.cli.run import command

    job_id = submitted(shell, "--fit", "--stall", "9", "--window", "2h", "--on-tenant", "step-down", "--", "true")
    with shell.store() as store:
        job = store.job(job_id)
    read = command.make_context("run", [*job.options, "--", *job.command]).params
    assert (read["fit"], read["stall"], read["window"], read["on_tenant"]) == (True, 9.0, 7200.0, "step-down")
    assert read["words"] == ("true",)


def test_without_a_daemon_a_job_is_kept_and_one_is_told_how_to_start_it(shell: Shell) -> None:
    done = shell.run("submit", "--", "true")
    assert "no daemon runs, so it waits: start one with `autotune daemon start`" in done.stderr


def test_a_command_that_is_not_here_is_queued_with_a_warning(shell: Shell) -> None:
    assert "no-such-program is not found from here" in shell.run("submit", "--", "no-such-program").stderr
    assert "not found" not in shell.run("submit", "--", "ls").stderr


@pytest.mark.parametrize(
    ("shown", "gpu"), [("1", "cuda:1"), ("GPU-ab", "GPU-ab"), ("", "cpu"), ("0,1", "auto"), (None, "auto")]
)
def test_the_cards_that_the_shell_shows_are_a_wish(shell: Shell, shown: str | None, gpu: str) -> None:
    done = shell.run("submit", "--", "true", **({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}))
    with shell.store() as store:
        assert store.job(1).gpu == gpu
    assert ("CUDA_VISIBLE_DEVICES" in done.stderr) == (shown is not None)


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["submit"], "there is no command", 2),
        (["submit", "--nonsense", "--", "true"], "No such option", 2),
        (["submit", "--on-failed", "mail 'me", "--", "true"], "--on-failed cannot be read as a command", 1),
        (["submit", "--plan", "no.yaml", "--", "true"], "--plan no.yaml is no file here", 1),
        (["submit", "--plan", __file__, "--fit", "--", "true"], "--plan and --fit", 2),
        (["submit", "--memory-limit", "much", "--", "true"], "--memory-limit", 2),
        (["submit", "--name", "--", "true"], "its value is missing before --", 2),
        (["submit", "--", "train", "--hub_token", "x"], "carries a secret (near --hub_token)", 1),
        (["submit", "--notify", "nonsense://x", "--", "true"], "--notify", 1),
        (["cancel", "7"], "there is no job 7", 1),
        (["cancel", "x"], "give a whole number", 2),
        (["logs", "7"], "there is no job 7", 1),
        (["stop"], "there is nothing to stop", 1),
        (["status", "--json", "--watch"], "give one of them", 2),
    ],
)
def test_bad_input_is_one_line(shell: Shell, words: list[str], message: str, code: int) -> None:
    assert message in shell.error(*words, code=code)


def test_a_url_to_notify_is_in_no_row(shell: Shell) -> None:
    pytest.importorskip("apprise")
    submitted(shell, "--notify", "json://localhost/secretpath", "--", "true")
    found = [path for path in shell.home.rglob("*") if path.is_file() and b"secretpath" in path.read_bytes()]
    assert found == [shell.home / "notify" / "job-1"]


# Status --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy(shell: Shell) -> Shell:
    """One running job that recovered once, two queued, one failed."""
    with shell.store() as store:
        ids = [store.submit(NewJob(command=("train", str(n)), cwd="/", name=f"n{n}")).id for n in range(4)]
        store.claim(ids[0], "cuda:0")
        store.attach(ids[0], own_process_id())
        store.update(
            ids[0], state=State.RUNNING, step=120, max_steps=480, step_time_s=2.0, tokens_per_second=1234.5,
            memory_bytes=10 * 2**30, memory_limit_bytes=12 * 2**30,
        )  # fmt: skip
        store.add_incident(ids[0], incident())
        store.finish(ids[1], State.FAILED, exit_code=9, message="it is broken")
    return shell


_RUNNING = ["1", "running", "n0", "cuda:0", "120/480", "25%", "12m00", "1,234", "10.0/12.0"]


def test_status_shows_progress_memory_speed_and_incidents(busy: Shell) -> None:
    out = busy.run("status").stdout.splitlines()
    assert out[0].endswith("starts it. 1 running, 2 queued, 1 failed.")
    assert out[3].split() == [*_RUNNING, "GiB", "1", "train", "0"]
    assert [line.split()[1] for line in out[4:7]] == ["queued", "queued", "failed"]
    assert "job 1: device_oom in train at step 120 → step_down (less fits); 20 steps done again" in out[-1]


def test_status_as_json(busy: Shell) -> None:
    found = json.loads(busy.run("status", "--json").stdout)
    assert (found["schema"], found["daemon"]["running"]) == ("autotune.status/1", False)
    assert found["counts"] == {"running": 1, "queued": 2, "failed": 1}
    first = found["jobs"][0]
    assert (first["fraction"], first["seconds_left"], first["incidents"]) == (0.25, 720.0, 1)
    assert first["supervisor"] == {"pid": os.getpid(), "alive": True}
    assert [job["queue_position"] for job in found["jobs"]] == [None, None, 1, 2]
    assert found["incidents"][0]["change"] == {"micro_batch_size": 1}


def test_the_document_has_the_fields_that_its_module_lists(busy: Shell) -> None:
    from autotune.recover import status

    found = json.loads(busy.run("status", "--json").stdout)
    documented = status.__doc__ or ""
    for fields in (found, found["daemon"], found["jobs"][0], found["incidents"][0]):
        for name in fields:
            assert re.search(rf"\b{name}\b", documented), name


def test_a_live_job_whose_supervisor_died_is_shown_so(shell: Shell) -> None:
    from dataclasses import replace

    with shell.store() as store:
        job = store.submit(NewJob(command=("x",), cwd="/"))
        store.claim(job.id, "cpu")
        store.attach(job.id, replace(own_process_id(), started=1.0))
    assert "running, supervisor died" in shell.run("status").stdout


def test_status_of_1000_queued_jobs_takes_less_than_0_3_s(shell: Shell) -> None:
    with shell.store() as store:
        for number in range(1000):
            store.submit(NewJob(command=("python", "train.py", str(number)), cwd="/", environ=dict(os.environ)))
    for words in (["status"], ["status", "--json"]):
        assert min(_processor_s(shell, words) for _ in range(TRIES)) < STATUS_S
    out = shell.run("status").stdout
    assert "1000 queued" in out
    assert "and 980 more in the queue" in out
    assert len(json.loads(shell.run("status", "--json").stdout)["jobs"]) == 1000


def _processor_s(shell: Shell, words: list[str]) -> float:
    """Of the whole process. It waits for nothing, so on a quiet machine this is how long it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shell.run(*words).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_watch_draws_until_it_is_left_and_then_exits_with_0(busy: Shell) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(SCRIPT, [str(SCRIPT), "daemon", "status", "--watch"], {**busy.environ, "TERM": "xterm"})
    shown = b""
    until = time.monotonic() + LIMIT_S
    while b"1,234" not in shown or b"device_oom" not in shown:
        assert time.monotonic() < until, shown
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 65536)
    os.write(terminal, b"\x03")  # Ctrl-C
    while select.select([terminal], [], [], LIMIT_S)[0]:
        try:
            if not os.read(terminal, 65536):
                break
        except OSError:  # its end, on Linux
            break
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def test_watch_into_a_pipe_is_one_picture(busy: Shell) -> None:
    out = busy.run("status", "--watch").stdout
    assert "1,234" in out
    assert "\x1b" not in out


# Logs ----------------------------------------------------------------------------------------------------------------


def test_logs_are_printed_as_they_are(shell: Shell, tmp_path: Path) -> None:
    with shell.store() as store:
        job = store.submit(NewJob(command=("x",), cwd="/"))
        assert "has written nothing yet: --follow waits" in shell.error("logs", "1")
        store.claim(job.id, "cpu")
        store.update(job.id, run_folder=str(tmp_path))
    (tmp_path / "output.log").write_text("step 1\nstep 2")
    (tmp_path / "report.md").write_text("# died\n")
    assert shell.run("logs", "1").stdout == "step 1\nstep 2"
    assert shell.run("logs", "1", "--report").stdout == "# died\n"
    assert "has written no supervisor" in shell.error("logs", "1", "--supervisor")


def test_following_a_log_goes_over_rotation_and_ends_with_the_job(shell: Shell, tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    with shell.store() as store:
        job = store.submit(NewJob(command=("x",), cwd="/"))
        store.claim(job.id, "cpu")
        store.update(job.id, run_folder=str(tmp_path))
        log.write_text("one\n")
        follower = subprocess.Popen(
            [str(SCRIPT), "daemon", "logs", "1", "--follow"], env=shell.environ, stdout=subprocess.PIPE, text=True
        )
        assert follower.stdout is not None
        assert follower.stdout.readline() == "one\n"
        log.rename(tmp_path / "output.log.1")
        log.write_text("two\n")
        assert follower.stdout.readline() == "two\n"
        with log.open("a") as file:
            file.write("three\n")
        store.finish(job.id, State.FINISHED)
        assert follower.communicate(timeout=LIMIT_S)[0] == "three\n"
    assert follower.returncode == 0


# The daemon itself ---------------------------------------------------------------------------------------------------


def test_the_daemon_starts_once_serves_and_stops(shell: Shell) -> None:
    started = shell.run("start")
    assert started.returncode == 0, started.stderr
    facts = read_daemon(shell.home)
    assert facts is not None
    assert started.stdout.startswith(f"The daemon runs (pid {facts.process.pid}) on ")
    assert f"already (pid {facts.process.pid})" in shell.error("start")
    assert f"already (pid {facts.process.pid})" in shell.error("start", "--foreground")
    assert f"Daemon: pid {facts.process.pid} on " in shell.run("status").stdout
    assert shell.run("stop").stdout == f"The daemon (pid {facts.process.pid}) has ended.\n"
    assert not facts.process.is_alive
    assert (shell.home / "daemon.log").stat().st_mode & 0o777 == 0o600


def test_an_idle_daemon_is_small_and_still(shell: Shell) -> None:
    shell.run("start")
    facts = read_daemon(shell.home)
    assert facts is not None
    pid = facts.process.pid
    time.sleep(1)
    before = _processor_ns(pid)
    time.sleep(5)
    assert _processor_ns(pid) - before < 0.002 * 5e9
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert resident is not None
    assert int(resident[1]) < 40 * 1024


def _processor_ns(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def test_systemd_hears_that_it_is_ready_alive_and_stopping(shell: Shell, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "socket"))
        systemd.settimeout(LIMIT_S)
        daemon = subprocess.Popen(
            [str(SCRIPT), "daemon", "start", "--foreground"],
            env={**shell.environ, "NOTIFY_SOCKET": str(tmp_path / "socket"), "WATCHDOG_USEC": "3000000"},
            stderr=subprocess.DEVNULL,
        )
        assert [systemd.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        daemon.terminate()
        assert daemon.wait(LIMIT_S) == 0
        heard = [systemd.recv(100)]
        while heard[-1] == b"WATCHDOG=1":
            heard.append(systemd.recv(100))
        assert heard[-1] == b"STOPPING=1"


def test_a_stale_pid_file_is_told_of_and_replaced(shell: Shell) -> None:
    shell.run("start")
    first = read_daemon(shell.home)
    assert first is not None
    first.process.send(signal.SIGKILL)
    assert first.process.wait(LIMIT_S)
    assert f"The daemon (pid {first.process.pid}) died" in shell.run("status").stdout
    assert f"the last one, pid {first.process.pid}, died" in shell.error("stop")
    again = shell.run("start")
    assert (again.returncode, f"(pid {first.process.pid}) died without a word" in again.stderr) == (0, True)
    assert shell.run("stop").returncode == 0


def test_a_home_that_others_can_write_is_refused_by_every_command(shell: Shell) -> None:
    shell.store().close()
    shell.home.chmod(0o777)
    for words in (["status"], ["submit", "--", "true"], ["start"], ["cancel", "1"]):
        assert f"chmod go-w {shell.home}" in shell.error(*words)
    shell.home.chmod(0o700)


def test_a_cancel_without_daemon_is_sent_to_the_supervisor(shell: Shell) -> None:
    from autotune.recover.identity import process_id

    child = subprocess.Popen(["sleep", "60"])
    with shell.store() as store:
        job = store.submit(NewJob(command=("x",), cwd="/"))
        store.claim(job.id, "cpu")
        supervisor = process_id(child.pid)
        assert supervisor is not None
        store.attach(job.id, supervisor)
        assert "was asked to end (no daemon runs" in shell.run("cancel", "1").stdout
        assert child.wait(LIMIT_S) == -signal.SIGTERM
        assert store.job(job.id).state is State.CANCELLING
        assert "its supervisor had died already" in shell.run("cancel", "1").stdout
        assert store.job(job.id).state is State.CANCELLED
    assert "is cancelled already" in shell.error("cancel", "1")


def test_stop_with_jobs_interrupts_them_for_the_next_daemon(shell: Shell) -> None:
    from autotune.recover.identity import process_id

    child = subprocess.Popen(["sleep", "60"])
    with shell.store() as store:
        job = store.submit(NewJob(command=("x",), cwd="/"))
        store.claim(job.id, "cpu")
        supervisor = process_id(child.pid)
        assert supervisor is not None
        store.attach(job.id, supervisor)
        done = shell.run("stop", "--jobs")
        assert done.stdout == "Interrupted, to be resumed by the next daemon: job 1.\n"
        assert [one.id for one in store.waiting()] == [job.id]
    assert child.wait(LIMIT_S) == -signal.SIGTERM


def test_the_unit_can_be_looked_at_anywhere(shell: Shell) -> None:
    out = shell.run("install", "--print").stdout
    assert "Type=notify\n" in out
    assert f"AUTOTUNE_HOME={shell.home}" in out
    assert not (shell.home / "config").exists()


@pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="systemd runs here")
def test_without_systemd_install_says_how_else(shell: Shell) -> None:
    assert "systemd does not run here" in shell.error("install")
