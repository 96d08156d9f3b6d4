"""`autotune fit` as a user runs it, and killed, stopped or bereft of its workers in the middle of it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from autotune.hardware.cpu import read_cpu
from autotune.values import TrialRecord, Verdict
from benchmarks.kill_fit import (
    ENDED,
    Killing,
    RunningFit,
    Settings,
    is_intact,
    is_worker,
    lost,
    run_again,
    stored,
    tiny_model,
)
from tests.trial_records import report, trial

LIMITED = Settings(memory_limit="96MiB", max_probes=4)
ONE_PROBE = Settings(sequence_length=512, memory_limit="2GiB", max_probes=1)
SIGTERM_IS_HANDLED = 1 << (signal.SIGTERM - 1)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="waits for moments that /proc shows")


@contextmanager
def a_fit(folder: Path, settings: Settings = LIMITED, *options: str) -> Iterator[RunningFit]:
    fit = RunningFit(folder / "home", [*settings.command(tiny_model(folder)), *options])
    try:
        yield fit
    finally:
        fit.end()


def wait_until(fit: RunningFit, holds: Callable[[], bool], limit_s: float = 90.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert fit.process.poll() is None, f"it ended with {fit.process.returncode}: {fit.errors}"
        assert time.monotonic() < deadline, f"it took more than {limit_s:g} s: {fit.errors}"
        time.sleep(0.005)


def handles_signals(fit: RunningFit) -> bool:
    """Whether our code runs by now; before, the interpreter itself starts."""
    status = Path(f"/proc/{fit.process.pid}/status").read_text(encoding="ascii")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) & SIGTERM_IS_HANDLED)


def workers(fit: RunningFit) -> list[psutil.Process]:
    """The worker, and its forked child where a probe runs in one."""
    return [process for process in fit.tree()[1:] if is_worker(process)]


def words(fit: RunningFit) -> list[str]:
    """What stderr says beside the course of the fit."""
    course = ("Fitting ", "    skip ", *fit.shown())
    return [line for line in fit.errors.splitlines() if line.strip() and not f"{line}\n".startswith(course)]


def trials(fit: RunningFit) -> list[TrialRecord]:
    return stored(fit.home, read_cpu())


def check_stopped(fit: RunningFit) -> None:
    """It was asked to stop, and did: in one line, with nothing left running or lying about."""
    assert fit.wait(20) == 130, fit.errors
    assert len(words(fit)) == 1, fit.errors
    assert "nterrupted" in words(fit)[0]
    assert fit.survivors() == []
    assert list(fit.temporary.iterdir()) == []
    assert not lost([], fit.shown(), trials(fit))
    assert is_intact(fit.home, read_cpu())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_at_random_moments_leaves_no_process_and_loses_no_trial(tmp_path: Path) -> None:
    killing = Killing(tmp_path, read_cpu(), LIMITED, print)
    killing.run(2, seed=1, whole_s=killing.undisturbed_s())
    assert [moment.alive for moment in killing.moments] == [0] * 2
    assert [(moment.lost, moment.intact) for moment in killing.moments] == [(0, True)] * 2
    assert {ending.exit_code for ending in killing.endings} <= set(ENDED)
    assert sum(ending.kills for ending in killing.endings) == 2
    assert [ending.run_again for ending in killing.endings] == [0] * len(killing.endings)


def test_trials_that_were_shown_and_are_not_stored_count_as_lost() -> None:
    one = trial(id=1)
    assert lost([], [], [one]) == 0  # stored, and killed before it was shown
    assert lost([one], [], []) == 1
    assert lost([], ["  1 probe of another config: fits\n"], [one]) == 1
    assert lost([one], [], [trial(id=1, report=report(log_tail="changed"))]) == 1
    assert lost([], ["  1 probe …\n", "  2 probe …\n"], []) == 2


def test_a_config_on_record_twice_counts_as_run_again() -> None:
    assert run_again([trial(id=1)]) == 0
    assert run_again([trial(id=1), trial(id=2)]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGINT, signal.SIGTERM)],
    ids=["SIGINT", "SIGTERM", "again and again"],
)
def test_a_signal_between_probes_is_one_line_and_keeps_all_trials(
    tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    with a_fit(tmp_path) as fit:
        wait_until(fit, lambda: len(fit.shown()) >= 2)
        for number in numbers:
            fit.process.send_signal(number)
        check_stopped(fit)
        assert len(trials(fit)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("seconds", [0, 0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2])
def test_a_signal_while_it_starts_is_one_line(tmp_path: Path, number: signal.Signals, seconds: float) -> None:
    with a_fit(tmp_path) as fit:
        wait_until(fit, lambda: handles_signals(fit))
        time.sleep(seconds)
        for _ in range(2):
            fit.process.send_signal(number)
        check_stopped(fit)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["worker", "forked child"])
def test_a_probe_whose_process_is_killed_is_tried_once_more(tmp_path: Path, which: int) -> None:
    with a_fit(tmp_path, ONE_PROBE) as fit:
        wait_until(fit, lambda: len(workers(fit)) == 2)
        workers(fit)[which].kill()
        assert fit.wait() == 0, fit.errors
        killed, again, *_ = trials(fit)
        assert fit.survivors() == []
    assert (killed.report.signal, killed.judgement.verdict) == (signal.SIGKILL, Verdict.AMBIGUOUS)
    assert (again.config, again.judgement.verdict) == (killed.config, Verdict.FITS)
    assert again.report.pid != killed.report.pid


@pytest.mark.slow
def test_a_probe_whose_workers_are_killed_twice_ends_the_fit_with_one_line(tmp_path: Path) -> None:
    with a_fit(tmp_path) as fit:
        wait_until(fit, lambda: len(workers(fit)) == 1)
        workers(fit)[0].kill()
        wait_until(fit, lambda: len(fit.shown()) == 1 and len(workers(fit)) == 1)
        workers(fit)[0].kill()
        assert fit.wait(30) == 1
        assert len(words(fit)) == 1, fit.errors
        assert words(fit)[0].startswith("Error: ambiguous")
        assert "SIGKILL" in words(fit)[0]
        assert fit.survivors() == []
        assert [one.judgement.verdict for one in trials(fit)] == [Verdict.AMBIGUOUS] * 2
