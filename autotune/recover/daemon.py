"""The daemon: a loop that starts a supervisor for each queued job, watches them, and resumes what was interrupted.

It may die at any moment: supervisors go on without it, and the next one finds them by pid and start. What decides is
in the rows; what is here can be lost.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autotune import __version__
from autotune.errors import AutotuneError
from autotune.recover.daemon_file import DaemonFacts, only_daemon, write_daemon
from autotune.recover.identity import own_process_id, process_id, this_boot
from autotune.recover.job import LIVE, Event, Job, State
from autotune.recover.jobs import JobStore, open_jobs, utc_now
from autotune.recover.notify import tell
from autotune.recover.slots import Slot, place, slot_environ, wanted_slots
from autotune.recover.supervisors import (
    SupervisorCommand,
    end_leftovers,
    is_gone,
    start_supervisor,
    supervisor_command,
)
from autotune.recover.systemd import Notifier
from autotune.recover.wakeup import Wakeup

log = logging.getLogger(__name__)


#: Exit codes of a supervisor that SIGINT or SIGTERM ended before it listened to them.
_SIGNALLED = (130, 143)


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonLimits:
    """What the daemon allows."""

    share: int = 1  # jobs at once on one device
    restarts: int = 3  # of a supervisor that dies again and again without a step done in between
    cancel_s: float = 60.0  # from the signal to a supervisor to its end, beyond the grace that it gives the command
    tick_s: float = 1.0  # between looks at the queue


def serve(
    home: Path,
    slots: Callable[[], tuple[Slot, ...]],
    *,
    limits: DaemonLimits | None = None,
    command: SupervisorCommand = supervisor_command,
) -> None:
    """Be the daemon of `home` until SIGTERM or SIGINT. Raises InvalidRequest where one runs, StoreError."""
    limits, wakeup, notifier = limits or DaemonLimits(), Wakeup(), Notifier()
    with only_daemon(home), wakeup.listening():
        daemon = Daemon(open_jobs(home), found := slots(), limits, command)
        facts = DaemonFacts(
            process=own_process_id(),
            since_utc=utc_now(),
            version=__version__,
            devices=tuple(slot.id for slot in found),
            share=limits.share,
        )
        write_daemon(home, facts)
        log.info("autotune %s, pid %d: serving %s on %s", __version__, os.getpid(), home, ", ".join(facts.devices))
        notifier.say("READY=1")
        while wakeup.stop is None:
            daemon.turn_and_go_on()
            notifier.alive()
            wakeup.wait(limits.tick_s)
        daemon.store.close()
        notifier.say("STOPPING=1")
        notifier.close()
        log.info("stopped by %s; %d supervisors go on", signal.Signals(wakeup.stop).name, len(daemon.live))


class Daemon:
    """One turn after the other. The store is in its hands: it reopens a file that was moved away."""

    def __init__(
        self, store: JobStore, slots: Sequence[Slot], limits: DaemonLimits, command: SupervisorCommand
    ) -> None:
        self.store, self.slots, self.limits, self.command = store, slots, limits, command
        self.live: list[Job] = []
        self._children: dict[int, subprocess.Popen[bytes]] = {}  # job → the supervisor that this process started
        self._cancels: dict[int, float] = {}  # job → `time.monotonic()` of the signal
        self._seen: int | None = None  # data version at the last turn
        self._said: dict[str, float] = {}  # error → when it was logged

    def turn_and_go_on(self) -> None:
        try:
            self.turn()
        except Exception as error:  # noqa: BLE001 - whatever a turn dies of, the jobs of the next one are served
            self._seen = None  # look again next time
            self._log_at_times(error)

    def turn(self) -> None:
        """Look at what was asked for and at what has ended; start what can start."""
        self._reopen_if_moved()
        if not self._is_anything_new():
            return
        codes = self._reap()
        for job in self.store.jobs(states=LIVE):
            if self._has_lost_its_supervisor(job):
                self._take_back(job, codes.get(job.id))
            elif job.state is State.CANCELLING:
                self._end(job)
        self._start_what_can_start()
        self.live = self.store.jobs(states=LIVE)
        self._cancels = {job.id: self._cancels[job.id] for job in self.live if job.id in self._cancels}

    def _reopen_if_moved(self) -> None:
        if not self.store.is_in_place():
            log.warning("%s was moved away: opening it anew", self.store.path)
            new = open_jobs(self.store.home)
            self.store.close()
            self.store, self._seen = new, None

    def _is_anything_new(self) -> bool:
        """Something was written, or something is running that may have ended."""
        seen, self._seen = self._seen, self.store.data_version()
        return seen != self._seen or bool(self.live or self._children)

    def _reap(self) -> dict[int, int]:
        """Exit codes of the supervisors that have ended, by job."""
        codes = {job_id: code for job_id, child in self._children.items() if (code := child.poll()) is not None}
        for job_id, code in codes.items():
            del self._children[job_id]
            log.info("job %d: its supervisor ended with exit code %d", job_id, code)
        return codes

    def _has_lost_its_supervisor(self, job: Job) -> bool:
        """Neither one that this daemon started lives, nor one that has said so in the row."""
        return job.id not in self._children and is_gone(job.supervisor)

    def _take_back(self, job: Job, code: int | None) -> None:
        """A live row without supervisor: nothing of the run may go on; then it is queued again, or given up."""
        job = self.store.job(job.id)  # its supervisor's last words may have come since
        if job.state not in LIVE:
            return
        if ended := end_leftovers(job):
            log.warning("%s: ended what its supervisor left behind (pids %s)", job.label, ", ".join(map(str, ended)))
        if job.state is State.CANCELLING:
            self._close(job, State.CANCELLED, code, "cancelled")
        elif job.kind == "run":
            self.store.interrupt(job.id, "its supervisor died: start the command again, with --resume", seen=job)
        elif code is not None and code >= 0 and code not in _SIGNALLED:
            self._close(
                job, State.FAILED if code else State.FINISHED, code, f"its supervisor ended with exit code {code}"
            )
        else:
            self._queue_again(job)

    def _queue_again(self, job: Job) -> None:
        rebooted = job.supervisor is not None and job.supervisor.boot != this_boot()
        progress = job.step is not None and job.step > (job.step_at_start or 0)
        restarts = job.restarts if rebooted else 1 if progress else job.restarts + 1
        if restarts > self.limits.restarts:
            self._close(job, State.FAILED, None, f"its supervisor died {restarts} times without progress")
            return
        why = "the machine was started anew" if rebooted else "its supervisor died"
        self.store.interrupt(job.id, f"{why}: to be resumed", restarts=restarts, seen=job)
        log.warning("%s: %s, it is to be resumed", job.label, why)

    def _close(self, job: Job, state: State, code: int | None, message: str) -> None:
        """What a supervisor could not say itself."""
        job = self.store.finish(job.id, state, exit_code=code, message=message, seen=job)
        log.info("%s: %s (%s)", job.label, job.state, message)
        self._seen = None  # its place is free, and no other process has written that
        if job.state in (State.FINISHED, State.FAILED):
            tell(job, Event(job.state.value), message, home=self.store.home)

    def _end(self, job: Job) -> None:
        """Ask a supervisor to end, once; past the limit it is killed, and its keeper ends the command."""
        now = time.monotonic()
        if job.supervisor is None:
            return
        if job.id not in self._cancels:
            self._cancels[job.id] = now
            log.info("%s: cancelled, asking pid %d to end", job.label, job.supervisor.pid)
            job.supervisor.send(signal.SIGTERM)
        elif now > self._cancels[job.id] + self.limits.cancel_s + float(job.option("grace", "30")):
            log.warning("%s: pid %d did not end in time and is killed", job.label, job.supervisor.pid)
            job.supervisor.send(signal.SIGKILL)

    def _start_what_can_start(self) -> None:
        live = self.store.jobs(states=LIVE)
        busy = Counter(job.device for job in live if job.device is not None)
        if not any(busy[slot.id] < self.limits.share for slot in self.slots):
            return
        waiting = self.store.waiting()
        for job, device in place(waiting, self.slots, busy, self.limits.share):
            if (claimed := self.store.claim(job.id, device)) is not None:
                self._start(claimed, device)
        for job in waiting:
            if not wanted_slots(job.gpu, self.slots):
                here = ", ".join(slot.id for slot in self.slots)
                message = f"waits for {job.gpu}, which is not here (here: {here})"
                if job.message != message:
                    self.store.say(job.id, message)

    def _start(self, job: Job, device: str) -> None:
        environ = slot_environ(device, self.slots)
        try:
            child = start_supervisor(job, self.command(job), home=self.store.home, environ=environ)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            where = error.filename or job.cwd
            self._close(job, State.FAILED, None, f"it cannot be started ({where}: {error.strerror})")
            return
        except OSError as error:  # a full disk, no process to be had: not the job's fault, and it may pass
            self.store.interrupt(job.id, f"cannot be started now: {error.strerror}", restarts=job.restarts)
            raise
        self._children[job.id] = child
        if (supervisor := process_id(child.pid)) is not None:
            self.store.attach(job.id, supervisor)
        log.info("%s: started on %s, supervisor pid %d", job.label, device, child.pid)

    def _log_at_times(self, error: Exception) -> None:
        """The same trouble once a minute."""
        text, now = f"{type(error).__name__}: {error}", time.monotonic()
        if now < self._said.get(text, -1e9) + 60:
            return
        self._said = {text: now, **{other: at for other, at in self._said.items() if now < at + 60}}
        log.error("a turn failed, going on: %s", text, exc_info=not isinstance(error, AutotuneError))
