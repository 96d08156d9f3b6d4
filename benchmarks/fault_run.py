"""One case of the fault table under `autotune run`: started, disturbed, started again where a user would, checked."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.fault_check import Truth, final_state, recoveries_s, repeated, steps_lost, wrong_recoveries
from benchmarks.fault_inject import FAULTS_VARIABLE, LAUNCH_VARIABLE, Fault
from benchmarks.fault_ledger import of, read_ledger
from benchmarks.fault_list import Case, Outside

MARK = "AUTOTUNE_BENCHMARK_CASE"  # in the environment of all that a case starts
ROOT = Path(__file__).parent.parent
AUTOTUNE = Path(sys.executable).with_name("autotune")
GRACE_S = 10.0  # for everything of a run to be gone after its supervisor has ended or was killed
LAUNCH_LIMIT_S = 90.0
REAL_LAUNCH_LIMIT_S = 240.0
LAUNCHES = 4
PAIRS = tuple(itertools.product((signal.SIGTERM, signal.SIGINT), repeat=2))
STALL = "4s"  # without a step
STOPS = frozenset({Fault.BUG, Fault.DISK_FULL, Fault.OOM_LOAD, Fault.OOM_SAVE})  # a user's turn, not a retry's
KILLED = frozenset({Fault.KILL_SUPERVISOR, Fault.KILL_BOTH, Fault.KILL_ALL, Fault.DOUBLE_SIGNAL})


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    number: int
    kind: Fault
    real: bool
    daemon: bool
    faults: int  # that struck
    finished: bool
    same: bool  # as the undisturbed run: samples, order, steps, learning rates
    steps_lost: int  # beyond the last complete checkpoint
    steps_repeated: int  # since the last complete checkpoint
    orphans: int
    wrong: tuple[str, ...]
    attempts: int
    launches: int
    recoveries_s: tuple[float, ...]
    seconds: float
    stopped_rightly: bool | None  # None: nothing called for it
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        unharmed = self.finished and self.same and not self.steps_lost and not self.orphans and not self.wrong
        return unharmed and self.stopped_rightly is not False and self.faults > 0


@dataclass
class Play:
    """A case being played in a folder of its own."""

    case: Case
    truth: Truth
    folder: Path
    launch: int = 0  # how often it was started, by a user as it were
    starts: list[float] = field(default_factory=list)  # of supervisors and daemons, on the clock of the ledger
    struck: list[Outside] = field(default_factory=list)
    struck_in: int = 0  # launch of the newest
    notes: list[str] = field(default_factory=list)
    orphans: int = 0
    stopped_rightly: bool | None = None
    stops: int = 0  # after which a user started it anew
    process: subprocess.Popen[bytes] | None = None
    clock: Path | None = None  # library that makes the wall clock wrong

    @property
    def output_dir(self) -> Path:
        return self.folder / "out"

    def run(self) -> Outcome:
        began = time.monotonic()
        self.prepare()
        try:
            for _ in range(LAUNCHES):
                if not self.launch_once():
                    break
                self.mend()
            self.end()
        finally:
            end_all(self.folder)
        return self.outcome(time.monotonic() - began)

    def prepare(self) -> None:
        self.output_dir.mkdir(parents=True)
        clock, spec = self.folder / "clock", self.case.spec_in(self.folder)
        clock.write_text(str(spec.clock_before), encoding="ascii")
        long = self.truth.order[spec.long_step - 1][-1] if self.truth.order and spec.long_step else None
        spec = replace(spec, clock_file=str(clock), long_sample=long)
        (self.folder / "spec.json").write_text(spec.to_json(), encoding="utf-8")

    def launch_once(self) -> bool:
        """Start the run, or go on with it; whether it is to be started once more."""
        self.start()
        code = self.watch()
        survivors = self.wait_gone()
        self.orphans += len(survivors)
        self.notes += [f"alive after launch {self.launch}: {name}" for name in survivors]
        entries = read_ledger(self.folder)
        if final_state(entries) is not None and code == 0:
            return False
        if code is None:
            self.notes.append(f"launch {self.launch} was not over in time")
            return False
        stops = [fault for fault in self.faults_of(entries) if fault in STOPS]
        if stops:
            self.stopped_rightly = code not in (0, 125, 126, 127)
            self.stops += 1
            return True
        if self.was_struck():
            return True
        self.notes.append(f"launch {self.launch} ended with {code}: {self.last_words()}")
        return False

    def faults_of(self, entries: Sequence[dict[str, Any]]) -> list[Fault]:
        """That struck in the newest launch."""
        attempts = {entry["attempt"] for entry in of(entries, "start") if entry["launch"] == str(self.launch)}
        return [Fault(entry["fault"]) for entry in of(entries, "fault") if entry["attempt"] in attempts]

    def was_struck(self) -> bool:
        """Whether the newest launch's supervisor was ended from outside."""
        return any(one.fault in KILLED for one in self.struck) and self.struck_in == self.launch

    def start(self) -> None:
        self.launch += 1
        self.starts.append(time.monotonic())
        with (self.folder / f"launch-{self.launch}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*self.supervisor(), "--", *self.trainer()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                cwd=ROOT,
                start_new_session=True,
            )

    def environment(self) -> dict[str, str]:
        added = {**environ_of(self.folder), LAUNCH_VARIABLE: str(self.launch)}
        if self.case.kind is Fault.CLOCK_JUMP:
            added |= {"LD_PRELOAD": str(self.clock), "AUTOTUNE_BENCHMARK_CLOCK": str(self.folder / "clock")}
        return added

    def supervisor(self) -> list[str]:
        options = [*self.options(), "--run-folder", str(self.folder / f"run-{1 + self.stops}")]
        return [str(AUTOTUNE), "run", *options, *(["--resume"] if self.launch > 1 and not self.stopped else [])]

    def options(self) -> list[str]:
        limit = f"{self.case.limit_bytes >> 20}MiB"
        return ["--gpu", "cpu", "--memory-limit", limit, "--stall-floor", STALL, "--grace", "2s"]

    def wait_gone(self) -> list[str]:
        """What is alive of the run after the grace."""
        return alive_of(self.folder, GRACE_S)

    def end(self) -> None:
        """Nothing is left to end where the supervisor has."""

    def poll(self) -> int | None:
        """The run's exit code once it is over; None before."""
        assert self.process is not None
        return self.process.poll()

    @property
    def stopped(self) -> bool:
        return self.stopped_rightly is not None

    def trainer(self) -> list[str]:
        words = words_of(self.case, self.output_dir)
        if self.stopped and (newest := self.newest()):
            words += ["--resume_from_checkpoint", str(newest)]  # as a user does who has mended what stopped the run
        return words

    def newest(self) -> Path | None:
        """The newest complete checkpoint, by the ledger."""
        entries = read_ledger(self.folder)
        damaged = {entry["path"] for entry in of(entries, "damaged")}
        whole = [entry["path"] for entry in of(entries, "checkpoint") if entry["path"] not in damaged]
        return Path(whole[-1]) if whole else None

    def watch(self) -> int | None:
        """Until the supervisor ends, faults brought about on the way. Its exit code; None: not over in time."""
        deadline = time.monotonic() + (REAL_LAUNCH_LIMIT_S if self.case.real else LAUNCH_LIMIT_S)
        waiting = [one for one in self.case.outside if one not in self.struck]
        while (code := self.poll()) is None and time.monotonic() < deadline:
            if waiting and self.is_due(waiting[0]):
                self.strike(waiting.pop(0))
            time.sleep(0.01)
        return code

    def is_due(self, one: Outside) -> bool:
        if one.step == 0:
            return time.monotonic() >= self.starts[-1] + one.delay_s
        steps = [entry["clock"] for entry in of(read_ledger(self.folder), "step") if entry["step"] >= one.step]
        return bool(steps) and time.monotonic() >= steps[0] + one.delay_s

    def strike(self, one: Outside) -> None:
        assert self.process is not None
        self.struck.append(one)
        self.struck_in = self.launch
        pids = [self.process.pid]
        if one.fault is Fault.DOUBLE_SIGNAL:
            first, second = PAIRS[self.case.number % len(PAIRS)]
            send(pids, first)
            time.sleep(one.delay_s % 0.1 * 6)  # the second one may count as the first again, or as urgent
            send(pids, second)
            return
        if one.fault in (Fault.KILL_BOTH, Fault.KILL_ALL):
            pids += self.trainer_pids()
        send(pids, signal.SIGKILL)

    def trainer_pids(self) -> list[int]:
        return [process.pid for process in marked(self.folder) if runs(process, module_of(self.case))]

    def mend(self) -> None:
        """What a user does before starting it again: make room on the disk."""
        for path in self.output_dir.glob("checkpoint-*/*"):
            if path.is_symlink():
                path.unlink()

    def last_words(self) -> str:
        log = (self.folder / f"launch-{self.launch}.log").read_text(encoding="utf-8", errors="replace")
        return " ".join(re.split(r"\s*\n\s*", log.strip())[-3:])[-300:]

    def outcome(self, seconds: float) -> Outcome:
        case, entries = self.case, read_ledger(self.folder)
        state = final_state(entries)
        return Outcome(
            number=case.number,
            kind=case.kind,
            real=case.real,
            daemon=case.daemon,
            faults=len(of(entries, "fault")) + len(self.struck),
            finished=state is not None,
            same=self.truth.is_that_of(entries),
            steps_lost=steps_lost(entries),
            steps_repeated=repeated(entries),
            orphans=self.orphans,
            wrong=tuple(wrong_recoveries(entries, case.task.effective_batch)),
            attempts=len(of(entries, "start")),
            launches=self.launch,
            recoveries_s=tuple(round(one, 3) for one in recoveries_s(entries, self.starts)),
            seconds=round(seconds, 3),
            stopped_rightly=self.stopped_rightly,
            notes=tuple(self.notes),
        )


