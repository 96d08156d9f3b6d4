"""The hands of a supervised run: what its loop is given to start, judge, choose, keep and tell with."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from autotune.cli.run_record import record_trials
from autotune.cli.run_row import Row
from autotune.cli.run_text import attempt_lines, end_line, incident_lines, tell
from autotune.errors import Interrupted, InvalidRequest, StoreError
from autotune.hardware.readers import watcher
from autotune.recover.checkpoints import newest_complete, prepare_resume, present, set_aside_incomplete
from autotune.recover.decide import Options, decide
from autotune.recover.facts import Action, Change, Checkpoint, Decision, Ended, Incident, Launch, Progress, Settings
from autotune.recover.judge_run import judge
from autotune.recover.longest import died_earlier
from autotune.recover.output import Output
from autotune.recover.plan import RunState, attempt_folder, write_plan, write_state
from autotune.recover.policy import Policy
from autotune.recover.report import report_text
from autotune.recover.run import Seams
from autotune.recover.step_down import Nothing, StepDown, next_config
from autotune.recover.stop import StopRequests
from autotune.recover.supervise import run_attempt
from autotune.values import AllocatorSetting, Device, Judgement
from autotune.verdict.evidence import read_evidence
from autotune.verdict.judge import Evidence

if TYPE_CHECKING:
    from autotune.cli.run_job import Asked

logger = logging.getLogger(__name__)

_NO_LOG = Path(os.devnull)
_LOOK_S = 2.0  # between looks at a card whose memory is waited for
REPORT = "report.md"


class Hands:
    """One run's. A context: signals are caught, and output and row are closed afterwards."""

    def __init__(self, asked: Asked, folder: Path, run_id: str) -> None:
        self.asked, self.folder, self.run_id = asked, folder, run_id
        self.stop = StopRequests()
        self.watch = watcher(asked.device)
        self.output = Output(folder / "output.log")
        self.policy = Policy(
            restarts=asked.options["restarts"],
            window_s=asked.options["window"],
            on_tenant="wait" if asked.options["on_tenant"] == "wait" else "step_down",
        )
        self.row = Row(asked, folder, self.stop)
        self.state: RunState | None = None
        self.before: Evidence | None = None
        self.began = 0.0
        self.refused: str | None = None
        self.leftovers: dict[str, int] | None = None  # of another run, where only the trainer says its output folder
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Hands:
        self._stack.enter_context(self.stop.handled())
        self._stack.callback(self.output.close)
        self._stack.enter_context(self.row)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)  # not close(): the row must hear of what went wrong

    def seams(self) -> Seams:
        return Seams(
            attempt=self.attempt,
            judge=self.judge,
            decide=self.decide,
            newest=self.newest,
            prepare=self.prepare,
            record=self.record,
            place=self.place,
            save=self.save,
            observer=self,
            wait=self.wait,
            now=time.time,
            now_utc=lambda: datetime.now(UTC).isoformat(timespec="seconds"),
        )

    # ---------------------------------------------------------------- an attempt

    def place(self, number: int) -> Path:
        place = attempt_folder(self.folder, number)
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{place} cannot be made ({error.strerror}): make room on that disk") from error
        return place

    def attempt(
        self, launch: Launch, number: int, settings: Settings, change: Change, resume: Checkpoint | None
    ) -> Ended:
        told = write_plan(
            self.folder,
            run_id=self.run_id,
            number=number,
            settings=replace(settings, output_dir=_absolute(settings.output_dir, self.asked.cwd)),
            changed=change,
            resume=resume.path if resume else None,
        )
        self.before, self.began = read_evidence(dmesg=None, kmsg=_NO_LOG), time.time()
        ended = run_attempt(
            replace(launch, environ={**launch.environ, **told}),
            folder=self.folder,
            number=number,
            cwd=self.asked.cwd,
            environ=self.asked.environ,
            limits=self.asked.limits,
            stop=self.stop,
            watch=self.watch,
            on_progress=self.progress,
            output=self.output,
        )
        if self.refused:
            raise InvalidRequest(self.refused)
        for note in ended.notes:
            tell(note)
        return ended

    def progress(self, progress: Progress) -> None:
        self.row.progress(progress)
        if self.leftovers is None and progress.output_dir and self.state and self.state.leftovers is None:
            self.leftovers = present(self.asked.cwd / progress.output_dir)  # told before its first save
            self.save(self.state)
        unsaved = progress.save_strategy == "no" and not self.asked.options["without_checkpoints"]
        if unsaved and not self.refused:
            self.refused = (
                "the trainer saves no checkpoints (save_strategy no), so a death loses all that was trained: set"
                " save_strategy to steps, or consent with --without-checkpoints"
            )
            self.stop.cancel()

    def judge(self, ended: Ended) -> Judgement:
        died = ended.exit_code != 0 or ended.death is not None
        device = self.asked.device
        return judge(
            ended,
            target="cpu" if device.kind == "cpu" else "cuda",
            limit_bytes=self.asked.limit_bytes,
            device_total_bytes=device.total_bytes,
            evidence=read_evidence((ended.pid,) if ended.pid else (), self.began) if died else None,
            before=self.before,
        )

    # ---------------------------------------------------------------- what follows

    def decide(self, ended: Ended, judgement: Judgement, history: Sequence[Incident], settings: Settings) -> Decision:
        options = Options(
            smaller=lambda: self.smaller(ended, judgement, history, settings),
            can=self.asked.command.can,
            eval_micro_batch_size=ended.progress.eval_micro_batch_size or settings.eval_micro_batch_size,
            workers=settings.dataloader_workers,
            offloads=settings.gradient_checkpointing == "offload",
        )
        try:
            return decide(ended, judgement, history, self.policy, options, now=datetime.now(UTC))
        except Interrupted as stopped:  # while a config was chosen
            stopped.exit_code = 128 + self.stop.number
            raise

    def smaller(
        self, ended: Ended, judgement: Judgement, history: Sequence[Incident], settings: Settings
    ) -> StepDown | Nothing:
        from autotune.cli.run_foresight import foresight  # what predicts is heavy, and most runs never need it

        asked, known = self.asked, self._with_options(settings)
        self.row.says("choosing a config that fits")
        with foresight(known, ended, asked.device, asked.limit_bytes, lambda: self.stop.requested) as seen:
            if seen.why_not:
                tell(f"nothing can be predicted ({seen.why_not}): the next smaller step is taken")
            return next_config(
                known,
                ended,
                judgement,
                can=asked.command.can,
                device=asked.device,
                allowed_bytes=asked.limit_bytes if asked.device.kind == "cpu" else None,
                trials=seen.trials,
                predictor=seen.predictor,
                base=seen.base,
                died=died_earlier(self._with_options(asked.command.settings), history, ended.progress),
                allocator=self._allocator(),
            )

    def _with_options(self, settings: Settings) -> Settings:
        asked = self.asked.settings
        return replace(
            settings,
            model=settings.model or asked.model,
            sequence_length=settings.sequence_length or asked.sequence_length,
        )

    def _allocator(self) -> AllocatorSetting:
        changed = (self.state.changed if self.state else None) or {}
        stated = " ".join(value for name, value in self.asked.environ.items() if name.startswith("PYTORCH_"))
        grows = changed.get("allocator") == "expandable_segments" or "expandable_segments:True" in stated
        return AllocatorSetting.EXPANDABLE_SEGMENTS if grows else AllocatorSetting.DEFAULT

    def newest(self, state: RunState) -> Checkpoint | None:
        if state.output_dir is None:
            return None
        place = Path(state.cwd, state.output_dir)
        leftovers = state.leftovers if self.leftovers is None else self.leftovers
        with contextlib.suppress(FileNotFoundError):
            try:
                for path in set_aside_incomplete(place, leftovers or {}):
                    self.say(f"an incomplete checkpoint was set aside: {path}")
            except StoreError as error:
                self.say(str(error))
        since = state.began_at if leftovers is None else None
        return newest_complete(place, since=since, leftovers=leftovers)

    def prepare(self, checkpoint: Checkpoint, settings: Settings) -> None:
        if settings.micro_batch_size is not None:
            prepare_resume(checkpoint, settings.micro_batch_size)

    def wait(self, decision: Decision, ended: Ended) -> int | None:
        """For the time it names, or until the card has as much free memory as before; at most one look a while."""
        until = time.monotonic() + decision.wait_s
        while time.monotonic() < until and not self.stop.requested:
            if decision.action is Action.WAIT and self._is_free_again(ended):
                break
            time.sleep(min(_LOOK_S if decision.action is Action.WAIT else 0.2, max(0.0, until - time.monotonic())))
        return self.stop.number if self.stop.requested else None

    def _is_free_again(self, ended: Ended) -> bool:
        now: Device | None = self.watch()
        if now is None or now.free_bytes is None or ended.free_before_bytes is None:
            return False
        return now.free_bytes >= 0.98 * ended.free_before_bytes

    # ---------------------------------------------------------------- what is kept and told

    def save(self, state: RunState) -> None:
        self.state = replace(state, leftovers=state.leftovers if self.leftovers is None else self.leftovers)
        try:
            write_state(self.folder, self.state)
        except StoreError as error:
            if state.exit_code is None:
                raise
            self.say(str(error))  # it has ended: its exit code is still the command's

    def record(self, ended: Ended, judgement: Judgement, settings: Settings) -> None:
        try:
            record_trials(
                ended,
                judgement,
                self._with_options(settings),
                self.asked.device,
                self.asked.limit_bytes,
                run_id=self.run_id,
                stopped=lambda: self.stop.requested,
            )
        except Interrupted:
            self.say("what was measured is not kept: it was stopped")
        except StoreError as error:
            self.say(f"what was measured is not kept: {error}")

    def attempt_starts(self, number: int, launch: Launch, resume: Checkpoint | None, settings: Settings) -> None:
        self.row.begins(number)
        for line in attempt_lines(number, launch, resume, settings):
            self.say(line)

    def incident(self, incident: Incident) -> None:
        for line in incident_lines(incident):
            self.say(line)
        self.row.incident(incident)
        self._report()

    def ends(self, state: RunState, ended: Ended) -> None:
        self.state = state
        report = self._report() if state.incidents else None
        line = end_line(state, ended, str(report) if report else None, is_job=self.asked.job is not None)
        self.say(line)
        self.row.ends(state, ended, line)

    def say(self, line: str) -> None:
        tell(line)
        self.output.keep(f"autotune: {line}\n".encode())

    def _report(self) -> Path | None:
        if self.state is None:
            return None
        path = self.folder / REPORT
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(report_text(self.state))
        except OSError as error:
            tell(f"{path} cannot be written ({error.strerror})")
            return None
        return path


def _absolute(path: str | None, cwd: Path) -> str | None:
    return None if path is None else str(cwd / path)
