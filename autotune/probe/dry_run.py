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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from autotune.errors import Interrupted, InvalidRequest
from autotune.predict.kernels import KernelSet
from autotune.predict.store import TraceStore, holds
from autotune.predict.trace import Trace, from_document
from autotune.probe.channel import Channel, Message
from autotune.probe.executor import end_tree
from autotune.values import ModelSource, TrainingConfig, to_json

LIMIT_S = 240.0  # for one trace, imports included
_POLL_S = 0.2
_BOOTSTRAP = Path(__file__).with_name("bootstrap.py")


class DryRunFailed(InvalidRequest):
    """A model or setting that cannot be traced; the message says why."""


class DryRunner:
    """Gives traces. `stop` is asked several times a second; when it says True `Interrupted` is raised."""

    def __init__(
        self, store: TraceStore, *, python: str | None = None, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._store = store
        self._python = python or sys.executable
        self._stop = stop
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._known: dict[tuple[str, TrainingConfig, KernelSet], Trace] = {}
        self._failed: dict[tuple[str, TrainingConfig, KernelSet], str] = {}
        self.made = 0  # traces that a worker made

    def trace(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet) -> Trace:
        """The trace for this config. Raises `DryRunFailed`, `Interrupted`."""
        key = (source.fingerprint, config, kernels)
        if key in self._failed:
            raise DryRunFailed(self._failed[key])
        if key not in self._known:
            found = self._store.find(source, config, kernels)
            if found is None:
                found = self._ask(source, config, kernels, own_point=False)
                if not holds(found, config):
                    found = self._ask(source, config, kernels, own_point=True)
            self._known[key] = found
        return self._known[key]

    def _ask(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet, *, own_point: bool) -> Trace:
        channel = self._start()
        with contextlib.suppress(ConnectionError):
            channel.send(
                {
                    "model": to_json(source),
                    "config": to_json(config),
                    "kernels": asdict(kernels),
                    "own_point": own_point,
                }
            )
        answer = self._wait(channel)
        if "error" not in answer and "trace" not in answer:
            self.close()
            answer = {"error": "its process answered with something else than a trace"}
        if "error" in answer:
            why = self._failed[(source.fingerprint, config, kernels)] = (
                f"{source.name} cannot be predicted: {answer['error']}"
            )
            raise DryRunFailed(why)
        self.made += 1
        trace = from_document(answer["trace"])
        self._store.keep(source, config, kernels, trace)
        return trace

    def _wait(self, channel: Channel) -> Message:
        deadline = time.monotonic() + LIMIT_S
        with selectors.DefaultSelector() as selector:
            selector.register(channel, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                if selector.select(_POLL_S):
                    try:
                        messages, closed = channel.lines()
                    except ValueError:
                        messages, closed = [], True  # no JSON: not our worker
                    if messages:
                        return messages[0]
                    if closed:
                        self.close()
                        return {"error": "the dry run's process died; `autotune doctor` looks at this environment"}
                if self._stop():
                    self.close()
                    raise Interrupted("interrupted; what was measured is kept, and the same command goes on from there")
        self.close()
        return {"error": f"the dry run took longer than {LIMIT_S:.0f} s"}

    def _start(self) -> Channel:
        if self._process is not None and self._process.poll() is None and self._channel is not None:
            return self._channel
        ours, theirs = socket.socketpair()
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
        command = [self._python, "-P", str(_BOOTSTRAP), str(theirs.fileno()), str(os.getpid())]
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
        self._channel = Channel(ours)
        return self._channel

    def close(self) -> None:
        """End the worker, if there is one."""
        if self._process is not None:
            end_tree(self._process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._process = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