def environ_of(folder: Path) -> dict[str, str]:
    """Of everything that a case in `folder` starts."""
    return {
        **os.environ,
        MARK: str(folder),
        FAULTS_VARIABLE: str(folder / "spec.json"),
        "AUTOTUNE_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
    }


def words_of(case: Case, output_dir: Path) -> list[str]:
    """The training command."""
    options: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": case.max_steps,
        "per_device_train_batch_size": case.micro,
        "gradient_accumulation_steps": case.accumulation,
        "per_device_eval_batch_size": case.evaluation,
        "save_steps": case.save_steps,
        "dataloader_num_workers": case.workers,
    }
    if case.save_total_limit:
        options["save_total_limit"] = case.save_total_limit
    if case.eval_steps:
        options |= {"eval_strategy": "steps", "eval_steps": case.eval_steps}
    if case.real:
        options |= {"use_cpu": True, "report_to": "none", "remove_unused_columns": False, "logging_steps": 4}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", module_of(case), *words]


def module_of(case: Case) -> str:
    return "benchmarks.fault_trainer" if case.real else "benchmarks.stand_in"


def to_json(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome)


def from_json(document: dict[str, Any]) -> Outcome:
    tuples = {name: tuple(document[name]) for name in ("wrong", "recoveries_s", "notes")}
    return Outcome(**{**document, **tuples, "kind": Fault(document["kind"])})


def marked(folder: Path) -> Iterator[psutil.Process]:
    """Every living process of the case in `folder`."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def runs(process: psutil.Process, module: str) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return module in words and "autotune" not in Path(words[1]).name
    return False


def send(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def alive_of(folder: Path, seconds: float, *, besides: Collection[int] = ()) -> list[str]:
    """The commands of what is still alive of a case: at once when nothing is, else after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        alive = []
        for process in marked(folder):
            with contextlib.suppress(psutil.Error):
                if process.pid not in besides:
                    alive.append(" ".join(process.cmdline()[:6]))
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def wait_until(is_so: Callable[[], bool], seconds: float) -> bool:
    """Whether it came to be so in time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def end_all(folder: Path) -> int:
    """Kill what is still alive of a case; how many there were."""
    count = 0
    for process in marked(folder):
        with contextlib.suppress(psutil.Error):
            process.kill()
            count += 1
    return count
