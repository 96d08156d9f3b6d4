"""Workers are started, limited, watched and ended: with real training, and with interpreters that misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from autotune.errors import Interrupted
from autotune.probe.executor import SubprocessExecutor, end_tree
from autotune.values import Isolation, ProbeLimits
from tests.tiny import ENVIRONMENT, a_config, a_probe

QUICK = ProbeLimits(start_s=1.5, build_s=1.5, step_s=1.5, checkpoint_s=1.5, heartbeat_s=1.5)


@pytest.fixture(scope="module")
def warm() -> Iterator[SubprocessExecutor]:
    executor = SubprocessExecutor(ENVIRONMENT)
    yield executor
    executor.close()


def an_interpreter(folder: Path, body: str) -> str:
    """A program that is started in a worker's place: `fd` is its end of the channel."""
    path = folder / "python"
    script = f"""\
        #!{sys.executable}
        import json, os, socket, subprocess, sys, time
        channel = socket.socket(fileno=int(sys.argv[3]))
        def send(**message):
            channel.sendall(json.dumps(message).encode() + b"\\n")
        """
    path.write_text(textwrap.dedent(script) + textwrap.dedent(body))
    path.chmod(0o755)
    return str(path)


def gone(pid: int, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        with_status = psutil.Process(pid).status() if psutil.pid_exists(pid) else psutil.STATUS_DEAD
        if with_status == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


@pytest.mark.slow
def test_probe_reports_times_and_memory_of_real_steps(warm: SubprocessExecutor) -> None:
    report = warm.probe(a_probe())
    assert report.failure is None
    assert report.exit_code == 0
    assert 3 <= len(report.micro_batch_times_s) <= 6  # three that agree are enough
    assert not report.cut_short
    assert len(report.optimizer_times_s) == 1
    assert report.loss is not None
    assert report.optimizer_state_bytes
    assert report.peak_allocated_bytes
    assert report.after_load_bytes
    assert report.after_load_bytes < report.peak_allocated_bytes
    assert report.peak_reserved_bytes
    assert report.device_used_bytes
    assert {"prepare", "forward", "backward", "optimizer"} <= set(report.phases_s)


@pytest.mark.slow
def test_memory_limit_raises_real_out_of_memory_and_the_next_probe_fits(warm: SubprocessExecutor) -> None:
    big = a_probe(limit_mib=256, config=a_config(micro_batch_size=32, sequence_length=1024))
    failed = warm.probe(big)
    assert failed.failure is not None
    assert "allocate" in failed.failure.message or "primitive" in failed.failure.message
    assert failed.failure.phase in ("forward", "backward")
    assert failed.peak_reserved_bytes is not None
    assert failed.peak_reserved_bytes <= 256 * 2**20
    assert warm.probe(a_probe(limit_mib=256)).failure is None


@pytest.mark.slow
def test_same_verdict_every_time_under_one_limit(warm: SubprocessExecutor) -> None:
    request = a_probe(limit_mib=256, config=a_config(micro_batch_size=16, sequence_length=1024))
    assert {warm.probe(request).failure is None for _ in range(3)} == {False}


@pytest.mark.slow
def test_proof_steps_evaluates_and_saves_in_a_fresh_process() -> None:
    executor = SubprocessExecutor(ENVIRONMENT)
    report = executor.probe(a_probe(proof=True, optimizer_steps=4), fresh=True)
    assert report.failure is None
    assert report.isolation is Isolation.FRESH
    assert len(report.losses) == 8
    assert report.eval_time_s is not None
    assert {"evaluate", "checkpoint"} <= set(report.phases_s)
    assert report.optimizer_state_bytes


@pytest.mark.slow
def test_probe_and_proof_agree_on_the_peak(warm: SubprocessExecutor) -> None:
    request = a_probe()
    probed = warm.probe(request).peak_allocated_bytes
    proven = warm.probe(replace(request, proof=True, optimizer_steps=3), fresh=True).peak_allocated_bytes
    assert probed == pytest.approx(proven, rel=0.002)


@pytest.mark.slow
def test_step_time_from_two_micro_batches_is_near_that_from_more(warm: SubprocessExecutor) -> None:
    config = a_config(micro_batch_size=2, sequence_length=512, gradient_accumulation_steps=8)
    short = warm.probe(a_probe(config=config, limit_mib=None, micro_batches=2))
    full = warm.probe(a_probe(config=config, limit_mib=None, micro_batches=8))
    assert len(short.micro_batch_times_s) == 2
    assert len(full.micro_batch_times_s) > 2
    assert full.step_time_s(8) == pytest.approx(short.step_time_s(8), rel=0.5)


@pytest.mark.slow
def test_a_probe_that_is_beaten_at_once_is_cut_short_and_has_shown_its_memory(warm: SubprocessExecutor) -> None:
    config = a_config(micro_batch_size=2, sequence_length=512)
    whole = warm.probe(a_probe(config=config))
    short = warm.probe(a_probe(config=config, beat_s=min(whole.micro_batch_times_s) / 10))
    assert (short.cut_short, len(short.micro_batch_times_s), len(short.optimizer_times_s)) == (True, 1, 1)
    assert short.peak_allocated_bytes == whole.peak_allocated_bytes
    assert short.optimizer_state_bytes == whole.optimizer_state_bytes
    assert short.loss is not None


@pytest.mark.slow
def test_a_probe_that_may_win_is_not_cut_short(warm: SubprocessExecutor) -> None:
    report = warm.probe(a_probe(beat_s=60.0))
    assert not report.cut_short
    assert len(report.micro_batch_times_s) >= 3


@pytest.mark.slow
def test_a_proof_takes_two_micro_batches_a_step_and_is_never_cut_short() -> None:
    request = a_probe(config=a_config(gradient_accumulation_steps=8), proof=True, optimizer_steps=3, beat_s=1e-9)
    report = SubprocessExecutor(ENVIRONMENT).probe(request, fresh=True)
    assert (report.cut_short, len(report.losses), len(report.micro_batch_times_s)) == (False, 6, 2)


MIXED = a_probe(
    config=a_config(micro_batch_size=4, sequence_length=512),
    timed_lengths=(64, 128, 256, 384),
    tokens_per_sample=200.0,
)


@pytest.mark.slow
def test_a_mix_is_timed_at_its_lengths_and_shows_the_memory_of_full_length(warm: SubprocessExecutor) -> None:
    full, mixed = warm.probe(replace(MIXED, timed_lengths=(), tokens_per_sample=None)), warm.probe(MIXED)
    assert mixed.failure is None
    assert (mixed.timed_lengths, mixed.tokens_per_sample) == (MIXED.timed_lengths, 200.0)
    assert len(mixed.micro_batch_times_s) in (4, 8)  # whole rounds
    assert mixed.micro_batch_times_s[0] < mixed.micro_batch_times_s[3]
    assert full.peak_allocated_bytes is not None
    assert mixed.peak_allocated_bytes is not None
    assert mixed.peak_allocated_bytes >= full.peak_allocated_bytes  # a padded batch has a mask
    assert (mixed.step_time_s(2) or 0) < (full.step_time_s(2) or 0)


@pytest.mark.slow
def test_a_mix_is_not_cut_short_before_each_length_was_timed(warm: SubprocessExecutor) -> None:
    report = warm.probe(replace(MIXED, beat_s=1e-6))
    assert (report.cut_short, len(report.micro_batch_times_s)) == (True, 4)
    assert report.step_time_s(2) is not None


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_probe_and_proof_of_a_mix_agree_on_the_peak(warm: SubprocessExecutor, accumulation: int) -> None:
    config = replace(MIXED.config, gradient_accumulation_steps=accumulation)
    probed = warm.probe(replace(MIXED, config=config))
    proven = warm.probe(replace(MIXED, config=config, proof=True, optimizer_steps=3), fresh=True)
    assert proven.failure is None
    assert len(proven.micro_batch_times_s) == 4
    assert len(proven.optimizer_times_s) == 1
    assert len(proven.losses) == 4 + 2 * min(2, accumulation)
    assert probed.peak_allocated_bytes == pytest.approx(proven.peak_allocated_bytes, rel=0.01)


@pytest.mark.slow
def test_model_that_cannot_be_built_is_reported_with_its_class(warm: SubprocessExecutor) -> None:
    request = a_probe(config=a_config(target_modules=("no_such_module",)))
    failure = warm.probe(request).failure
    assert failure is not None
    assert failure.exception == "autotune.workload.build.UnsupportedModel"
    assert "no_such_module" in failure.message


def test_printing_and_exiting_is_reported_with_the_last_words(tmp_path: Path) -> None:
    python = an_interpreter(
        tmp_path,
        """
        send(event="phase", name="forward")
        print("Error out of memory at line 88 in file csrc/ops.cu")
        sys.exit(1)
        """,
    )
    report = SubprocessExecutor(ENVIRONMENT, python=python).probe(a_probe(), fresh=True)
    assert report.exit_code == 1
    assert report.failure is not None
    assert report.failure.phase == "forward"
    assert "ops.cu" in report.log_tail


def test_a_worker_killed_from_outside_is_reported_with_its_signal(tmp_path: Path) -> None:
    python = an_interpreter(tmp_path, "import signal\nos.kill(os.getpid(), signal.SIGKILL)")
    report = SubprocessExecutor(ENVIRONMENT, python=python).probe(a_probe(), fresh=True)
    assert (report.signal, report.exit_code) == (signal.SIGKILL, None)
    assert report.failure is not None


def test_a_worker_that_dies_before_it_is_asked_is_reported(tmp_path: Path) -> None:
    said = '{"event": "phase", "name": "import"}\\n{"event": "ready"}\\n'
    python = an_interpreter(tmp_path, f"channel.sendall(b'{said}')")
    executor = SubprocessExecutor(ENVIRONMENT, python=python, progress=lambda phase: time.sleep(0.5))
    report = executor.probe(a_probe(), fresh=True)
    assert (report.exit_code, report.failure is not None) == (0, True)


@pytest.mark.parametrize("line", ["no json", '{"event": "report"}', '{"nothing": 1}'])
def test_a_worker_that_talks_nonsense_is_ended_and_reported(tmp_path: Path, line: str) -> None:
    python = an_interpreter(tmp_path, f"channel.sendall({line!r}.encode() + b'\\n')\ntime.sleep(60)")
    report = SubprocessExecutor(ENVIRONMENT, python=python).probe(a_probe(), fresh=True)
    assert report.failure is not None
    assert "channel" in report.failure.message


@pytest.mark.parametrize("beats", [False, True])
def test_a_worker_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, beats: bool) -> None:
    python = an_interpreter(
        tmp_path,
        f"""
        child = subprocess.Popen(["sleep", "60"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        send(event="phase", name="backward")
        while True:
            {'send(event="heartbeat")' if beats else "pass"}
            time.sleep(0.2)
        """,
    )
    report = SubprocessExecutor(ENVIRONMENT, python=python).probe(a_probe(limits=QUICK), fresh=True)
    assert report.failure is not None
    assert report.failure.at_limit
    assert report.failure.phase == "backward"
    assert gone(int((tmp_path / "pid").read_text()))


