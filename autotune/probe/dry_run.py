"""The parent's side of dry runs: a trace from the store, or from a worker that has the training libraries."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from autotune.errors import Interrupted, InvalidRequest
from autotune.predict.forecast import Forecast, Target, forecast
from autotune.predict.kernels import KernelSet
from autotune.predict.store import TraceStore
from autotune.predict.trace import Trace, from_document
from autotune.probe.channel import Channel, Message
from autotune.probe.executor import end_tree
from autotune.values import ModelSource, TrainingConfig, to_json

LIMIT_S = 240.0  # for one trace, imports included
WORKERS = 2  # a worker holds the training libraries, 0.5 GiB of memory
_POLL_S = 0.2
_BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
_DIED = {"error": "the dry run's process died; `autotune doctor` looks at this environment"}


class DryRunFailed(InvalidRequest):
    """A model or setting that cannot be traced; the message says why.

    `lacks`: the setting that another value would mend, where that is known.
    """

    def __init__(self, message: str, *, lacks: str | None = None) -> None:
        super().__init__(message)
        self.lacks = lacks


class DryRunner:
    """Gives traces. `stop` is asked several times a second; when it says True `Interrupted` is raised."""

    def __init__(
        self,
        store: TraceStore,
        *,
        python: str | None = None,
        stop: Callable[[], bool] = lambda: False,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._store = store
        self._python = python or sys.executable
        self._stop = stop
        self._workers: list[_Worker] = []
        self._limit_s = limit_s
        self._failed: dict[Path, DryRunFailed] = {}  # by where the trace of the class would be kept
        self.made = 0  # traces that a worker made

    def forecast(self, source: ModelSource, config: TrainingConfig, target: Target) -> Forecast:
        """Predict one config, its evaluation by a trace of its own where that has another micro batch size.

        Raises `DryRunFailed`, `Interrupted`.
        """
        if config.eval_micro_batch_size in (None, config.micro_batch_size):
            return forecast(self.trace(source, config, target.kernels), config, target)
        evaluated = replace(config, micro_batch_size=config.eval_micro_batch_size, eval_micro_batch_size=None)
        self.prepare(source, [config, evaluated], target.kernels)
        traces = [self.trace(source, one, target.kernels) for one in (config, evaluated)]
        return forecast(traces[0], config, target, evaluation=traces[1])

    def trace(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet) -> Trace:
        """The trace for this config. Raises `DryRunFailed`, `Interrupted`."""
        self.prepare(source, [config], kernels)
        found = self._store.find(source, config, kernels)
        if found is not None:
            return found
        unknown = DryRunFailed(f"{source.name} cannot be predicted at this length and batch")
        raise self._failed.get(self._class(source, config, kernels), unknown)

    def has(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet) -> bool:
        """Whether the config's trace, or why there is none, is known already."""
        failed = self._class(source, config, kernels) in self._failed
        return failed or self._store.find(source, config, kernels) is not None

    def prepare(self, source: ModelSource, configs: Iterable[TrainingConfig], kernels: KernelSet) -> None:
        """Make the traces of several configs, side by side; one that cannot be made is for `trace` to say.

        Raises `Interrupted`, and `DryRunFailed` where no process can be started.
        """
        missing = list(configs)
        for own_point in (False, True):  # a trace of a class that does not hold here: one of this point alone
            missing = [c for c in missing if self._class(source, c, kernels) not in self._failed]
            missing = [c for c in missing if self._store.find(source, c, kernels) is None]
            asked = [c for c in missing if own_point or not self._store.has_class(source, c, kernels)]
            alike = {self._store.path(source, c, kernels, own_point): c for c in asked}
            self._make(source, list(alike.values()), kernels, own_point=own_point)

    def _class(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet) -> Path:
        return self._store.path(source, config, kernels, own_point=False)

    def _take(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet, answer: Message) -> None:
        if "trace" not in answer:
            why = answer.get("error", "its process answered with something else than a trace")
            failure = DryRunFailed(f"{source.name} cannot be predicted: {why}", lacks=answer.get("lacks"))
            self._failed[self._class(source, config, kernels)] = failure
            return
        self.made += 1
        self._store.keep(source, config, kernels, from_document(answer["trace"]))

    def _make(self, source: ModelSource, configs: list[TrainingConfig], kernels: KernelSet, *, own_point: bool) -> None:
        """Take each config's answer, from as many workers as there are processors for.

        Where one hangs or dies, the configs that still wait are not tried: they would cost as much.
        """
        waiting = list(configs)
        busy: dict[_Worker, TrainingConfig] = {}
        self._workers = [worker for worker in self._workers if worker.is_alive()]
        try:
            with selectors.DefaultSelector() as selector:
                while waiting or busy:
                    while waiting and len(busy) < min(WORKERS, os.cpu_count() or 1):
                        worker = self._free_worker(busy)
                        busy[worker] = waiting.pop(0)
                        worker.ask(source, busy[worker], kernels, own_point=own_point)
                        selector.register(worker.channel, selectors.EVENT_READ, worker)
                    ready = {key.data for key, _ in selector.select(_POLL_S)}
                    for worker in list(busy):
                        answer = (worker.answer() if worker in ready else None) or worker.overdue()
                        if answer is None:
                            continue
                        selector.unregister(worker.channel)
                        self._take(source, busy.pop(worker), kernels, answer)
                        if "trace" not in answer and "error" not in answer:
                            worker.close()
                        if "trace" not in answer and not worker.is_alive():
                            for config in waiting:
                                self._take(source, config, kernels, answer)
                            waiting.clear()
                    if self._stop():
                        raise Interrupted(
                            "interrupted; what was measured is kept, and the same command goes on from there"
                        )
        except BaseException:
            for worker in busy:  # what they would answer next is nobody's
                worker.close()
            raise

    def _free_worker(self, busy: Iterable[_Worker]) -> _Worker:
        for worker in self._workers:
            if worker not in busy and worker.is_alive():
                return worker
        try:
            self._workers.append(_Worker(self._python, self._limit_s))
        except OSError as error:
            raise DryRunFailed(
                f"no process for a dry run can be started ({error}): end other programs, or look at this environment"
                " with `autotune doctor`"
            ) from error
        return self._workers[-1]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """One process that makes traces, one at a time."""

    def __init__(self, python: str, limit_s: float) -> None:
        """Raises OSError where no process can be started."""
        self._limit_s = limit_s
        self._deadline = 0.0
        self._asked = 0  # requests so far; an answer carries its request's number
        self._folder = tempfile.TemporaryDirectory(prefix="autotune-dry-run-", ignore_cleanup_errors=True)
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": self._folder.name,
        }
        ours, theirs = socket.socketpair()
        command = [python, "-P", str(_BOOTSTRAP), str(theirs.fileno()), str(os.getpid())]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*command, "autotune.probe.dry_run_worker"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    env=environment,
                )
        except OSError:
            ours.close()
            self._folder.cleanup()
            raise
        self.channel = Channel(ours)
        self._is_open = True

    def is_alive(self) -> bool:
        return self._is_open and self._process.poll() is None

    def ask(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet, *, own_point: bool) -> None:
        self._deadline = time.monotonic() + self._limit_s
        self._asked += 1
        with contextlib.suppress(ConnectionError):  # then its end is read as the answer
            self.channel.send(
                {
                    "number": self._asked,
                    "model": to_json(source),
                    "config": to_json(config),
                    "kernels": asdict(kernels),
                    "own_point": own_point,
                }
            )

    def answer(self) -> Message | None:
        """What it said to the last request, once all of that is here. Reads once; call it when there is something."""
        try:
            messages, closed = self.channel.lines()
        except ValueError:
            messages, closed = [], True  # no JSON: not our worker
        answers = [message for message in messages if message.get("number") == self._asked]
        if closed and not answers:
            self.close()
            return dict(_DIED)
        return answers[0] if answers else None

    def overdue(self) -> Message | None:
        if time.monotonic() < self._deadline:
            return None
        self.close()
        return {"error": f"the dry run took longer than {self._limit_s:.0f} s"}

    def close(self) -> None:
        """End the process and everything it started."""
        if not self._is_open:
            return
        self._is_open = False
        end_tree(self._process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self.channel.close()
        self._folder.cleanup()
