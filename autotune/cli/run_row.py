"""A run's row in the queue's database, so that status shows it; a row that cannot be written never stops the run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from autotune.cli.run_text import tell
from autotune.errors import InvalidRequest, StoreError
from autotune.recover.facts import Action, Ended, EndedBy, Incident, Progress
from autotune.recover.identity import own_process_id
from autotune.recover.job import LIVE, Event, Job, NewJob, State
from autotune.recover.jobs import JobStore, open_jobs
from autotune.recover.notify import hook_words
from autotune.recover.notify import tell as notify
from autotune.recover.plan import RunState
from autotune.recover.stop import StopRequests

if TYPE_CHECKING:
    from autotune.cli.run_job import Asked

_EVERY_S = 1.0  # between words on progress
_HOOK_S = 65.0  # for hooks to end: their own limit is 60 s
_HOOKS = {event.value: f"on_{event}" for event in Event}


class Row:
    """The job's of the daemon, or one of its own for a bare run."""

    def __init__(self, asked: Asked, folder: Path, stop: StopRequests) -> None:
        self.asked, self.folder, self.stop = asked, folder, stop
        self.store: JobStore | None = None
        self.job: Job | None = None
        self._said_at = 0.0
        self._stack = contextlib.ExitStack()
        self._hooks = {
            event: hook_words(words, f"--{name.replace('_', '-')}")
            for event, name in _HOOKS.items()
            if (words := asked.options[name])
        }

    def __enter__(self) -> Row:
        with self._tolerant():
            self.store = self._stack.enter_context(open_jobs())
            self.job = self._begun(self.store)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._tolerant():
            if error is not None and self.store is not None and self.job is not None:
                message = str(error) or type(error).__name__
                code = getattr(error, "exit_code", None)
                code = code if code in (126, 127) else 125
                self.store.finish(self.job.id, State.FAILED, exit_code=code, message=message)
                self._notify(Event.FAILED, message)
        self._stack.close()

    def _begun(self, store: JobStore) -> Job:
        if self.asked.job is not None:
            if not store.attach(self.asked.job, own_process_id()):
                raise InvalidRequest(f"job {self.asked.job} is not this process's to run: it was taken or cancelled")
            store.update(self.asked.job, state=State.RUNNING, run_folder=str(self.folder))
            return store.job(self.asked.job)
        if (job := self._taken_up(store)) is not None:
            return job
        new = NewJob(
            command=self.asked.words,
            cwd=str(self.asked.cwd),
            hooks=self._hooks,
            gpu=self.asked.options["gpu"],
        )
        job = store.register(new)
        store.update(job.id, run_folder=str(self.folder), device=self.asked.device.id)
        return store.job(job.id)

    def _taken_up(self, store: JobStore) -> Job | None:
        """The row of this run, where a killed supervisor left one; its hooks are those of now."""
        for job in store.jobs(states=(*LIVE, State.INTERRUPTED)):
            if job.kind != "run" or job.run_folder != str(self.folder):
                continue
            if job.state in LIVE:
                store.interrupt(job.id, "its supervisor died", seen=job)
            if store.claim(job.id, self.asked.device.id) and store.attach(job.id, own_process_id()):
                return replace(store.job(job.id), hooks=self._hooks)
        return None

    def begins(self, number: int) -> None:
        self._update(state=State.RUNNING, attempts=number, message="running")

    def says(self, message: str) -> None:
        self._update(message=message)

    def progress(self, progress: Progress) -> None:
        """At most once a second."""
        if time.monotonic() - self._said_at < _EVERY_S:
            return
        self._said_at = time.monotonic()
        self._update(
            phase=progress.phase.value,
            step=progress.step,
            max_steps=progress.max_steps,
            tokens_per_second=progress.tokens_per_second,
            step_time_s=progress.step_time_s,
            loss=progress.loss,
            memory_bytes=progress.peak_reserved_bytes or progress.peak_allocated_bytes,
            memory_limit_bytes=self.asked.limit_bytes or progress.device_total_bytes,
        )

    def incident(self, incident: Incident) -> None:
        with self._tolerant():
            if self.store is not None and self.job is not None:
                self.store.add_incident(self.job.id, incident)
        if incident.decision.action is Action.STOP:
            return
        waits = incident.decision.action is Action.WAIT
        self._update(state=State.WAITING if waits else State.RECOVERING, message=incident.decision.why)
        self._notify(Event.RECOVERED, incident.decision.why)

    def ends(self, state: RunState, ended: Ended, line: str) -> None:
        if self.store is None or self.job is None:
            return
        self._said_at = 0.0
        self.progress(ended.progress)
        with self._tolerant():
            now = self.store.job(self.job.id)
            stopped = ended.ended_by is EndedBy.USER
            well = state.exit_code == 0 and not stopped
            if not well and (now.state is State.CANCELLING or (stopped and self.asked.job is None)):
                self.store.finish(self.job.id, State.CANCELLED, exit_code=state.exit_code, message=line)
            elif stopped:  # the daemon or the machine stops: it goes on when they are back
                self.store.interrupt(self.job.id, line)
            else:
                end = State.FINISHED if well else State.FAILED
                self.store.finish(self.job.id, end, exit_code=state.exit_code, message=line)
                self._notify(Event.FINISHED if well else Event.FAILED, line)

    def _notify(self, event: Event, message: str) -> None:
        if self.store is None or self.job is None:
            return
        thread = notify(self.job, event, message, home=self.store.home)
        if event is not Event.RECOVERED:
            thread.join(_HOOK_S)

    def _update(self, **said: object) -> None:
        with self._tolerant():
            if self.store is None or self.job is None:
                return
            now = self.store.update(self.job.id, **said)  # type: ignore[arg-type]
            if now is State.CANCELLING or now not in LIVE:
                self.stop.cancel()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            if self.store is not None or self.asked.job is None:
                tell(f"status will not show this run as it is: {error}")
            if self.asked.job is not None and self.job is None:
                raise
            self.store = None