def test_stopping_ends_the_worker_and_its_children_and_raises(tmp_path: Path) -> None:
    python = an_interpreter(
        tmp_path,
        f"""
        child = subprocess.Popen(["sleep", "60"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        send(event="ready")
        time.sleep(60)
        """,
    )
    stop = threading.Event()
    executor = SubprocessExecutor(ENVIRONMENT, python=python, stop=stop.is_set)
    threading.Timer(1.0, stop.set).start()
    with pytest.raises(Interrupted):
        executor.probe(a_probe())
    executor.close()
    assert gone(int((tmp_path / "pid").read_text()))


def test_an_interpreter_that_says_nothing_is_a_timeout_of_the_start(tmp_path: Path) -> None:
    python = an_interpreter(tmp_path, "time.sleep(60)")
    report = SubprocessExecutor(ENVIRONMENT, python=python).probe(a_probe(limits=QUICK))
    assert report.failure is not None
    assert (report.failure.phase, report.failure.at_limit) == ("start", True)


def test_end_tree_takes_grandchildren_along() -> None:
    parent = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60"], start_new_session=True)
    while len(children := psutil.Process(parent.pid).children()) < 2:
        time.sleep(0.02)
    end_tree(parent.pid)
    parent.wait(5)
    assert all(gone(child.pid) for child in children)


@pytest.mark.slow
def test_workers_go_when_their_parent_is_killed(tmp_path: Path) -> None:
    """kill -9 of the process that probes: server and forked child are gone within five seconds."""
    program = tmp_path / "parent.py"
    program.write_text(
        "from autotune.probe.executor import SubprocessExecutor\n"
        "from tests.tiny import ENVIRONMENT, a_config, a_probe\n"
        "executor = SubprocessExecutor(ENVIRONMENT)\n"
        "executor.probe(a_probe())\n"
        "print('warm', flush=True)\n"
        "executor.probe(a_probe(limit_mib=None, config=a_config(micro_batch_size=16, sequence_length=4096)))\n"
    )
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    parent = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    assert parent.stdout.readline().strip() == "warm"
    deadline = time.monotonic() + 10
    while len(tree := psutil.Process(parent.pid).children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(tree) >= 2
    parent.kill()
    parent.wait(5)
    parent.stdout.close()
    assert all(gone(process.pid) for process in tree)
