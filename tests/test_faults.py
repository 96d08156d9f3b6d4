"""The fault table's own parts: a stand-in that shows every lost step, checks that see every wrong recovery."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.recover.checkpoints import newest_complete
from autotune.recover.facts import Checkpoint
from benchmarks.fault_check import Truth, final_state, recoveries_s, repeated, steps_lost, wrong_recoveries
from benchmarks.fault_checkpoint import read_checkpoint
from benchmarks.fault_inject import FAULTS_VARIABLE, MIB, Fault, Law, Spec, Strike
from benchmarks.fault_ledger import FIRST_STATE, Ledger, Task, advance, of, rate_at, read_ledger
from benchmarks.fault_list import Case, cases, make
from benchmarks.fault_run import ROOT, Play

TASK = Task(samples=64, max_steps=12, effective_batch=8)
Entry = dict[str, Any]


def stand_in(folder: Path, *words: str, spec: Spec | None = None, micro: int = 4) -> subprocess.CompletedProcess[str]:
    """One attempt in `folder`."""
    spec = replace(spec or Spec(folder=""), folder=str(folder), step_s=0.0)
    (folder / "spec.json").write_text(spec.to_json(), encoding="utf-8")
    batch = ["--per_device_train_batch_size", str(micro), "--gradient_accumulation_steps", str(8 // micro)]
    command = [sys.executable, "-m", "benchmarks.stand_in", "--output_dir", str(folder / "out"), *batch]
    environment = {**os.environ, FAULTS_VARIABLE: str(folder / "spec.json")}
    return subprocess.run(
        [*command, "--max_steps", "12", "--save_steps", "4", *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_undisturbed_stand_in_comes_to_the_state_that_its_task_says(tmp_path: Path) -> None:
    assert stand_in(tmp_path).returncode == 0
    assert final_state(read_ledger(tmp_path)) == TASK.final_state()


@pytest.mark.parametrize("micro", [1, 8])
def test_a_resumed_stand_in_comes_to_the_same_state_whatever_its_micro_batch(tmp_path: Path, micro: int) -> None:
    killed = stand_in(tmp_path, spec=Spec(folder="", strikes=(Strike(Fault.KILL_TRAINER, 7),)))
    assert killed.returncode == -signal.SIGKILL
    stand_in(tmp_path, "--resume_from_checkpoint", "True", micro=micro)
    entries = read_ledger(tmp_path)
    assert final_state(entries) == TASK.final_state()
    assert [entry["step"] for entry in of(entries, "begin")] == [0, 4]
    assert repeated(entries) == 2


def test_before_transformers_5_2_a_smaller_micro_batch_on_resume_trains_something_else(tmp_path: Path) -> None:
    stand_in(tmp_path, spec=Spec(folder="", strikes=(Strike(Fault.KILL_TRAINER, 7),)))
    stand_in(tmp_path, "--resume_from_checkpoint", "True", micro=1, spec=Spec(folder="", legacy=True))
    assert "attempt 2: effective batch 32" in wrong_recoveries(read_ledger(tmp_path), 8)


@pytest.mark.parametrize(
    "history",
    [
        [1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        [1, 2, 4, 3, 5, 6, 7, 8, 9, 10, 11, 12],
    ],
    ids=["repeated", "skipped", "swapped"],
)
def test_a_history_with_a_wrong_step_ends_in_another_state(history: list[int]) -> None:
    state = FIRST_STATE
    for step in history:
        state = advance(state, step, TASK.order[step - 1], rate_at(step, TASK.max_steps))
    assert state != TASK.final_state()


def test_samples_in_another_order_and_another_schedule_end_in_another_state() -> None:
    assert advance(FIRST_STATE, 1, [1, 2], 1e-4) != advance(FIRST_STATE, 1, [2, 1], 1e-4)
    assert rate_at(5, 12) != rate_at(5, 24)


def test_every_sample_of_an_epoch_comes_once() -> None:
    assert sorted(sample for step in TASK.order[:8] for sample in step) == list(range(64))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_the_stand_in_refuses_a_truncated_checkpoint(tmp_path: Path, name: str) -> None:
    stand_in(tmp_path)
    path = tmp_path / "out" / "checkpoint-4" / name
    assert read_checkpoint(path.parent).step == 4
    os.truncate(path, path.stat().st_size // 2)
    resumed = stand_in(tmp_path, "--resume_from_checkpoint", str(path.parent))
    assert resumed.returncode == 1
    assert len(of(read_ledger(tmp_path), "begin")) == 1


@pytest.mark.parametrize("kind", [Fault.TRUNCATED, Fault.INCOMPLETE, Fault.GARBAGE])
@pytest.mark.parametrize("step", [8, 12])
def test_the_newest_complete_checkpoint_is_the_one_before_a_damaged_one(tmp_path: Path, kind: Fault, step: int) -> None:
    stand_in(tmp_path, spec=Spec(folder="", strikes=(Strike(kind, step),)))
    assert [entry["step"] for entry in of(read_ledger(tmp_path), "damaged")] == [step]
    found = newest_complete(tmp_path / "out")
    assert found is not None
    assert found.step == step - 4


def test_a_checkpoint_of_the_stand_in_is_as_complete_as_a_trainers(tmp_path: Path) -> None:
    stand_in(tmp_path)
    found = newest_complete(tmp_path / "out", max_steps=12)
    assert found == Checkpoint(path=tmp_path / "out" / "checkpoint-12", step=12)


def test_the_stand_in_dies_with_torchs_words_where_its_law_says_so(tmp_path: Path) -> None:
    law = Law(fixed_bytes=MIB, token_bytes=MIB, capacity_bytes=300 * MIB)
    died = stand_in(tmp_path, spec=Spec(folder="", law=law, tokens=64, long_tokens=256, long_step=6))
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1024.00 MiB" in died.stderr
    assert [(entry["fault"], entry["step"]) for entry in of(read_ledger(tmp_path), "fault")] == [
        (Fault.OOM_MID_EPOCH, 6)
    ]


def test_a_full_disk_is_the_kernels_own(tmp_path: Path) -> None:
    died = stand_in(tmp_path, spec=Spec(folder="", strikes=(Strike(Fault.DISK_FULL, 8),)))
    assert "OSError: [Errno 28] No space left on device" in died.stderr
    assert [entry["step"] for entry in of(read_ledger(tmp_path), "checkpoint")] == [4]


def test_the_stand_in_starts_without_torch() -> None:
    asked = "import sys, benchmarks.stand_in; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", asked], cwd=ROOT, text=True).strip() == "[]"


def test_a_line_that_a_kill_cut_short_is_none(tmp_path: Path) -> None:
    Ledger(tmp_path).write("start")
    with (tmp_path / "ledger.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "st')
    assert [entry["event"] for entry in read_ledger(tmp_path)] == ["start"]


def test_steps_are_lost_where_a_complete_checkpoint_held_them() -> None:
    saved = [{"event": "begin", "step": 0}, {"event": "checkpoint", "step": 4}, {"event": "checkpoint", "step": 8}]
    assert steps_lost([*saved, {"event": "begin", "step": 8}]) == 0
    assert steps_lost([*saved, {"event": "begin", "step": 4}]) == 4
    assert steps_lost([*saved, {"event": "damaged", "step": 8}, {"event": "begin", "step": 4}]) == 0
    assert steps_lost([*saved, {"event": "begin", "step": 0}]) == 8


def _attempts(cause: Fault, launches: tuple[str, str] = ("1", "1"), **after: Any) -> list[Entry]:
    """Two attempts of a ledger, `after` what the second one changed."""
    config = {"micro": 4, "accumulation": 2, "evaluation": 8, "workers": 2, "checkpointing": False, "optimizer": "a"}
    return [
        {"event": "start", "attempt": 1, "launch": launches[0], **config},
        {"event": "fault", "attempt": 1, "fault": cause},
        {"event": "start", "attempt": 2, "launch": launches[1], **config, **after},
    ]


@pytest.mark.parametrize(
    ("cause", "after", "is_right"),
    [
        (Fault.OOM_MID_EPOCH, {"micro": 2, "accumulation": 4}, True),
        (Fault.OOM_MID_EPOCH, {"checkpointing": True}, True),
        (Fault.OOM_MID_EPOCH, {}, False),
        (Fault.OOM_EVALUATION, {"evaluation": 4}, True),
        (Fault.OOM_EVALUATION, {"micro": 2, "accumulation": 4}, False),
        (Fault.OOM_EVALUATION, {}, False),
        (Fault.HOST_OOM, {"workers": 0}, True),
        (Fault.HOST_OOM, {"micro": 2, "accumulation": 4, "workers": 0}, False),
        (Fault.KILL_TRAINER, {}, True),
        (Fault.KILL_TRAINER, {"micro": 2, "accumulation": 4}, False),
        (Fault.HANG, {"evaluation": 4}, False),
        (Fault.BUG, {}, False),
    ],
)
def test_a_wrong_recovery_is_seen(cause: Fault, after: dict[str, Any], is_right: bool) -> None:
    assert (wrong_recoveries(_attempts(cause, **after), 8) == []) is is_right


def test_a_mended_bug_may_be_started_again_by_its_user() -> None:
    assert wrong_recoveries(_attempts(Fault.BUG, launches=("1", "2")), 8) == []


def test_a_trainer_that_runs_beside_its_successor_is_seen() -> None:
    entries = [*_attempts(Fault.KILL_TRAINER), {"event": "step", "attempt": 1}]
    assert wrong_recoveries(entries, 8) == ["attempt 1 still ran beside attempt 2"]


def test_recovery_counts_from_the_last_sign_of_life_or_the_next_launch() -> None:
    entries = [
        {"event": "start", "attempt": 1, "clock": 10.0},
        {"event": "step", "attempt": 1, "clock": 11.0},
        {"event": "start", "attempt": 2, "clock": 13.0},
        {"event": "step", "attempt": 2, "clock": 14.0},
    ]
    assert recoveries_s(entries, [9.0]) == [3.0]
    assert recoveries_s(entries, [9.0, 12.0]) == [2.0]


def test_the_same_seed_makes_the_same_cases_and_every_fault_is_among_them() -> None:
    first, again = list(cases(0, 300, 40)), list(cases(0, 300, 40))
    assert first == again
    assert {case.kind for case in first} == set(Fault)
    assert sum(case.real for case in first) == 40
    assert first != list(cases(1, 300, 40))


@pytest.mark.parametrize("kind", [Fault.OOM_FIRST_STEP, Fault.OOM_MID_EPOCH, Fault.OOM_EVALUATION])
@pytest.mark.parametrize("real", [False, True])
def test_a_drawn_memory_law_has_a_config_that_fits_and_starts_with_one_that_does_not(kind: Fault, real: bool) -> None:
    for seed in range(50):
        case = make(0, kind, random.Random(seed), real=real)
        own = (1400 if real else 20) * MIB  # at least, before any micro batch
        assert all(need + own <= case.limit_bytes for need in _needs(case, micro=1, evaluation=1))
        assert any(need + own > case.limit_bytes for need in _needs(case, micro=case.micro, evaluation=case.evaluation))


def _needs(case: Case, *, micro: int, evaluation: int) -> list[int]:
    spec = case.spec
    return [
        spec.law.need(micro, spec.tokens),
        spec.law.need(micro, spec.long_tokens),
        spec.law.need(evaluation, spec.eval_tokens),
    ]


def test_a_case_survives_the_way_to_disk_and_back() -> None:
    case = make(3, Fault.CLOCK_JUMP, random.Random(1))
    assert json.loads(json.dumps(case.to_json()))["kind"] == "clock jump"


def test_a_real_runs_truth_is_its_losses_and_weights_too() -> None:
    steps = [
        {"event": "step", "step": 1, "loss": 2.0, "ids": [1]},
        {"event": "step", "step": 2, "loss": 1.0, "ids": [2]},
    ]
    end = {"event": "end", "state": "a", "weights": [3.0]}
    truth = Truth.of_run([*steps, end])
    assert truth.is_that_of([*steps, end])
    assert not truth.is_that_of([*steps, {**end, "weights": [3.1]}])
    assert not truth.is_that_of([steps[0], {**steps[1], "loss": 1.01}, end])
    assert not truth.is_that_of(steps)


def test_a_deaf_trainer_outlives_sigterm(tmp_path: Path) -> None:
    spec = Spec(folder=str(tmp_path), strikes=(Strike(Fault.HANG, 2),))
    (tmp_path / "spec.json").write_text(spec.to_json(), encoding="utf-8")
    words = ["-m", "benchmarks.stand_in", "--output_dir", str(tmp_path / "out"), "--max_steps", "4"]
    process = subprocess.Popen(
        [sys.executable, *words], env={**os.environ, FAULTS_VARIABLE: str(tmp_path / "spec.json")}, cwd=ROOT
    )
    try:
        limit = time.monotonic() + 20
        while not of(read_ledger(tmp_path), "fault") and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.1)
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "kind",
    [Fault.OOM_MID_EPOCH, Fault.OOM_EVALUATION, Fault.BUG, Fault.KILL_BOTH, Fault.TRUNCATED],
)
def test_a_disturbed_run_comes_to_what_it_comes_to_undisturbed(tmp_path: Path, kind: Fault) -> None:
    case = next(case for case in cases(0, 300, 0) if case.kind is kind and not case.daemon)
    outcome = Play(case, Truth.of_task(case.task), tmp_path / "case").run()
    assert outcome.good, outcome
