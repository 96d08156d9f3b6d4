"""One attempt: run the command, pass on what it prints, watch it, end it where it must be, and report facts alone."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from autotune.errors import AutotuneError
from autotune.recover.card import CardWatch, tenants_bytes
from autotune.recover.ending import Ending, SteadyClock
from autotune.recover.facts import Ended, EndedBy, Launch, Progress
from autotune.recover.keeper import Process, members, read_processes, send
from autotune.recover.output import Output
from autotune.recover.processes import end, marked
from autotune.recover.progress import EventsTail, Told, fold_all
from autotune.recover.ranks import Ranks, is_below, rss_bytes
from autotune.recover.start import Started, SupervisorFailed, cannot_start, start
from autotune.recover.stop import StopRequests
from autotune.recover.watching import Ages, AttemptLimits, collapse, reason_to_end, spill
from autotune.values import Device

_POLL_S = 0.5  # how soon a stop flag or a deadline is seen
_REPORTS_S = 0.25  # between readings of the events file
_JUDGE_S = 0.25  # between looks at the rules
_RANKS_S = 1.0  # between looks whether the ranks' processes are there
_LEFT_ALONE_S = 1.0  # for what a command leaves behind to end by itself
_DRAIN_S = 2.0  # for output, once every process is gone
_LOOK_SHARE = 200  # a look at the processes costs at most a 200th of the time
_CHUNK_BYTES = 65536  # a pipe's capacity


def run_attempt(
    launch: Launch,
    *,
    folder: Path,
    number: int,
    cwd: Path,
    environ: Mapping[str, str],
    limits: AttemptLimits,
    stop: StopRequests,
    watch: Callable[[], Device | None],
    on_progress: Callable[[Progress], None],
    output: Output,
    clock: Callable[[], float] = time.monotonic,
) -> Ended:
    """Run attempt `number` of the run in `folder` to its end, whoever brings that about.

    On return no process of it is left. `clock` must never go back. Raises `CommandNotFound` (127),
    `CommandNotExecutable` (126), `SupervisorFailed` (125).
    """
    attempt = _Attempt(folder / f"attempt-{number}", limits, stop, CardWatch(watch), on_progress, output, clock)
    return attempt.run(launch.argv, cwd, {**environ, **launch.environ})


class _Attempt:
    def __init__(
        self,
        place: Path,
        limits: AttemptLimits,
        stop: StopRequests,
        card: CardWatch,
        on_progress: Callable[[Progress], None],
        output: Output,
        clock: Callable[[], float],
    ) -> None:
        self.place, self.limits, self.stop, self.card = place, limits, stop, card
        self.on_progress, self.output = on_progress, output
        self.clock = SteadyClock(clock)
        self.told = Told()
        self.events = EventsTail(place / "events.jsonl")
        self.ending = Ending(self.clock)
        self.ranks = Ranks()
        self.notes: dict[str, str] = {}
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.error: AutotuneError | None = None
        self.peak_rss_bytes: int | None = None
        self.wall_time_s: float | None = None
        self._status_text = b""
        self._leaving = False
        self._reports_at = self._look_at = self._ranks_at = self._judge_at = -math.inf  # of the next time

    def run(self, argv: tuple[str, ...], cwd: Path, environ: Mapping[str, str]) -> Ended:
        self.output.begin()
        if self.stop.requested:
            return Ended(exit_code=None, signal=self.stop.number, ended_by=EndedBy.USER)
        before = self.card.read()
        self.argv, self.environ = argv, environ
        self.started = start(argv, place=self.place, cwd=cwd, environ=environ, limits=self.limits)
        self.pipes = {self.started.stdout: 0, self.started.stderr: 1}
        self.status: int | None = self.started.status
        self.clock.tick()
        self.began = self.output_at = self.report_at = self.step_at = self.clock.now()
        try:
            while self.status is not None and not self.ending.given_up:
                self.turn()
            self.drain()
        finally:
            self.close()
        if self.error is not None:
            raise self.error
        return self.facts(before)

    def turn(self) -> None:
        self.wait(_POLL_S)
        self.clock.tick()
        self.read_reports()
        self.look()
        self.look_at_ranks()
        self.heed_stop()
        self.judge()
        self.end_what_is_left()
        self.ending.carry_out(members(self.started.keeper.pid) if self.ending.is_due else [])

    # ---------------------------------------------------------------- what comes from the command

    def wait(self, limit_s: float) -> None:
        """For output, room for it at our reader's, the keeper's word, or the limit."""
        poll = select.poll()
        for descriptor, stream in self.pipes.items():
            if not self.output.outlets[stream].is_full:
                poll.register(descriptor, select.POLLIN)
        for outlet in self.output.outlets:
            if outlet.waiting is not None:
                poll.register(outlet.waiting, select.POLLOUT)
        if self.status is not None:
            poll.register(self.status, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(limit_s * 1000)}
        for descriptor in ready & set(self.pipes):
            self.take_output(descriptor)
        if self.status in ready:
            self.take_status()
        for outlet in self.output.outlets:
            if outlet.waiting is not None:
                outlet.flush()

    def take_output(self, descriptor: int) -> None:
        data = os.read(descriptor, _CHUNK_BYTES)
        if data:
            self.output_at = self.clock.now()
            self.output.take(self.pipes[descriptor], data)
        else:
            del self.pipes[descriptor]
            os.close(descriptor)

    def take_status(self) -> None:
        assert self.status is not None
        data = os.read(self.status, 4096)
        if not data:  # the keeper is gone
            os.close(self.status)
            self.status = None
        *lines, self._status_text = (self._status_text + data).split(b"\n")
        for line in lines:
            word, *numbers = line.decode().split()
            self.hear(word, [int(number) for number in numbers])

    def hear(self, word: str, numbers: list[int]) -> None:
        if word == "started":
            self.pid = numbers[0]
        elif word == "failed":
            self.error = cannot_start(self.argv[0], numbers[0], self.environ)
        elif word == "ended":
            self.exit_code = numbers[0]
            self.peak_rss_bytes = max(self.peak_rss_bytes or 0, numbers[1])
            self.command_ended()

    def command_ended(self) -> None:
        self.wall_time_s = self.clock.now() - self.began
        self.card.ask()

    def end_what_is_left(self) -> None:
        """Of a command that has ended: after a moment. A trainer whose launcher is gone has all of its grace."""
        if self.exit_code is None or self._leaving or (self.ending.by is not None and self.may_be_saving()):
            return
        self._leaving = True
        self.ending.plan(_LEFT_ALONE_S, self.ending.terminate)
        self.ending.plan(_LEFT_ALONE_S + self.limits.end_grace_s, self.ending.kill)

    def may_be_saving(self) -> bool:
        """Whether a process that has spoken as a trainer is still there, or none ever spoke and something is."""
        left = {process.pid for process in members(self.started.keeper.pid)}
        spoke = {pid for _, pid in self.told.pids}
        return bool(left & spoke if spoke else left)

    # ---------------------------------------------------------------- what is watched

    def read_reports(self) -> None:
        now = self.clock.now()
        if now < self._reports_at:
            return
        self._reports_at = now + _REPORTS_S
        events = self.events.read()
        if not events:
            return
        before, self.told = self.told, fold_all(self.told, events)
        self.report_at = now
        if _mark(before) != _mark(self.told):
            self.step_at = now
        self.ending.death_seen(bool(self.told.deaths))
        self.on_progress(self.told.progress)

    def look(self) -> None:
        """At the memory of the processes, and at the card."""
        began = self.clock.now()
        if began < self._look_at:
            return
        found = members(self.started.keeper.pid)
        self.ranks.learn(self.told, found)
        rss = sum(rss_bytes(process) for process in found)
        self.peak_rss_bytes = max(self.peak_rss_bytes or 0, rss) or None
        self._look_at = began + max(self.limits.look_s, _LOOK_SHARE * (self.clock.fresh() - began))
        if self.exit_code is None:
            self.card.ask()

    def look_at_ranks(self) -> None:
        now = self.clock.now()
        if now < self._ranks_at or self.exit_code is not None or not self.told.is_distributed:
            return
        self._ranks_at = now + _RANKS_S
        if self.ranks.unknown(self.told):
            self.ranks.learn(self.told, members(self.started.keeper.pid))
        self.ranks.look(self.told, now)

    # ---------------------------------------------------------------- what ends it

    def heed_stop(self) -> None:
        if not self.stop.requested or self.pid is None:
            return
        if self.exit_code is None and self.ending.by is not EndedBy.USER:
            self.forward(self.stop.number)
            self.ending.begin(EndedBy.USER)
            self.ending.plan(self.limits.grace_s, self.ending.kill)
        if self.stop.urgent and not self.ending.killing:
            self.ending.plan(0, self.ending.kill)

    def forward(self, number: int) -> None:
        """To the command's process group, as a terminal would.

        SIGTERM is kept from what a trainer has started: data workers die of it, and their trainer of that, before it
        could save.
        """
        found = {process.pid: process for process in members(self.started.keeper.pid)}
        trainers = {pid for _, pid in self.told.pids} if number == signal.SIGTERM else set()
        for process in found.values():
            if process.group == self.pid and not is_below(process, trainers, found):
                send(process, number)
                send(process, signal.SIGCONT)  # a stopped one hears nothing else

    def judge(self) -> None:
        now = self.clock.now()
        if now < self._judge_at or self.exit_code is not None or self.ending.by is not None or self.status is None:
            return
        self._judge_at = now + _JUDGE_S
        slow = collapse(self.told)
        if slow:
            self.notes.setdefault("collapse", slow)
        reason = reason_to_end(self.told, self.ages(), self.limits)
        if reason is not None:
            self.end_it(*reason)
        elif self.told.progress.steps and (sentence := spill(self.told, self.card.latest, self.limits)):
            self.ask_to_save(sentence)

    def end_it(self, by: EndedBy, why: str) -> None:
        self.notes["ended"] = why
        self.ending.begin(by)
        grace_s = self.limits.rank_grace_s / 2 if by is EndedBy.RANK else self.limits.end_grace_s
        self.ending.plan(0, self.ending.terminate)
        self.ending.plan(grace_s, self.ending.kill)

    def ask_to_save(self, why: str) -> None:
        self.notes["ended"] = f"device memory lies in system RAM: {why}"
        self.ending.begin(EndedBy.SPILL)
        control = self.place / "control.json"
        with contextlib.suppress(OSError):  # then it is ended without
            new = control.with_suffix(".new")
            new.write_text(json.dumps({"do": "save_and_stop"}) + "\n")
            new.replace(control)
        self.ending.plan(self.limits.spill_s, self.ending.terminate)
        self.ending.plan(self.limits.spill_s + self.limits.end_grace_s, self.ending.kill)

    def ages(self) -> Ages:
        now = self.clock.now()
        death_at, gone_at = self.ending.death_at, self.ranks.gone_at
        return Ages(
            run_s=now - self.began,
            output_s=now - self.output_at,
            report_s=now - self.report_at,
            step_s=now - self.step_at,
            death_s=None if death_at is None else now - death_at,
            gone_s=None if gone_at is None else now - gone_at,
        )

    # ---------------------------------------------------------------- the end

    def drain(self) -> None:
        """The keeper is gone: so is all that it kept, unless it was killed. Then the rest of the output."""
        if self.ending.given_up:
            self.notes["left"] = f"processes that do not end: {', '.join(map(str, self.ending.left))}"
        else:
            self.end_escaped()
        until = self.clock.fresh() + _DRAIN_S
        while self.pipes and self.clock.fresh() < until:
            self.wait(0.1)
        self._reports_at = -math.inf
        self.read_reports()
        self.output.finish()

    def end_escaped(self) -> None:
        def escaped() -> list[Process]:
            processes = read_processes()
            found = [*members(self.started.keeper.pid, processes), *marked(self.place.resolve(), processes)]
            return list({process.pid: process for process in found if process.pid != self.started.keeper.pid}.values())

        ended = end(escaped, grace_s=self.limits.end_grace_s)
        if self.pid is not None and self.exit_code is None:  # the kernel ended the command with its keeper
            self.exit_code = -signal.SIGKILL
            self.notes["keeper"] = "the process that kept the command was killed, and the command with it"
        elif ended:
            self.notes["escaped"] = f"{len(ended)} processes had left the command's session and were ended"

    def close(self) -> None:
        """Whatever happened here, nothing of the command stays."""
        if self.status is not None and not self.ending.given_up:  # an error on our side
            end(lambda: members(self.started.keeper.pid), grace_s=self.limits.end_grace_s)
        for descriptor in (*self.pipes, *(() if self.status is None else (self.status,))):
            os.close(descriptor)
        if not self.ending.given_up:
            with contextlib.suppress(TimeoutError):
                _reap(self.started)

    def facts(self, before: Device | None) -> Ended:
        if self.pid is None:
            raise SupervisorFailed(
                f"the command's keeper failed: {self.output.tail.strip()[-500:] or 'it said nothing'}"
            )
        at_end = self.card.latest
        after = self.card.wait_for_memory(before)
        held = [found for found in (tenants_bytes(at_end), tenants_bytes(after)) if found is not None]
        code = self.exit_code
        return Ended(
            exit_code=code,
            signal=-code if code is not None and code < 0 else None,
            ended_by=self.ended_by(),
            progress=self.told.progress,
            death=self.told.death,
            tail=self.output.tail,
            pid=self.pid,
            wall_time_s=self.wall_time_s if self.wall_time_s is not None else self.clock.now() - self.began,
            peak_rss_bytes=self.peak_rss_bytes,
            free_before_bytes=before.free_bytes if before else None,
            free_after_bytes=after.free_bytes if after else None,
            tenants_bytes=max(held, default=None),
            notes=(*self.notes.values(), *self.output.notes, *self.garbage()),
        )

    def ended_by(self) -> EndedBy:
        """A run that was asked to save and stop, and had come to its last step by then, ended itself."""
        progress = self.told.progress
        is_done = progress.max_steps is not None and (progress.step or 0) >= progress.max_steps
        if self.ending.by is EndedBy.SPILL and self.exit_code == 0 and is_done:
            return EndedBy.ITSELF
        return self.ending.by or EndedBy.ITSELF

    def garbage(self) -> tuple[str, ...]:
        count = self.events.garbage_lines
        return (f"{count} lines of {self.events.path.name} could not be read",) if count else ()


def _mark(told: Told) -> tuple[object, ...]:
    """What has changed when training has gone on."""
    return told.begun, told.progress.step, told.progress.phase


def _reap(started: Started) -> None:
    """The keeper has nothing left to keep; one that does not see so is ended."""
    deadline = time.monotonic() + 5.0
    while started.keeper.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if started.keeper.poll() is None:
        started.keeper.kill()
        started.keeper.wait(5.0)
