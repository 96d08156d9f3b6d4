"""The worker process: imports the training libraries once, then runs probes and reports facts.

CPU: a server that builds the frozen base and forks a child for each probe, since a CPU process that has met its limit
once is spoilt (freed memory does not lower VmData). CUDA: the same process runs config after config on a kept base.
`fresh` runs the one probe in this very process, from importing on.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from autotune.probe.bootstrap import die_with_parent
from autotune.probe.channel import Channel
from autotune.probe.memory import lift_data_limit, limit_data, status_bytes
from autotune.values import MIB, ProbeRequest, Trainer, from_json

HEARTBEAT_S = 1.0
CLEAN_BYTES = 32 * MIB  # a warm CUDA worker is trusted while its baseline stays within this
_STACK_BYTES = 512 * 1024  # of helper threads: thread stacks count against RLIMIT_DATA


def main(descriptor: int) -> None:
    """Serve probes until the channel closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    channel = Channel(socket.socket(fileno=descriptor))
    Worker(channel).serve()


class Worker:
    """One worker's state: what is imported, and the base model kept warm."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.base: Any = None
        self.base_key = ""
        self.threads = 1
        self.data_after_imports = 0
        self.clean_bytes: int | None = None
        self._beating = 0  # pid of the process that has a heartbeat

    def serve(self) -> None:
        self.channel.send({"event": "phase", "name": "import"})
        self._import_libraries()
        self.channel.send({"event": "ready"})
        while (message := self.channel.receive()) is not None:
            request = from_json(ProbeRequest, message["request"])
            if request.config.trainer is Trainer.TRL and self.base is None:
                _import_trl()
                self.data_after_imports = status_bytes("VmData") or 0
            if message["fresh"]:
                self._run(request, None)
                self._leave()
            if request.device == "cpu":
                self._fork(request)
            else:
                self._run_warm(request)

    def _import_libraries(self) -> None:
        threading.stack_size(_STACK_BYTES)
        import torch

        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)  # no thread pool may exist when this process forks
        import accelerate.utils.operations
        import bitsandbytes
        import peft
        import transformers.integrations.bitsandbytes
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

        import autotune.probe.run

        _ = accelerate, bitsandbytes, peft, transformers, AutoModelForCausalLM, Trainer, TrainingArguments, autotune
        self.data_after_imports = status_bytes("VmData") or 0

    def _limit(self, request: ProbeRequest) -> None:
        if request.device == "cpu" and request.memory_limit_bytes is not None:
            limit_data(self.data_after_imports + request.memory_limit_bytes - request.headroom_bytes)

    def _fork(self, request: ProbeRequest) -> None:
        """Run one probe in a child; its death is the server's to report, whatever it dies of."""
        if not self._have_base(request):
            self._leave()
        server = os.getpid()
        child = os.fork()
        if child == 0:
            die_with_parent(server)
            threading.stack_size(_STACK_BYTES)
            self._run(request, self.base)
            self._leave()
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        self.channel.send(
            {"event": "done", "exit_code": max(code, 0), "signal": -code if code < 0 else None, "pid": child}
        )

    def _have_base(self, request: ProbeRequest) -> bool:
        """Build the base that this and later children share; False once its failure is reported."""
        from autotune.probe.run import base_key, build, report_of_failure

        if self.base is not None and self.base_key == base_key(request):
            return True
        self.base = None
        gc.unfreeze()
        gc.collect()
        try:
            self._limit(request)
            self.base = build(request, self.channel)
            self.base_key = base_key(request)
        except BaseException as error:  # noqa: BLE001 - any death is a fact to report
            lift_data_limit()
            self.channel.send({"event": "report", "report": report_of_failure(error, "build")})
            return False
        lift_data_limit()
        gc.collect()
        gc.freeze()  # a child's collections then touch, and so copy, none of what it shares with the server
        return True

    def _run(self, request: ProbeRequest, base: Any) -> bool:
        """One probe in this process; True where the base may be used again."""
        import torch

        from autotune.probe.run import ProbeRun

        self._start_heartbeat()
        if request.device == "cpu":
            torch.set_num_threads(self.threads)
        self._limit(request)
        run = ProbeRun(request, self.channel, data_before=self.data_after_imports)
        return run.report(base)

    def _run_warm(self, request: ProbeRequest) -> None:
        """A probe on CUDA in this process, then back to the bare base; says whether it may be trusted again."""
        import torch

        from autotune.probe.run import base_key, build, report_of_failure

        self._start_heartbeat()
        if self.base_key != base_key(request):
            self.base, self.base_key, self.clean_bytes = None, "", None
            gc.collect()
            torch.cuda.empty_cache()
            try:
                self.base = build(request, self.channel)
            except BaseException as error:  # noqa: BLE001 - any death is a fact to report
                self.channel.send({"event": "report", "report": report_of_failure(error, "build")})
                self._leave()
            self.base_key = base_key(request)
        reusable = self._run(request, self.base)
        gc.collect()
        torch.cuda.empty_cache()
        left = torch.cuda.memory_reserved()
        if self.clean_bytes is None:
            self.clean_bytes = left
        clean = reusable and abs(left - self.clean_bytes) <= CLEAN_BYTES
        self.channel.send({"event": "done", "exit_code": 0, "signal": None, "clean": clean})

    def _start_heartbeat(self) -> None:
        """One in this process; a fork has threads of its own."""
        if self._beating != os.getpid():
            self._beating = os.getpid()
            Heartbeat(self.channel, os.getppid()).start()

    def _leave(self) -> NoReturn:
        """End without running other libraries' exit handlers, with all output written."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.channel.close()
        os._exit(0)


def _import_trl() -> None:
    try:
        import trl.trainer.utils
    except ImportError:
        return
    _ = trl


class Heartbeat(threading.Thread):
    """Says each second that Python still runs, and leaves when the parent is gone."""

    def __init__(self, channel: Channel, parent_pid: int) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self._channel = channel
        self._parent_pid = parent_pid

    def run(self) -> None:
        while True:
            time.sleep(HEARTBEAT_S)
            try:
                self._channel.send({"event": "heartbeat"})
            except OSError:
                os._exit(1)
            if os.getppid() != self._parent_pid:
                os._exit(1)
