"""The parent of dry runs, with interpreters that answer as they please."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import pytest

import autotune.probe.dry_run as dry_run
from autotune.errors import Interrupted
from autotune.hardware.cards import find_card
from autotune.predict.forecast import target_of_card
from autotune.predict.kernels import KernelSet
from autotune.predict.store import TraceStore
from autotune.predict.trace import Size, to_document
from autotune.probe.dry_run import WORKERS, DryRunFailed, DryRunner
from autotune.values import MIB, LossPath
from tests.fakes import a_model
from tests.test_predict_plot import CONFIG, a_trace

KERNELS = KernelSet()
CLASSES = [  # one config of each of six classes
    replace(CONFIG, gradient_checkpointing=checkpointing, loss=loss)
    for checkpointing in ("off", "full", "offload")
    for loss in (LossPath.FULL, LossPath.CHUNKED)
]
SCRIPT = """#!{python}
import json, os, socket, sys, time
end = socket.socket(fileno=int(sys.argv[3]))
TRACE = json.loads({trace!r})
def say(request, **message):
    end.sendall(json.dumps({{"number": request["number"], **message}}).encode() + b"\\n")
def trace(request):
    return {{**TRACE, "parameters": request["config"]["micro_batch_size"]}}
for line in end.makefile():
    request = json.loads(line)
    with open({log!r}, "a") as file:
        print(os.getpid(), request["own_point"], file=file)
{body}
"""


class Interpreter:
    """An interpreter that runs `body` for each request; remembers (pid, own_point) of each."""

    def __init__(self, folder: Path, body: str) -> None:
        self.path, self.log = folder / "python", folder / "requests"
        text = SCRIPT.format(
            python=sys.executable,
            trace=json.dumps(to_document(a_trace())),
            log=str(self.log),
            body="\n".join(f"    {line}" for line in body.splitlines()),
        )
        self.path.write_text(text)
        self.path.chmod(0o755)

    def requests(self) -> list[tuple[int, bool]]:
        if not self.log.exists():
            return []
        rows = [line.split() for line in self.log.read_text().splitlines()]
        return [(int(pid), own == "True") for pid, own in rows]


Start = Callable[..., tuple[DryRunner, TraceStore, Interpreter]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a runner whose workers run the given lines."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    made: list[DryRunner] = []

    def starting(body: str, **options: Any) -> tuple[DryRunner, TraceStore, Interpreter]:
        interpreter, store = Interpreter(tmp_path, body), TraceStore(tmp_path / "traces", {})
        made.append(DryRunner(store, python=str(interpreter.path), **options))
        return made[-1], store, interpreter

    yield starting
    for runner in made:
        runner.close()


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_each_config_gets_its_own_trace(start: Start) -> None:
    runner, _, interpreter = start("say(request, trace=trace(request))")
    runner.prepare(a_model(), CLASSES, KERNELS)
    assert runner.made == len(interpreter.requests()) == len(CLASSES)
    assert runner.trace(a_model(), CLASSES[0], KERNELS).parameters == CONFIG.micro_batch_size
    assert runner.made == len(CLASSES)


def test_an_answer_to_an_earlier_request_is_not_taken(start: Start) -> None:
    body = 'say({"number": request["number"] - 1}, trace=trace(request))\nsay(request, error="the right answer")'
    runner, _, _ = start(body)
    with pytest.raises(DryRunFailed, match="the right answer"):
        runner.trace(a_model(), CONFIG, KERNELS)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, Interrupted])
def test_what_an_interrupted_worker_would_answer_is_nobodys_trace(start: Start, interrupt: type[BaseException]) -> None:
    once = [True]
    requested = lambda: once and interpreter.requests()  # noqa: E731

    def stop() -> bool:
        if not requested():
            return False
        once.clear()
        if interrupt is KeyboardInterrupt:
            raise KeyboardInterrupt
        return True

    body = 'time.sleep(0.5 if request["config"]["micro_batch_size"] == 2 else 0)\nsay(request, trace=trace(request))'
    runner, store, interpreter = start(body, stop=stop)
    with pytest.raises(interrupt):
        runner.trace(a_model(), CONFIG, KERNELS)
    assert not is_running(interpreter.requests()[0][0])
    other = replace(CONFIG, micro_batch_size=3, gradient_checkpointing="full")
    assert runner.trace(a_model(), other, KERNELS).parameters == 3
    assert store.find(a_model(), CONFIG, KERNELS) is None


def test_a_second_process_that_cannot_start_costs_one_line_and_ends_the_first(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started = subprocess.Popen, []

    def popen(*arguments: Any, **options: Any) -> Any:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(real(*arguments, **options))
        return started[-1]

    runner, store, _ = start("time.sleep(0.5)\nsay(request, trace=trace(request))")
    monkeypatch.setattr(dry_run.subprocess, "Popen", popen)
    with pytest.raises(DryRunFailed, match=r"temporarily unavailable.*`autotune doctor`") as failed:
        runner.prepare(a_model(), CLASSES[:2], KERNELS)
    assert "\n" not in str(failed.value)
    assert not is_running(started[0].pid)
    monkeypatch.setattr(dry_run.subprocess, "Popen", real)
    other = replace(CLASSES[2], micro_batch_size=3)
    assert runner.trace(a_model(), other, KERNELS).parameters == 3
    assert store.find(a_model(), CLASSES[0], KERNELS) is None


def test_an_interpreter_that_is_not_there_is_said(tmp_path: Path) -> None:
    runner = DryRunner(TraceStore(tmp_path, {}), python=str(tmp_path / "none"))
    with pytest.raises(DryRunFailed, match="none"):
        runner.trace(a_model(), CONFIG, KERNELS)


def test_bytes_that_arrive_piecemeal_do_not_put_the_deadline_off(start: Start) -> None:
    runner, _, _ = start('while True:\n    end.sendall(b" ")\n    time.sleep(0.02)', limit_s=1.0)
    began = time.monotonic()
    with pytest.raises(DryRunFailed, match="longer than 1 s"):
        runner.trace(a_model(), CONFIG, KERNELS)
    assert time.monotonic() - began < 10


def test_a_class_that_cannot_be_traced_is_tried_once(start: Start) -> None:
    runner, _, interpreter = start('say(request, error="no such operator")')
    configs = [replace(CONFIG, micro_batch_size=size, sequence_length=64 * size) for size in range(2, 22)]
    runner.prepare(a_model(), configs, KERNELS)
    for config in configs:
        with pytest.raises(DryRunFailed, match="no such operator"):
            runner.trace(a_model(), config, KERNELS)
    assert [own_point for _, own_point in interpreter.requests()] == [False]


def test_a_point_of_its_own_is_traced_where_the_classs_trace_does_not_hold(start: Start) -> None:
    body = 'say(request, **({"trace": {**trace(request), "point": [5, 1024]}} if request["own_point"] else {}))'
    runner, store, interpreter = start(body)
    store.keep(a_model(), CONFIG, KERNELS, replace(a_trace(), chunk_tokens=8 * 1024))
    held, config = replace(CONFIG, micro_batch_size=8), replace(CONFIG, micro_batch_size=5)
    assert runner.trace(a_model(), config, KERNELS).point == (5, 1024)
    assert [own_point for _, own_point in interpreter.requests()] == [True]
    with pytest.raises(DryRunFailed):
        runner.trace(a_model(), replace(CONFIG, micro_batch_size=6), KERNELS)  # answered for another point
    assert runner.trace(a_model(), held, KERNELS).point is None  # what holds is not lost with what does not


@pytest.mark.parametrize(("body", "words"), [("time.sleep(60)", "longer than 1 s"), ("sys.exit(3)", "process died")])
def test_a_model_that_hangs_or_kills_a_worker_is_not_tried_again(start: Start, body: str, words: str) -> None:
    runner, _, interpreter = start(body, limit_s=1.0)
    runner.prepare(a_model(), CLASSES, KERNELS)
    for config in CLASSES:
        with pytest.raises(DryRunFailed, match=words):
            runner.trace(a_model(), config, KERNELS)
    assert len(interpreter.requests()) <= WORKERS


def test_an_evaluation_of_another_size_has_its_own_trace(tmp_path: Path) -> None:
    store = TraceStore(tmp_path, {})
    config = replace(CONFIG, eval_micro_batch_size=1)
    alone = replace(CONFIG, micro_batch_size=1)
    large = replace(a_trace(), sizes=[Size(0, Fraction(64 * MIB)), Size(0, Fraction(MIB))], is_of_one=True)
    store.keep(a_model(), CONFIG, KERNELS, a_trace())
    store.keep(a_model(), alone, KERNELS, large)
    runner = DryRunner(store, python=str(tmp_path / "none"))  # nothing is to be traced
    target = replace(target_of_card(find_card("RTX 3060 12GB").card), card=None)  # memory alone
    plain, other = (runner.forecast(a_model(), one, target).memory for one in (CONFIG, config))
    assert plain.evaluation_peak_allocated_bytes is not None
    assert other.evaluation_peak_allocated_bytes is not None
    assert other.evaluation_peak_allocated_bytes - plain.evaluation_peak_allocated_bytes == 62 * MIB


def test_a_worker_collects_garbage_once_it_serves() -> None:
    code = (
        "import gc, socket; from autotune.probe.dry_run_worker import main\n"
        "ours, theirs = socket.socketpair(); ours.close(); main(theirs.detach()); assert gc.isenabled()"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
