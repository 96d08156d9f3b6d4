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
from dataclasses import asdict
from pathlib import Path

from autotune.errors import Interrupted, InvalidRequest
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
        self, store: TraceStore, *, python: str | None = None, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._store = store
        self._python = python or sys.executable
        self._stop = stop
        self._workers: list[_Worker] = []
        self._failed: dict[tuple[str, TrainingConfig, KernelSet], DryRunFailed] = {}
        self.made = 0  # traces that a worker made

    def trace(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet) -> Trace:
        """The trace for this config. Raises `DryRunFailed`, `Interrupted`."""
        self.prepare(source, [config], kernels)
        key = (source.fingerprint, config, kernels)
        if key in self._failed:
            raise self._failed[key]
        found = self._store.find(source, config, kernels)
        if found is None:
            raise DryRunFailed(f"{source.name} cannot be predicted at this length and batch")
        return found

    def prepare(self, source: ModelSource, configs: Iterable[TrainingConfig], kernels: KernelSet) -> None:
        """Make the traces of several configs, side by side; one that cannot be made is for `trace` to say.

        Raises `Interrupted`.
        """
        missing = [c for c in configs if (source.fingerprint, c, kernels) not in self._failed]
        for own_point in (False, True):  # a trace of a class that does not hold here: one of this point alone
            missing = [c for c in missing if self._store.find(source, c, kernels) is None]
            of_class = {self._store.path(source, c, kernels, own_point): c for c in missing}
            for config, answer in self._answers(source, list(of_class.values()), kernels, own_point=own_point):
                self._take(source, config, kernels, answer)
            missing = [c for c in missing if (source.fingerprint, c, kernels) not in self._failed]

    def _take(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet, answer: Message) -> None:
        if "trace" not in answer:
            why = answer.get("error", "its process answered with something else than a trace")
            failure = DryRunFailed(f"{source.name} cannot be predicted: {why}", lacks=answer.get("lacks"))
            self._failed[(source.fingerprint, config, kernels)] = failure
            return
        self.made += 1
        self._store.keep(source, config, kernels, from_document(answer["trace"]))

    def _answers(
        self, source: ModelSource, configs: list[TrainingConfig], kernels: KernelSet, *, own_point: bool
    ) -> list[tuple[TrainingConfig, Message]]:
        """Each config's answer, from as many workers as there are processors for."""
        waiting, answers = list(configs), []
        busy: dict[_Worker, TrainingConfig] = {}
        self._workers = [worker for worker in self._workers if worker.is_alive()]
        with selectors.DefaultSelector() as selector:
            while waiting or busy:
                while waiting and len(busy) < min(WORKERS, os.cpu_count() or 1):
                    worker = self._free_worker(busy)
                    busy[worker] = waiting.pop(0)
                    worker.ask(source, busy[worker], kernels, own_point=own_point)
                    selector.register(worker.channel, selectors.EVENT_READ, worker)
                ready = {key.data for key, _ in selector.select(_POLL_S)}
                for worker in list(busy):
                    answer = worker.answer() if worker in ready else worker.overdue()
                    if answer is not None:
                        selector.unregister(worker.channel)
                        answers.append((busy.pop(worker), answer))
                        if "trace" not in answer and "error" not in answer:
                            worker.close()
                if self._stop():
                    self.close()
                    raise Interrupted("interrupted; what was measured is kept, and the same command goes on from there")
        return answers

    def _free_worker(self, busy: Iterable[_Worker]) -> _Worker:
        for worker in self._workers:
            if worker not in busy and worker.is_alive():
                return worker
        self._workers.append(_Worker(self._python))
        return self._workers[-1]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """One process that makes traces, one at a time."""

    def __init__(self, python: str) -> None:
        ours, theirs = socket.socketpair()
        self._folder = tempfile.TemporaryDirectory(prefix="autotune-dry-run-", ignore_cleanup_errors=True)
        self._deadline = 0.0
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
        command = [python, "-P", str(_BOOTSTRAP), str(theirs.fileno()), str(os.getpid())]
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
        self.channel = Channel(ours)
        self._is_open = True

    def is_alive(self) -> bool:
        return self._is_open and self._process.poll() is None

    def ask(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet, *, own_point: bool) -> None:
        self._deadline = time.monotonic() + LIMIT_S
        with contextlib.suppress(ConnectionError):  # then its end is read as the answer
            self.channel.send(
                {
                    "model": to_json(source),
                    "config": to_json(config),
                    "kernels": asdict(kernels),
                    "own_point": own_point,
                }
            )

    def answer(self) -> Message | None:
        """What it said, once all of that is here. Reads once; call it when there is something to read."""
        try:
            messages, closed = self.channel.lines()
        except ValueError:
            messages, closed = [], True  # no JSON: not our worker
        if closed and not messages:
            self.close()
            return dict(_DIED)
        return messages[0] if messages else None

    def overdue(self) -> Message | None:
        if time.monotonic() < self._deadline:
            return None
        self.close()
        return {"error": f"the dry run took longer than {LIMIT_S:.0f} s"}

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
