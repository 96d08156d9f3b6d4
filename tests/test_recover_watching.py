"""The rules by which a run that has not ended is ended, as tables; and what a memory limit does to an environment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autotune.errors import InvalidRequest
from autotune.recover.ending import SteadyClock
from autotune.recover.facts import Death, EndedBy, Phase, Progress
from autotune.recover.limits import fraction_environment, needs_torch, with_memory_limit
from autotune.recover.progress import Told
from autotune.recover.watching import Ages, AttemptLimits, collapse, reason_to_end, spill
from autotune.values import GIB, MIB, Device

LIMITS = AttemptLimits(
    start_s=100, stall_factor=10, stall_floor_s=50, quiet_phase_s=200, quiet_s=1000, rank_grace_s=4, death_grace_s=30
)
SILENT = Progress()
STARTED = Progress(reporting=True, phase=Phase.LOAD)
BEGUN = Progress(reporting=True, phase=Phase.TRAIN, step=0)
TRAINS = Progress(reporting=True, phase=Phase.TRAIN, step=7, steps=7, step_time_s=1.0)
SLOW = replace(TRAINS, step_time_s=20.0)
EVALUATES = replace(TRAINS, phase=Phase.EVALUATE)
DONE = replace(TRAINS, phase=Phase.DONE)
TWO = ((0, 1), (1, 2))


def ages(output: float = 0.0, report: float = 0.0, step: float = 0.0, **more: Any) -> Ages:
    return Ages(run_s=5000.0, output_s=output, report_s=report, step_s=step, **more)


@pytest.mark.parametrize(
    ("progress", "seen", "by"),
    [
        (SILENT, ages(999, 5000, 5000), None),
        (SILENT, ages(1001, 5000, 5000), EndedBy.STALL),
        (STARTED, ages(99, 500, 500), None),  # it prints while it loads
        (STARTED, ages(500, 99, 500), None),
        (STARTED, ages(101, 101, 500), EndedBy.START_LIMIT),
        (BEGUN, ages(101, 101, 101), EndedBy.START_LIMIT),
        (TRAINS, ages(5000, 49, 49), None),
        (TRAINS, ages(0, 51, 51), EndedBy.STALL),  # output is no step
        (SLOW, ages(0, 199, 199), None),  # ten times its own median
        (SLOW, ages(0, 201, 201), EndedBy.STALL),
        (EVALUATES, ages(199, 300, 300), None),
        (EVALUATES, ages(201, 201, 300), EndedBy.STALL),
        (DONE, ages(999, 999, 999), None),
        (DONE, ages(1001, 1001, 1001), EndedBy.STALL),
    ],
)
def test_what_takes_too_long_is_ended(progress: Progress, seen: Ages, by: EndedBy | None) -> None:
    reason = reason_to_end(Told(progress=progress), seen, LIMITS)
    assert (reason and reason[0]) == by


@pytest.mark.parametrize(
    ("told", "seen", "by"),
    [
        ({"pids": TWO}, ages(death_s=1.9), None),
        ({"pids": TWO}, ages(death_s=2.1), EndedBy.RANK),
        ({"pids": TWO}, ages(gone_s=1.9), None),
        ({"pids": TWO}, ages(gone_s=2.1), EndedBy.RANK),
        ({"pids": TWO, "ended": True}, ages(gone_s=100), None),  # it is through
        ({"pids": ((0, 1),)}, ages(gone_s=100), None),  # a script's only process may end before the script
        ({"pids": ((0, 1),)}, ages(death_s=29, output=29, report=29), None),
        ({"pids": ((0, 1),)}, ages(death_s=100, output=29, report=100), None),  # it still prints
        ({"pids": ((0, 1),)}, ages(death_s=31, output=31, report=31), EndedBy.RANK),
    ],
)
def test_one_ranks_death_is_everybodys(told: dict[str, Any], seen: Ages, by: EndedBy | None) -> None:
    state = Told(progress=TRAINS, deaths=((1.0, True, Death(rank=1)),), **told)
    reason = reason_to_end(state, seen, LIMITS)
    assert (reason and reason[0]) == by


@pytest.mark.parametrize(
    ("times", "collapsed"),
    [
        ((1.0,) * 500, False),
        ((1.0,) * 30 + (9.0,) * 20, False),  # too few steps for a pace of its own
        ((1.0,) * 100 + (2.9,) * 20, False),
        ((1.0,) * 100 + (3.1,) * 20, True),
        ((1.0,) * 100 + (50.0,) * 5, False),  # a few long ones
    ],
)
def test_a_throughput_collapse_is_a_note(times: tuple[float, ...], collapsed: bool) -> None:
    assert bool(collapse(Told(step_times_s=times))) is collapsed


CARD = Device(kind="cuda", index=0, name="RTX", total_bytes=8 * GIB, free_bytes=GIB)
COLLAPSED = (1.0,) * 100 + (30.0,) * 20


@pytest.mark.parametrize(
    ("device", "reserved", "times", "spilled"),
    [
        (None, 20 * GIB, (), False),
        (CARD, 7 * GIB, COLLAPSED, False),
        (CARD, 8 * GIB - 100 * MIB, (), True),  # no room for the context
        (replace(CARD, unified_memory=True), 9 * GIB, (), False),
        (replace(CARD, free_bytes=-MIB), 0, (), True),
        (replace(CARD, free_bytes=MIB, wsl=True), 7 * GIB, (), False),  # full, and as fast as before
        (replace(CARD, free_bytes=MIB, wsl=True), 7 * GIB, COLLAPSED, True),
        (replace(CARD, free_bytes=MIB), 7 * GIB, COLLAPSED, False),  # Linux raises instead
        (Device(kind="cpu", index=None, name="CPU", total_bytes=8 * GIB), 9 * GIB, (), False),
    ],
)
def test_a_spill_is_seen(device: Device | None, reserved: int, times: tuple[float, ...], spilled: bool) -> None:
    told = Told(progress=replace(TRAINS, peak_reserved_bytes=reserved), step_times_s=times)
    assert bool(spill(told, device, replace(LIMITS, context_bytes=200 * MIB))) is spilled


def test_time_in_which_we_did_not_run_is_left_out() -> None:
    now = [0.0]
    clock = SteadyClock(lambda: now[0])
    for after_s in (0.5, 3600.0, 0.5):  # the machine slept for an hour
        now[0] += after_s
        clock.tick()
    assert clock.now() == 1.0
    now[0] += 2.0
    assert clock.fresh() == 3.0


# -------------------------------------------------------------------------------- memory limits


def test_a_cpu_limit_is_absolute() -> None:
    cpu = Device(kind="cpu", index=None, name="CPU", total_bytes=8 * GIB)
    limits = with_memory_limit(LIMITS, 2 * GIB, cpu)
    assert (limits.data_bytes, limits.memory_fraction, limits.context_bytes) == (2 * GIB, None, 0)


def test_a_cards_limit_leaves_its_context_out_of_the_allocators_part() -> None:
    device = Device(kind="cuda", index=0, name="Tesla T4", total_bytes=15 * GIB, compute_capability="7.5")
    limits = with_memory_limit(LIMITS, 8 * GIB, device)
    assert limits.memory_fraction is not None
    assert round(limits.memory_fraction * 15 * GIB) == 8 * GIB - limits.context_bytes
    assert 100 * MIB < limits.context_bytes < 300 * MIB
    assert with_memory_limit(LIMITS, None, device).memory_fraction is None


def test_a_limit_below_the_context_is_refused() -> None:
    device = Device(kind="cuda", index=0, name="Tesla T4", total_bytes=15 * GIB)
    with pytest.raises(InvalidRequest, match="leaves nothing beside the CUDA context"):
        with_memory_limit(LIMITS, 100 * MIB, device)


@pytest.mark.parametrize(
    ("environ", "value"),
    [
        ({}, ""),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments:True,"),
        ({"PYTORCH_CUDA_ALLOC_CONF": " max_split_size_mb:64 , "}, "max_split_size_mb:64,"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "per_process_memory_fraction:0.9,backend:native"}, "backend:native,"),
        (
            {"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:[256:1,>:2],pinned_num_register_threads:2"},
            "roundup_power2_divisions:[256:1,>:2],pinned_num_register_threads:2,",
        ),
    ],
)
def test_a_fraction_joins_what_is_set_already(environ: dict[str, str], value: str) -> None:
    wanted = f"{value}per_process_memory_fraction:0.250000"
    assert fraction_environment(environ, 0.25) == {"PYTORCH_ALLOC_CONF": wanted, "PYTORCH_CUDA_ALLOC_CONF": wanted}
    assert fraction_environment(environ, None) == {}


@pytest.mark.parametrize(
    ("torch", "refused"),
    [("2.9.1+cu128", True), ("2.4", True), ("2.10.0", False), ("2.13.0+cpu", False), (None, False), ("?", False)],
)
def test_a_torch_without_the_setting_is_named(torch: str | None, refused: bool) -> None:
    assert bool(needs_torch(torch)) is refused
