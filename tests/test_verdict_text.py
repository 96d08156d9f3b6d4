"""Real messages of dying runs get the verdict that a careful reader gives them."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.values import Verdict
from autotune.verdict.rules import KIND_VERDICT, RULES, Kind
from autotune.verdict.text import classify_text

FOLDER = Path(__file__).with_name("data") / "oom"
CLASSES = {"vram_oom": "device_oom"}
OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of"
    " which 1.20 GiB is free. Including non-PyTorch memory, this process has 22.40 GiB memory in use."
)
TRACE = "Traceback (most recent call last):\n"
DURING = "\n\nDuring handling of the above exception, another exception occurred:\n\n"
HANDLER_BUG = (
    f'{TRACE}  File "a.py", line 3, in <module>\n    except torch.cuda.OutOfMemoryError:\n'
    "AttributeError: module 'torch.cuda' has no attribute 'OutOfMemoryError'\n"
)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


MESSAGES = [(CLASSES.get(row["cls"], row["cls"]), row["text"]) for row in rows("messages.jsonl")]
FURTHER = [(row["verdict"], row["text"]) for row in rows("further.jsonl")]


def test_quoted_messages_meet_the_bars() -> None:
    found = Counter((wanted, classify_text(text).verdict.value) for wanted, text in MESSAGES)
    totals = Counter(wanted for wanted, _ in MESSAGES)
    right = {wanted: found[wanted, wanted] / totals[wanted] for wanted in totals}
    assert found["not_oom", "device_oom"] == found["host_oom", "device_oom"] == 0
    assert right["device_oom"] >= 0.95
    assert right["not_oom"] >= 0.85
    assert right["host_oom"] >= 0.85
    assert right["ambiguous"] >= 0.85


@pytest.mark.parametrize(
    "text",
    [
        "usage: train.py [-h]\ntrain.py: error: unrecognized arguments: --nope 4",
        "usage: train.py [-h]\ntrain.py: error: the following arguments are required: --model",
        "train.py: error: argument --steps: invalid int value: 'x'",
        "Usage: train [OPTIONS]\nTry 'train --help' for help.\n\nError: No such option: --nope",
        "python: can't open file '/data/train.py': [Errno 2] No such file or directory",
        "/usr/bin/python3.11: No module named trainer.main",
    ],
)
def test_a_command_that_never_began_is_no_lack_of_memory(text: str) -> None:
    assert classify_text(text).verdict is Verdict.NOT_OOM
    assert classify_text(f"{text}\n{TRACE}{OOM}").verdict is Verdict.DEVICE_OOM


#: A SIGKILL whose thread later found the reason; the same words stand in an ambiguous row, so text cannot tell.
KILLED_FOR_MEMORY = "ERROR:torch.distributed.elastic.multiprocessing.api:failed (exitcode: -9) local_rank: 1"


@pytest.mark.parametrize(("wanted", "text"), MESSAGES)
def test_each_quoted_message_is_judged_as_its_reader_did(wanted: str, text: str) -> None:
    if text.startswith(KILLED_FOR_MEMORY):
        wanted = "ambiguous"
    judgement = classify_text(text)
    assert judgement.verdict.value == wanted
    assert judgement.evidence
    assert judgement.action
    assert (judgement.settle is not None) == (wanted == "ambiguous")


@pytest.mark.parametrize(("wanted", "text"), FURTHER)
def test_messages_of_the_same_families_are_judged_alike(wanted: str, text: str) -> None:
    assert classify_text(text).verdict.value == wanted


@pytest.mark.parametrize(("wanted", "text"), MESSAGES)
def test_case_prefixes_and_progress_around_a_message_change_nothing(wanted: str, text: str) -> None:
    plain = classify_text(text).verdict
    assert classify_text(text.upper()).verdict in (plain, Verdict.AMBIGUOUS)
    around = f"Loading model\nepoch 0: 12% loss 2.31\n{text}\n"
    assert classify_text(around).verdict is plain


@pytest.mark.parametrize("width", [40, 72, 100])
def test_a_terminal_may_wrap_a_message_at_any_space(width: int) -> None:
    import textwrap

    for wanted, text in MESSAGES:
        if "cuda out of memory. tried" in text.lower():
            assert classify_text(textwrap.fill(text, width)).verdict.value == wanted


def test_carriage_returns_and_colours_do_not_hide_an_error() -> None:
    text = f" 12%|# | 120/1000\r 13%|# | 130/1000\r\n\x1b[31m{OOM}\x1b[0m\r\n"
    judgement = classify_text(text)
    assert judgement.verdict is Verdict.DEVICE_OOM
    assert "\x1b" not in judgement.evidence[0]


def test_evidence_names_the_rule_and_quotes_the_line_trimmed() -> None:
    line = classify_text(f"noise\n{OOM} {'x' * 500}\nnoise").evidence[0]
    assert line.startswith("the device allocator's message: \"torch.OutOfMemoryError: CUDA out of memory.")
    assert len(line) < 300


# --- Which error counts


CHAINS = [
    ("device_oom", f"{TRACE}{OOM}{DURING}{HANDLER_BUG}"),
    ("device_oom", f"{TRACE}{OOM}{DURING}{TRACE}RuntimeError: cleanup failed\n"),
    ("device_oom", f"{TRACE}KeyError: 'cache'{DURING}{TRACE}{OOM}\n"),
    ("not_oom", f"{TRACE}ValueError: bad shape{DURING}{HANDLER_BUG}"),
    ("not_oom", HANDLER_BUG),
    ("host_oom", f"{TRACE}MemoryError{DURING}{TRACE}RuntimeError: worker is gone\n"),
    ("not_oom", f"{TRACE}{OOM}\nretrying with batch size 2\nstep 3 loss 1.2\n{TRACE}ValueError: no eval set\n"),
    ("not_oom", f"{TRACE}{OOM}\nstep 3 loss 1.2\n{TRACE}ValueError: no eval set\n"),
    ("device_oom", f"{TRACE}ValueError: bad row, skipped\nstep 3\n{TRACE}{OOM}\n"),
    ("device_oom", f"{TRACE}{OOM}\nDecreasing batch size to: 1.\nRuntimeError: No executable batch size found\n"),
    ("device_oom", f"{TRACE}{OOM}\nException ignored in: <function f>\n{TRACE}TypeError: NoneType\n"),
    ("device_oom", f"{TRACE}{OOM}\n{TRACE}subprocess.CalledProcessError: returned non-zero exit status 1.\n"),
    ("device_oom", f"[rank0]: {OOM}\n[rank1]: torch.distributed.DistBackendError: remote process exited\n"),
    (
        "device_oom",
        f"{OOM}\nRuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\n",
    ),
    ("not_oom", "RuntimeError: CUDA error: device-side assert triggered\nCUBLAS_STATUS_NOT_INITIALIZED\n"),
    ("ambiguous", f"{TRACE}ValueError: a row was skipped\nstep 4\nfailed (exitcode: -9) local_rank: 0\n"),
    (
        "not_oom",
        f'{TRACE}  File "a.py", line 2, in f\n    raise_if("CUDA error: out of memory")\nNameError: raise_if\n',
    ),
    ("not_oom", f'{TRACE}│ 12 │ if "CUDA error: out of memory" in text: │\nNameError: text\n'),
]


@pytest.mark.parametrize(("wanted", "text"), CHAINS)
def test_the_root_of_the_last_error_decides(wanted: str, text: str) -> None:
    assert classify_text(text).verdict.value == wanted


def test_a_handled_lack_of_memory_is_mentioned() -> None:
    text = f"{TRACE}{OOM}\nretrying with batch size 2\nstep 3\n{TRACE}ValueError: no eval set\n"
    assert any("earlier" in line and "CUDA out of memory" in line for line in classify_text(text).evidence)


def test_pinning_host_memory_leaves_a_bare_cuda_error_open() -> None:
    bare = "torch.AcceleratorError: CUDA error: out of memory"
    pinned = f'{TRACE}  File "a.py", line 3, in g\n    batch = batch.pin_memory()\n{bare}\n'
    assert classify_text(bare).verdict is Verdict.DEVICE_OOM
    assert classify_text(pinned).verdict is Verdict.AMBIGUOUS


# --- What the numbers add


def test_a_request_beyond_any_device_is_a_bug_in_shape() -> None:
    judgement = classify_text("CUDA out of memory. Tried to allocate more than 1EB memory")
    assert judgement.verdict is Verdict.DEVICE_OOM
    assert "smaller batch cannot help" in judgement.action


def test_a_request_above_the_card_is_not_blamed_on_the_batch_alone() -> None:
    text = next(text for _, text in MESSAGES if "total capacity of 15.24 GiB" in text)
    judgement = classify_text(text)
    assert "cannot be counted on" in judgement.action
    assert any("larger than the device" in line for line in judgement.evidence)


def test_another_tenant_of_the_card_is_seen() -> None:
    text = next(text for _, text in MESSAGES if "649.97 MiB already allocated" in text)
    judgement = classify_text(text)
    assert any("another process holds it" in line for line in judgement.evidence)
    assert "other process" in judgement.action


def test_allocated_above_capacity_tells_of_a_spill() -> None:
    text = next(text for _, text in MESSAGES if "17.20 GiB already allocated" in text)
    assert any("spilled into system memory" in line for line in classify_text(text).evidence)


# --- Exit codes and targets


@pytest.mark.parametrize(
    ("text", "exit_code", "wanted"),
    [
        ("", 0, "not_oom"),
        ("", None, "ambiguous"),
        ("", 1, "ambiguous"),
        ("", -9, "ambiguous"),
        ("step 3 loss 1.2", 137, "ambiguous"),
        ("step 3 loss 1.2", 1, "ambiguous"),
        ("step 3 loss 1.2", 0, "not_oom"),
        ("step 3 loss 1.2", None, "not_oom"),
        ("ValueError: x", 1, "not_oom"),
        ("ValueError: x", 137, "ambiguous"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=3.0.", 137, "host_oom"),
        ("step 3 loss 1.2", 139, "not_oom"),
        ("step 3 loss 1.2", -7, "ambiguous"),
        ("step 3 loss 1.2", 130, "interrupted"),
        (OOM, 1, "device_oom"),
        (OOM, 0, "device_oom"),
        (OOM + "\nstep" * 30, 0, "not_oom"),
    ],
)
def test_the_exit_code_is_weighed_with_the_text(text: str, exit_code: int | None, wanted: str) -> None:
    judgement = classify_text(text, exit_code=exit_code)
    assert judgement.verdict.value == wanted
    assert exit_code is None or any(f"exit code {exit_code}" in line for line in judgement.evidence)


def test_on_a_cpu_target_its_own_allocations_are_device_memory() -> None:
    text = "RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
    killed = "Out of memory: Killed process 12 (python)"
    assert classify_text(text).verdict is Verdict.HOST_OOM
    assert classify_text(text, target="cuda").verdict is Verdict.HOST_OOM
    assert classify_text(text, target="cpu").verdict is Verdict.DEVICE_OOM
    assert classify_text(killed, target="cpu").verdict is Verdict.HOST_OOM


# --- Size and safety


@pytest.mark.parametrize(
    "piece",
    [
        "step 100 loss 2.31 memory 21.4 GiB, to avoid 12% if may error: x\n",
        "x",
        " ",
        "\n",
        "oom ",
        "out of ",
        "error: cuda ",
        "failed to allocate 1.1 ",
        "a.",
        "[",
        "oom when allocating tensor ",
        f"{TRACE}ValueError: x\n",
    ],
)
def test_a_long_log_is_judged_in_a_moment(piece: str) -> None:
    text = piece * (50_000_000 // len(piece))
    began = time.perf_counter()
    classify_text(text)
    assert time.perf_counter() - began < 2


def test_the_end_of_a_long_log_decides() -> None:
    noise = "step 100 loss 2.31\n" * 200_000
    assert classify_text(f"{noise}{OOM}\n").verdict is Verdict.DEVICE_OOM
    assert classify_text(f"ImportError: early\n{noise}{OOM}\n").verdict is Verdict.DEVICE_OOM


@given(st.text(max_size=400))
@settings(max_examples=100, deadline=None)
def test_any_text_gets_a_verdict_and_an_action(text: str) -> None:
    judgement = classify_text(text + "\nİ" + OOM)
    assert judgement.evidence
    assert judgement.action


@given(st.text(alphabet="abcdefgh .:\n0123456789", max_size=300))
@settings(max_examples=100, deadline=None)
def test_noise_is_never_out_of_memory(text: str) -> None:
    assert classify_text(text).verdict not in (Verdict.DEVICE_OOM, Verdict.HOST_OOM)


def test_every_kind_has_a_verdict_and_every_rule_a_name() -> None:
    assert set(KIND_VERDICT) == set(Kind)
    assert all(rule.name for rule in RULES)
