"""A probe's facts, the system's records and the limit together give the verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from autotune.values import GIB, MIB, Failure, ProbeReport, Verdict
from autotune.verdict.judge import Evidence, classify
from tests.fakes import FakeExecutor, Law, a_model, a_request

LIMIT = 1500 * MIB
CARD = 12 * GIB
FINISHED = ProbeReport(
    micro_batch_times_s=(0.5, 0.6),
    optimizer_times_s=(0.1,),
    loss=10.9,
    losses=(11.0, 10.9),
    optimizer_state_bytes=30 * MIB,
    peak_allocated_bytes=900 * MIB,
    peak_reserved_bytes=1000 * MIB,
    limit_bytes=LIMIT,
    exit_code=0,
)
CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    " 100663296 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 12.00 GiB of which 1.00 GiB is free."
)
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
KILL_LINE = "Out of memory: Killed process 4321 (python)"


def dead(**changes: Any) -> ProbeReport:
    """A probe that died with no word."""
    defaults: dict[str, Any] = {"failure": Failure(phase="forward"), "limit_bytes": LIMIT}
    return ProbeReport(**{**defaults, **changes})


def raised(exception: str, message: str = "", **changes: Any) -> ProbeReport:
    """A probe that died of an exception, as the worker describes it."""
    described = f'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\n{exception}: {message}\n'
    failure = Failure(phase="forward", exception=exception, message=message, traceback=described)
    return dead(failure=failure, exit_code=0, **changes)


# --- Finished


def test_a_finished_probe_fits() -> None:
    judgement = classify(FINISHED, target="cpu", limit_bytes=LIMIT)
    assert judgement.verdict is Verdict.FITS
    assert judgement.action


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"loss": None}, "not finite"),
        ({"losses": (11.0, math.nan)}, "not finite"),
        ({"loss": math.inf, "losses": ()}, "not finite"),
        ({"optimizer_state_bytes": 0}, "never stepped"),
        ({"optimizer_state_bytes": None, "skipped_steps": 3}, "3 skipped by the gradient scaler"),
    ],
)
def test_steps_that_train_nothing_prove_nothing(change: dict[str, Any], word: str) -> None:
    judgement = classify(replace(FINISHED, **change), target="cuda:0")
    assert judgement.verdict is Verdict.NOT_OOM
    assert word in judgement.evidence[0]


def test_skipped_steps_with_the_state_in_place_still_fit() -> None:
    judgement = classify(replace(FINISHED, skipped_steps=1), target="cuda:0")
    assert judgement.verdict is Verdict.FITS
    assert any("skipped 1" in line for line in judgement.evidence)


def test_an_end_with_nothing_timed_is_ambiguous() -> None:
    assert classify(replace(FINISHED, micro_batch_times_s=()), target="cpu").verdict is Verdict.AMBIGUOUS


def test_a_finished_probe_that_used_system_memory_is_a_spill() -> None:
    over_card = replace(FINISHED, device_used_bytes=CARD + GIB)
    over_limit = replace(FINISHED, peak_reserved_bytes=LIMIT + 100 * MIB)
    assert classify(over_card, target="cuda:0", device_total_bytes=CARD).verdict is Verdict.SPILL
    assert classify(over_limit, target="cuda:0").verdict is Verdict.SPILL
    assert classify(FINISHED, target="cuda:0", spilled=True).verdict is Verdict.SPILL
    assert classify(over_limit, target="cpu").verdict is Verdict.FITS


def test_the_fake_executors_deaths_are_device_out_of_memory() -> None:
    from autotune.values import ProbeRequest

    executor = FakeExecutor(law=Law())
    config = replace(a_request().start, micro_batch_size=8, gradient_accumulation_steps=1)
    for device in ("cpu", "cuda:0"):
        request = ProbeRequest(model=a_model(), config=config, device=device, memory_limit_bytes=LIMIT)
        judgement = classify(executor.probe(request), target=device, limit_bytes=LIMIT)
        assert judgement.verdict is Verdict.DEVICE_OOM
        assert judgement.numbers["tried_bytes"] > 0


# --- The CPU target


@pytest.mark.parametrize(
    ("exception", "message"),
    [
        ("RuntimeError", CPU_ALLOCATOR),
        ("RuntimeError", "could not create a primitive"),
        ("RuntimeError", "could not create a memory object"),
        ("RuntimeError", "std::bad_alloc"),
        ("MemoryError", ""),
        ("MemoryError", "std::bad_alloc"),
        ("OSError", "[Errno 12] Cannot allocate memory"),
        ("BlockingIOError", "[Errno 11] Resource temporarily unavailable"),
        ("RuntimeError", "can't start new thread"),
        ("RuntimeError", "unable to mmap 2048 bytes from file <filename not specified>: Cannot allocate memory (12)"),
        ("numpy._core._exceptions._ArrayMemoryError", "Unable to allocate 1.61 GiB for an array with shape (3,)"),
    ],
)
def test_under_a_cpu_limit_any_failed_allocation_is_the_devices(exception: str, message: str) -> None:
    judgement = classify(raised(exception, message), target="cpu", limit_bytes=LIMIT)
    assert judgement.verdict is Verdict.DEVICE_OOM
    assert any("1.46 GiB" in line for line in judgement.evidence)
    assert "in phase forward" in judgement.evidence


@pytest.mark.parametrize(
    "printed",
    [
        "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n",
        "libgomp: Thread creation failed: Resource temporarily unavailable\n",
    ],
)
def test_a_native_death_for_memory_is_read_from_what_was_printed(printed: str) -> None:
    assert classify(dead(signal=6, log_tail=printed), target="cpu").verdict is Verdict.DEVICE_OOM


def test_a_cuda_probes_host_allocation_is_the_hosts() -> None:
    assert classify(raised("RuntimeError", CPU_ALLOCATOR), target="cuda:0").verdict is Verdict.HOST_OOM


@pytest.mark.parametrize(
    ("peak", "wanted"),
    [
        (LIMIT * 97 // 100, "device_oom"),
        (LIMIT * 60 // 100, "ambiguous"),  # one large request may have been refused
        (LIMIT * 40 // 100, "not_oom"),
        (None, "ambiguous"),
    ],
)
@pytest.mark.parametrize("signal", [6, 7, 11])
def test_a_crash_is_for_memory_only_at_the_limit(signal: int, peak: int | None, wanted: str) -> None:
    judgement = classify(dead(signal=signal, peak_reserved_bytes=peak), target="cpu")
    assert judgement.verdict.value == wanted
    assert (judgement.settle is not None) == (wanted == "ambiguous")


# --- The GPU


def test_torchs_out_of_memory_is_read_with_its_numbers() -> None:
    judgement = classify(raised("torch.OutOfMemoryError", CUDA_OOM), target="cuda:0")
    assert judgement.verdict is Verdict.DEVICE_OOM
    assert judgement.numbers == {"tried_bytes": 2 * GIB, "total_bytes": 12 * GIB, "free_bytes": GIB}


def test_the_cause_behind_a_broken_handler_decides() -> None:
    failure = Failure(
        phase="backward",
        exception="AttributeError",
        message="module 'torch.cuda' has no attribute 'OutOfMemoryError'",
        chain=(f"RuntimeError: {CUDA_OOM}",),
    )
    assert classify(dead(failure=failure), target="cuda:0").verdict is Verdict.DEVICE_OOM


def test_bitsandbytes_prints_and_exits() -> None:
    line = "Error out of memory at line 88 in file /src/csrc/ops.cu"
    assert classify(dead(exit_code=1, log_tail=line), target="cuda:0").verdict is Verdict.DEVICE_OOM


@pytest.mark.parametrize(
    ("free", "wanted"),
    [
        (100 * MIB, "device_oom"),
        (6 * GIB, "not_oom"),
        (GIB, "ambiguous"),
        (int(2.2 * GIB), "ambiguous"),  # over 2 GiB, and under a fifth of the card
        (None, "ambiguous"),
    ],
)
def test_free_memory_settles_a_library_that_could_not_start(free: int | None, wanted: str) -> None:
    report = raised("RuntimeError", CUBLAS, device_free_bytes=free)
    judgement = classify(replace(report, limit_bytes=CARD), target="cuda:0", device_total_bytes=CARD)
    assert judgement.verdict.value == wanted
    assert (judgement.settle is not None) == (wanted == "ambiguous")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("CUDA error: uncorrectable ECC error encountered", "device_lost"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "device_lost"),
        ("GPU is lost. Reboot the system to recover this GPU", "device_lost"),
        ("CUDA error: an illegal memory access was encountered", "not_oom"),
        ("CUDA error: device-side assert triggered", "not_oom"),
        ("The size of tensor a must match the size of tensor b", "not_oom"),
        ("", "not_oom"),
    ],
)
def test_an_error_of_the_context_is_lost_hardware_or_a_bug(message: str, wanted: str) -> None:
    assert classify(raised("RuntimeError", message), target="cuda:0").verdict.value == wanted


def test_the_drivers_log_tells_of_a_lost_card() -> None:
    xid = "NVRM: Xid (PCI:0000:01:00): {}, pid=4321, name=python"
    lost = classify(dead(signal=6), target="cuda:0", evidence=Evidence(device_lines=(xid.format(79),)))
    fault = classify(dead(signal=6), target="cuda:0", evidence=Evidence(device_lines=(xid.format(31),)))
    assert lost.verdict is Verdict.DEVICE_LOST
    assert fault.verdict is Verdict.NOT_OOM


# --- Ends from outside


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        (None, None, "ambiguous"),
        (Evidence(oom_kills=1), Evidence(oom_kills=2), "host_oom"),
        (Evidence(oom_kills=2), Evidence(oom_kills=2), "ambiguous"),
        (None, Evidence(oom_kills=2), "ambiguous"),
        (None, Evidence(kernel_lines=(KILL_LINE,)), "host_oom"),
        (None, Evidence(kernel_lines=(), other_kills=1), "ambiguous"),
    ],
)
@pytest.mark.parametrize("end", [{"signal": 9}, {"exit_code": 137}])
def test_a_kill_is_the_hosts_where_the_system_says_so(
    before: Evidence | None, after: Evidence | None, wanted: str, end: dict[str, int]
) -> None:
    judgement = classify(dead(**end), target="cuda:0", evidence=after, before=before)
    assert judgement.verdict.value == wanted


@pytest.mark.parametrize("end", [{"signal": 2}, {"signal": 15}, {"exit_code": 130}, {"exit_code": 143}])
def test_a_polite_signal_is_an_interruption(end: dict[str, int]) -> None:
    assert classify(dead(**end), target="cpu").verdict is Verdict.INTERRUPTED


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "autotune.errors.Interrupted"])
def test_an_interrupting_exception_is_an_interruption(name: str) -> None:
    assert classify(raised(name), target="cpu").verdict is Verdict.INTERRUPTED


def test_a_time_limit_is_not_memory() -> None:
    failure = Failure(phase="forward", message="no end of phase forward within its time limit", at_limit=True)
    judgement = classify(dead(failure=failure, log_tail=CUDA_OOM), target="cuda:0")
    assert judgement.verdict is Verdict.TIMEOUT


def test_a_death_without_a_word_is_ambiguous() -> None:
    judgement = classify(dead(exit_code=1), target="cuda:0")
    assert judgement.verdict is Verdict.AMBIGUOUS
    assert judgement.settle


def test_a_crash_after_all_was_measured_is_no_fit() -> None:
    assert classify(replace(FINISHED, exit_code=None, signal=11), target="cuda:0").verdict is Verdict.NOT_OOM


def test_an_import_error_is_named() -> None:
    judgement = classify(raised("ModuleNotFoundError", "No module named 'flash_attn'"), target="cuda:0")
    assert judgement.verdict is Verdict.NOT_OOM
    assert "flash_attn" in judgement.evidence[0]
