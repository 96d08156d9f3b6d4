"""One case of the fault table as a job of the daemon: submitted, disturbed, the daemon started again where it died."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from autotune.recover.daemon_file import read_daemon
from autotune.recover.job import ENDED, Job
from autotune.recover.jobs import open_jobs
from benchmarks.fault_inject import Fault
from benchmarks.fault_list import Outside
from benchmarks.fault_run import AUTOTUNE, GRACE_S, ROOT, Play, alive_of, send, wait_until

_DAEMON_S = 60.0  # to begin to serve, or to end


@dataclass
class DaemonPlay(Play):
    """The same, under a daemon of its own."""

    job_id: int = 0

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def start(self) -> None:
        self.launch += 1
        if self.launch > 1:
            self.say("daemon", "stop")  # the launch number is in the daemon's environment
        self.say("daemon", "start")
        self.say("daemon", "submit", *self.options(), "--", *self.trainer())
        with open_jobs(self.home) as store:
            self.job_id = store.jobs()[-1].id
        self.starts.append(time.monotonic())

    def say(self, *words: str) -> None:
        """One command to its end. Raises CalledProcessError."""
        with (self.folder / f"launch-{self.launch}.log").open("ab") as log:
            subprocess.run(
                [str(AUTOTUNE), *words],
                env=self.environment(),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=_DAEMON_S,
                check=True,
            )

    def poll(self) -> int | None:
        """The job's exit code once it has ended; None before."""
        job = self.job()
        return (1 if job.exit_code is None else job.exit_code) if job.state in ENDED else None

    def job(self) -> Job:
        with open_jobs(self.home) as store:
            return store.job(self.job_id)

    def strike(self, one: Outside) -> None:
        """What dies with the daemon goes on when it is started again."""
        self.struck.append(one)
        self.struck_in = self.launch
        daemon, supervisor = read_daemon(self.home), self.job().supervisor
        pids = [daemon.process.pid] if daemon and one.fault in (Fault.KILL_DAEMON, Fault.KILL_ALL) else []
        if supervisor and one.fault is not Fault.KILL_DAEMON:
            pids.append(supervisor.pid)
        if one.fault in (Fault.KILL_BOTH, Fault.KILL_ALL):
            pids += self.trainer_pids()
        send(pids, signal.SIGKILL)
        if one.fault is Fault.KILL_ALL:
            left = self.wait_gone()
            self.orphans += len(left)
            self.notes += [f"alive after {one.fault}: {name}" for name in left]
        if one.fault in (Fault.KILL_DAEMON, Fault.KILL_ALL):
            self.starts.append(time.monotonic())  # from here its recovery counts
            self.say("daemon", "start")

    def wait_gone(self) -> list[str]:
        """What is alive of the run after the grace: the daemon itself goes on."""
        daemon = read_daemon(self.home)
        own = {daemon.process.pid} if daemon and daemon.process.is_alive else set()
        return alive_of(self.folder, GRACE_S, besides=own)

    def end(self) -> None:
        """Stop the daemon; what does not end in time is an orphan."""
        daemon = read_daemon(self.home)
        if daemon is None or not psutil.pid_exists(daemon.process.pid):
            return
        self.say("daemon", "stop")
        if not wait_until(lambda: not daemon.process.is_alive, GRACE_S):
            self.notes.append("the daemon did not stop")
            self.orphans += 1

    def last_words(self) -> str:
        job = self.job()
        return f"job {job.state}: {job.message}"
