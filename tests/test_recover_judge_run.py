"""What the end of an attempt is judged to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autotune.recover.facts import Death, Ended, EndedBy, Phase, Progress
from autotune.recover.judge_run import is_finished, judge, report_of
from autotune.values import GIB, Verdict
from autotune.verdict.judge import Evidence

CUDA_OOM = (
    "CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 11.63 GiB of which 1.10 GiB is"
    " free. Including non-PyTorch memory, this process has 10.00 GiB memory in use."
)
CPU_OOM = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 4096"
NCCL = "torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error"


def died(exception: str, message: str, **changes: Any) -> Death:
    traceback = f'Traceback (most recent call last):\n  File "train.py", line 9\n{exception}: {message}'
    fields = {"exception": exception, "message": message, "traceback": traceback, "phase": Phase.TRAIN, "rank": 0}
    return Death(**{**fields, **changes})


def ended(**changes: Any) -> Ended:
    return Ended(**{"exit_code": 1, **changes})


OOM = died("torch.OutOfMemoryError", CUDA_OOM)


@pytest.mark.parametrize(
    ("end", "asked", "verdict"),
    [
        (ended(exit_code=0), {}, Verdict.FITS),
        (ended(death=OOM), {}, Verdict.DEVICE_OOM),
        (ended(tail=f"Traceback (most recent call last):\nRuntimeError: {CUDA_OOM}"), {}, Verdict.DEVICE_OOM),
        (ended(death=died("RuntimeError", CPU_OOM)), {"target": "cpu", "limit_bytes": GIB}, Verdict.DEVICE_OOM),
        (ended(death=died("RuntimeError", CPU_OOM)), {"target": "cpu"}, Verdict.HOST_OOM),
        (
            ended(death=died("RuntimeError", CPU_OOM, phase=Phase.START)),
            {"target": "cpu", "limit_bytes": GIB},
            Verdict.DEVICE_OOM,
        ),
        (
            ended(death=died("RuntimeError", "could not create a primitive")),
            {"target": "cpu", "limit_bytes": GIB},
            Verdict.DEVICE_OOM,
        ),
        (ended(death=died("ValueError", "bad argument")), {}, Verdict.NOT_OOM),
        (ended(exit_code=None), {}, Verdict.NOT_OOM),
        (ended(exit_code=-9, signal=9), {}, Verdict.AMBIGUOUS),
        (
            ended(exit_code=-9, signal=9),
            {"evidence": Evidence(oom_kills=2), "before": Evidence(oom_kills=1)},
            Verdict.HOST_OOM,
        ),
        (ended(exit_code=-15, signal=15), {}, Verdict.INTERRUPTED),
        (ended(exit_code=143), {}, Verdict.INTERRUPTED),
        (ended(exit_code=-15, signal=15, ended_by=EndedBy.USER), {}, Verdict.INTERRUPTED),
        (ended(exit_code=-9, signal=9, ended_by=EndedBy.STALL), {}, Verdict.TIMEOUT),
        (ended(exit_code=-9, signal=9, ended_by=EndedBy.START_LIMIT), {}, Verdict.TIMEOUT),
        (ended(exit_code=-9, signal=9, ended_by=EndedBy.SPILL), {}, Verdict.SPILL),
        (ended(tail="NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus."), {}, Verdict.DEVICE_LOST),
        (ended(exit_code=1), {}, Verdict.AMBIGUOUS),
    ],
)
def test_each_end_has_its_verdict(end: Ended, asked: dict[str, Any], verdict: Verdict) -> None:
    assert judge(end, **{"target": "cuda", **asked}).verdict is verdict


def test_the_numbers_of_the_message_are_kept() -> None:
    assert judge(ended(death=OOM), target="cuda").numbers["free_bytes"] == round(1.10 * GIB)


def test_the_first_ranks_death_wins_over_what_the_others_printed() -> None:
    end = ended(
        exit_code=-15, signal=15, ended_by=EndedBy.RANK, death=OOM, tail=f"{NCCL}\nSignal 15 (SIGTERM) received"
    )
    assert judge(end, target="cuda").verdict is Verdict.DEVICE_OOM
    end = replace(end, death=died("ValueError", "bad argument"), tail=f"torch.OutOfMemoryError: {CUDA_OOM}")
    assert judge(end, target="cuda").verdict is Verdict.NOT_OOM


def test_the_output_decides_where_the_first_death_reported_is_a_consequence() -> None:
    end = ended(ended_by=EndedBy.RANK, death=died(*NCCL.split(": ", 1)), tail=f"torch.OutOfMemoryError: {CUDA_OOM}")
    assert judge(end, target="cuda").verdict is Verdict.DEVICE_OOM


def test_a_trainer_that_hung_after_its_death_died_of_what_it_said() -> None:
    end = ended(exit_code=-9, signal=9, ended_by=EndedBy.STALL, death=OOM)
    assert judge(end, target="cuda").verdict is Verdict.DEVICE_OOM


def test_a_death_that_the_script_swallowed_is_one_unless_training_went_on() -> None:
    swallowed = ended(exit_code=0, death=replace(OOM, step=3), progress=Progress(step=3, max_steps=9))
    assert judge(swallowed, target="cuda").verdict is Verdict.DEVICE_OOM
    for progress in (Progress(step=9, max_steps=9), Progress(step=4), Progress(phase=Phase.DONE, step=3)):
        assert judge(replace(swallowed, progress=progress), target="cuda").verdict is Verdict.FITS


def test_a_report_says_where_it_died_and_no_signal_that_we_sent() -> None:
    report = report_of(ended(exit_code=-9, signal=9, ended_by=EndedBy.STALL, progress=Progress(phase=Phase.EVALUATE)))
    assert (report.failure and report.failure.phase, report.signal) == ("evaluate", None)
    report = report_of(ended(death=replace(OOM, part="optimizer")))
    assert report.failure is not None
    assert report.failure.phase == "optimizer"
    assert is_finished(ended(exit_code=0))
    assert report_of(ended(exit_code=0)).failure is None
