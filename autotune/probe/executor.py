"""The parent's side of a probe: start a worker, watch every phase's clock, end the whole tree, keep its last words."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from autotune.errors import Interrupted
from autotune.probe.channel import Channel, Message
from autotune.values import (
    Device,
    Environment,
    Failure,
    Isolation,
    ProbeLimits,
    ProbeReport,
    ProbeRequest,
    Tenant,
    from_json,
    to_json,
)

_POLL_S = 0.2  # how soon a stop flag, a deadline or a dead worker is seen
_WATCH_S = 1.0  # between readings of the card
_TAIL_BYTES = 8000
_END_S = 5.0  # for killed processes to be gone

_BOOTSTRAP = Path(__file__).with_name("bootstrap.py")


class SubprocessExecutor:
    """Runs probes in workers of their own session; implements `ProbeExecutor`.

    `stop` is asked several times a second: when it says True the worker is ended and `Interrupted` raised.
    `watch` reads the device now (used bytes and tenants), or is None where nothing can be read.
    `progress` hears each phase a probe enters.
    """

    def __init__(
        self,
        environment: Environment,
        *,
        python: str | None = None,
        isolation: Isolation = Isolation.WARM,
        stop: Callable[[], bool] = lambda: False,
        watch: Callable[[], Device | None] = lambda: None,
        progress: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._environment = environment
        self._python = python or sys.executable
        self._isolation = isolation
        self._stop = stop
        self._watch = watch
        self._progress = progress
        self._warm: _Worker | None = None
        self._warm_key = ""

    def environment(self) -> Environment:
        return self._environment

    def probe(self, request: ProbeRequest, *, fresh: bool = False) -> ProbeReport:
        """Run one probe and report what was seen. Raises `Interrupted`; a probe that dies is a report."""
        if fresh or self._isolation is Isolation.FRESH:
            self.close()  # a warm worker's memory would count against the fresh one's
            worker = self._start(request)
            try:
                return _Run(self, worker, request, fresh=True).report()
            finally:
                worker.end()
        return self._probe_warm(request)

    def _probe_warm(self, request: ProbeRequest) -> ProbeReport:
        key = _worker_key(request)
        if self._warm is not None and (self._warm_key != key or not self._warm.alive()):
            self.close()
        if self._warm is None:
            self._warm, self._warm_key = self._start(request), key
        run = _Run(self, self._warm, request, fresh=False)
        try:
            report = run.report()
        except BaseException:
            self.close()
            raise
        if not run.reusable:
            self.close()
        return report

    def _start(self, request: ProbeRequest) -> _Worker:
        reading = self._watch()
        return _Worker(self._python, request, used_before=_used(reading))

    def close(self) -> None:
        """End the warm worker and everything it started."""
        if self._warm is not None:
            self._warm.end()
            self._warm = None


def _worker_key(request: ProbeRequest) -> str:
    """What a warm worker is started for; anything else in a config it can change by itself."""
    config = request.config
    base = (request.model.fingerprint, config.quantization, config.double_quant, config.compute_dtype)
    return "|".join(map(str, (request.device, config.allocator, config.trainer, *base)))


def _used(device: Device | None) -> int | None:
    if device is None or device.total_bytes is None or device.free_bytes is None:
        return None
    return device.total_bytes - device.free_bytes


class _Worker:
    """A worker process and its channel."""

    def __init__(self, python: str, request: ProbeRequest, *, used_before: int | None) -> None:
        ours, theirs = socket.socketpair()
        self.log = tempfile.TemporaryFile(prefix="autotune-worker-")  # noqa: SIM115 - lives as long as the worker
        self.folder = tempfile.TemporaryDirectory(prefix="autotune-worker-", ignore_cleanup_errors=True)
        self.used_before = used_before
        self.started = time.monotonic()
        self.ready = False
        with theirs:
            self.process = subprocess.Popen(
                [python, "-P", str(_BOOTSTRAP), str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env={**_worker_environment(request), "TMPDIR": self.folder.name},  # a killed worker clears nothing
            )
        self.channel = Channel(ours)

    def alive(self) -> bool:
        return self.process.poll() is None

    def tail(self, since: int = 0) -> str:
        """The end of what was printed after byte `since`."""
        size = os.fstat(self.log.fileno()).st_size
        start = max(since, size - _TAIL_BYTES)
        return os.pread(self.log.fileno(), size - start, start).decode(errors="replace")

    def printed(self) -> int:
        return os.fstat(self.log.fileno()).st_size

    def end(self) -> None:
        """Kill the process and all its descendants by pid, and wait until they are gone."""
        end_tree(self.process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        self.channel.close()
        self.log.close()
        self.folder.cleanup()


def end_tree(pid: int) -> None:
    """SIGKILL to `pid` and every descendant, parents first so that none starts another; waits for them to go."""
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=_END_S)


def _worker_environment(request: ProbeRequest) -> dict[str, str]:
    env = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    if request.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
        # Two thread pools (torch's and bitsandbytes') spin on the same cores: beside any other load a micro batch of
        # 1.2 s took 50 s. Short spins cost nothing measurable (docs/log.md, 2026-11-23).
        env.setdefault("GOMP_SPINCOUNT", "3000")
        env.setdefault("OMP_STACKSIZE", "2M")  # stacks count against RLIMIT_DATA, 8 MiB a thread
    if request.config.allocator.value != "default":
        env["PYTORCH_ALLOC_CONF"] = env["PYTORCH_CUDA_ALLOC_CONF"] = f"{request.config.allocator.value}:True"
    return env


class _Run:
    """One probe being waited for."""

    def __init__(self, executor: SubprocessExecutor, worker: _Worker, request: ProbeRequest, *, fresh: bool) -> None:
        self.executor = executor
        self.worker = worker
        self.request = request
        self.fresh = fresh
        self.reusable = False
        self.phase = "start" if not worker.ready else "prepare"
        self.partial: ProbeReport | None = None
        self._began = time.monotonic()
        self._phase_began = worker.started if not worker.ready else self._began
        self._last_sign = self._began
        self._beats = False
        self._log_from = worker.printed()
        self._tenants: tuple[Tenant, ...] = ()
        self._used_peak: int | None = None
        self._watched = 0.0
        self._started_now = not worker.ready
        self._done: Message = {}
        self._data_peak: int | None = None  # the last that a CPU worker told; its report may never come

    def report(self) -> ProbeReport:
        """Send the request, wait with every phase's limit, and give the facts. Raises `Interrupted`."""
        if self.worker.ready:
            self._send()
        with selectors.DefaultSelector() as selector:
            selector.register(self.worker.channel, selectors.EVENT_READ)
            while True:
                for _ in selector.select(_POLL_S):
                    try:
                        messages, closed = self.worker.channel.lines()
                        over = [self._hear(message) for message in messages]  # every one is heard
                    except (ValueError, KeyError, TypeError) as error:
                        return self._broken(error)
                    if True in over:
                        return self._finished()
                    if closed:
                        return self._died()
                if self.executor._stop():
                    self.worker.end()
                    raise Interrupted("interrupted; what was measured is kept, and the same command goes on from there")
                if self._overdue():
                    return self._timed_out()
                self._look()

    def _send(self) -> None:
        request = dataclasses.replace(self.request, device_used_before_bytes=self.worker.used_before)
        with contextlib.suppress(ConnectionError):  # it has just died: seen as a closed channel
            self.worker.channel.send({"request": to_json(request), "fresh": self.fresh})

    def _hear(self, message: Message) -> bool:
        """Take one message in; True when the probe is over."""
        self._last_sign = time.monotonic()
        event = message["event"]
        if event == "phase":
            self.phase, self._phase_began = message["name"], self._last_sign
            self.executor._progress(self.phase)
        elif event == "heartbeat":
            self._beats = True
        elif event == "memory":
            self._data_peak = message["bytes"]
        elif event == "ready":
            self.worker.ready = True
            self._send()
        elif event == "report":
            self.partial = from_json(ProbeReport, message["report"])
        elif event == "done":
            self._done = message
            self.reusable = bool(message.get("clean", True))
            return True
        return False

    def _overdue(self) -> bool:
        now, limits = time.monotonic(), self.request.limits
        if now - self._phase_began > _limit_of(self.phase, limits):
            return True
        return self._beats and now - self._last_sign > limits.heartbeat_s

    def _look(self) -> None:
        """Read the card now and then: who else is on it, and the most that was used."""
        now = time.monotonic()
        if self.request.device == "cpu" or now - self._watched < _WATCH_S:
            return
        self._watched = now
        reading = self.executor._watch()
        used = _used(reading)
        if reading is None or used is None:
            return
        self._used_peak = max(self._used_peak or 0, used)
        ours = {self.worker.process.pid}
        with contextlib.suppress(psutil.NoSuchProcess):
            ours |= {child.pid for child in psutil.Process(self.worker.process.pid).children(recursive=True)}
        known = {tenant.pid: tenant for tenant in (*self._tenants, *reading.tenants) if tenant.pid not in ours}
        self._tenants = tuple(known.values())

    def _finished(self) -> ProbeReport:
        """The worker lives; the probe (a fork on the CPU) ended by itself."""
        code, killed_by = self._done.get("exit_code"), self._done.get("signal")
        report = self.partial
        if report is None:
            report = ProbeReport(failure=Failure(phase=self.phase))
        code = code if killed_by is None else None
        return self._complete(report, exit_code=code, killed_by=killed_by, pid=self._done.get("pid"))

    def _died(self) -> ProbeReport:
        """The worker closed its channel: after its report (fresh), or with no word."""
        try:
            status = self.worker.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return self._timed_out()
        report = self.partial or ProbeReport(failure=Failure(phase=self.phase))
        killed_by = -status if status < 0 else None
        return self._complete(report, exit_code=status if status >= 0 else None, killed_by=killed_by)

    def _broken(self, error: Exception) -> ProbeReport:
        """What came over the channel is not what a worker says: it is ended."""
        message = f"the worker's channel carried something else than reports ({error})"
        complete = self._complete(
            ProbeReport(failure=Failure(phase=self.phase, message=message)), exit_code=None, killed_by=None
        )
        end_tree(self.worker.process.pid)
        return complete

    def _timed_out(self) -> ProbeReport:
        silent = time.monotonic() - self._last_sign
        message = f"no end of phase {self.phase} within its time limit; last sign of life {silent:.0f} s before"
        report = ProbeReport(failure=Failure(phase=self.phase, message=message, at_limit=True))
        complete = self._complete(report, exit_code=None, killed_by=None)
        end_tree(self.worker.process.pid)
        return complete

    def _complete(
        self, report: ProbeReport, *, exit_code: int | None, killed_by: int | None, pid: int | None = None
    ) -> ProbeReport:
        wall = time.monotonic() - (self.worker.started if self._started_now else self._began)
        training = sum(report.phases_s.get(name, 0.0) for name in ("forward", "backward", "optimizer", "evaluate"))
        used = [value for value in (report.device_used_bytes, self._used_peak) if value is not None]
        return dataclasses.replace(
            report,
            exit_code=exit_code,
            signal=killed_by,
            pid=report.pid or pid or self.worker.process.pid,
            log_tail=self.worker.tail(self._log_from),
            isolation=Isolation.FRESH if self.fresh else Isolation.WARM,
            wall_time_s=wall,
            startup_s=max(0.0, wall - training),
            tenants=self._tenants,
            device_used_bytes=max(used, default=None),
            device_used_before_bytes=self.worker.used_before,
            peak_reserved_bytes=report.peak_reserved_bytes or self._data_peak,
        )


def _limit_of(phase: str, limits: ProbeLimits) -> float:
    if phase in ("start", "import", "context"):
        return limits.start_s
    if phase in ("build", "prepare"):
        return limits.build_s
    if phase in ("checkpoint", "report"):
        return limits.checkpoint_s
    return limits.step_s
