"""Predicted beside measured: the table of configs, errors and bars by hand, and a rehearsal on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotune.values import GIB, Attention, Device, Isolation, Prediction, ProbeReport, Trainer, Verdict
from autotune.workload.models import resolve_model
from benchmarks import gpu_memory
from benchmarks.gpu_memory import Row
from tests.tiny import CONFIG, a_config

PREDICTION = Prediction(
    peak_allocated_bytes=12 * GIB,
    training_peak_allocated_bytes=10 * GIB,
    peak_reserved_bytes=15 * GIB,
    device_used_bytes=16 * GIB,
    step_time_s=2.0,
)
REPORT = ProbeReport(
    peak_allocated_bytes=8 * GIB,
    peak_reserved_bytes=12 * GIB,
    device_used_bytes=20 * GIB,
    micro_batch_times_s=(1.0,),
    optimizer_times_s=(0.5,),
)


def a_row(number: int = 0, seconds: tuple[float, float] = (1.0, 1.0), **errors: float) -> Row:
    """One that fits; `seconds`: predicted and measured; errors in % by measure."""
    return Row(
        model="tiny",
        number=number,
        config=a_config(),
        isolation=Isolation.WARM,
        prediction=replace(PREDICTION, step_time_s=seconds[0]),
        verdict=Verdict.FITS,
        step_time_s=seconds[1],
        errors={name.replace("_", " "): value for name, value in errors.items()},
    )


# Configs


def test_table_crosses_the_settings_over_three_models() -> None:
    found = gpu_memory.configs("bfloat16", {"trl"})  # each made, so each legal
    models = gpu_memory.MODELS.split(",")
    assert len(models) == 3
    assert len(found) >= 22
    assert len(found) * len(models) >= 60
    assert len(set(found)) == len(found)
    for name, values in {
        "sequence_length": {512, 1024, 2048, 4096},
        "micro_batch_size": {1, 2, 4},
        "gradient_checkpointing": {"off", "full", "every_2"},
        "loss": {"full", "chunked"},
        "attention": {"sdpa", "eager"},
        "upcast": {"none", "fp32"},
        "quantization": {"nf4", "none"},
    }.items():
        assert {getattr(config, name) for config in found} == values, name
        assert {getattr(config, name) for config in found[:10]} == values, f"early: {name}"
    assert sum(config.optimizer == "adamw_8bit" for config in found) == 1
    assert sum(config.trainer is Trainer.TRL for config in found) == 1


def test_every_model_has_the_positions_that_the_table_asks_for() -> None:
    longest = max(config.sequence_length for config in gpu_memory.configs("float16", ()))
    assert all((resolve_model(name).max_positions or 0) >= longest for name in gpu_memory.MODELS.split(","))


def test_rows_that_need_a_missing_package_are_left_out() -> None:
    with_all = gpu_memory.configs("bfloat16", {"trl", "flash_attn"})
    with_none = gpu_memory.configs("bfloat16", ())
    assert sum(config.attention is Attention.FLASH_ATTENTION_2 for config in with_all) == 3
    assert len(with_all) == len(with_none) + 4


def test_every_fifth_worker_is_fresh_and_those_rows_are_the_ones_that_need_another_worker() -> None:
    found = gpu_memory.configs("bfloat16", {"trl"})
    fresh = [n for n in range(len(found)) if gpu_memory.isolation_of(n) is Isolation.FRESH]
    assert fresh == [4, 9, 14, 19, 24]
    other = {n for n, c in enumerate(found) if c.quantization == "none" or c.trainer is Trainer.TRL}
    assert other == {4, 9, 24}  # the others are plain QLoRA, whose reserved memory matters most


# Errors


def test_allocated_is_compared_with_training_alone() -> None:
    found = gpu_memory.errors_of(PREDICTION, replace(REPORT, isolation=Isolation.WARM), 1.6, on_gpu=True)
    assert found == pytest.approx({"allocated": 25.0, "step time": 25.0})


@pytest.mark.parametrize(("on_gpu", "names"), [(True, {"reserved", "process"}), (False, set())])
def test_reserved_and_process_count_in_a_fresh_worker_of_a_gpu_alone(on_gpu: bool, names: set[str]) -> None:
    found = gpu_memory.errors_of(PREDICTION, REPORT, None, on_gpu=on_gpu)
    assert set(found) == {"allocated"} | names
    if on_gpu:
        assert (found["reserved"], found["process"]) == pytest.approx((25.0, -20.0))


def test_what_one_side_does_not_know_has_no_error() -> None:
    unknown = replace(PREDICTION, step_time_s=None, training_peak_allocated_bytes=None)
    assert gpu_memory.errors_of(unknown, ProbeReport(), 1.0, on_gpu=True) == {}


def test_means_and_worst_are_of_absolute_errors_by_measure() -> None:
    rows = [a_row(allocated=-0.3, reserved=4.0), a_row(allocated=0.1), replace(a_row(), skipped="no", verdict=None)]
    assert gpu_memory.summary(rows) == {
        "tiny": {
            "allocated": {"rows": 2, "mean": pytest.approx(0.2), "worst": pytest.approx(0.3)},
            "reserved": {"rows": 1, "mean": 4.0, "worst": 4.0},
        }
    }


@pytest.mark.parametrize(
    ("errors", "passed"),
    [
        ([{"allocated": 0.4}], [True]),
        ([{"allocated": 0.5}], [False]),
        ([{"allocated": 0.1}] * 9 + [{"allocated": -2.1}], [False]),
        ([{"allocated": 0.1}] * 9 + [{"allocated": -2.0}], [True]),
        ([{"reserved": 3.0, "process": -3.1}], [True, False]),
        ([{"step_time": 50.0}], []),
    ],
)
def test_bars_hold_at_their_bounds_and_not_past_them(errors: list[dict[str, float]], passed: list[bool]) -> None:
    rows = [a_row(**one) for one in errors]
    assert [bar.passed for bar in gpu_memory.bars_of(rows)] == passed
    lines = gpu_memory.bar_lines(rows, "Example 24")
    assert [line[:4] for line in lines[: len(passed)]] == ["pass" if one else "FAIL" for one in passed]


def test_ranks_compare_predicted_with_measured_speed() -> None:
    rows = [a_row(n, (n, 2 * n)) for n in range(1, 6)]
    (alike,) = gpu_memory.ranks_of(rows, "Example 24")
    (opposite,) = gpu_memory.ranks_of([a_row(n, (n, 9 - n)) for n in range(1, 6)], "Example 24")
    assert (alike.spearman, opposite.spearman) == pytest.approx((1.0, -1.0))
    assert alike.speeds[0].published == pytest.approx(a_config().tokens_per_step / 2)
    few = gpu_memory.bar_lines(rows[:4], "Example 24")
    assert "too few to rank" in few[-1]


@pytest.mark.parametrize(
    ("history", "passed"),
    [(None, True), ({"passed": True}, True), ({"passed": False}, False), ({"failed": "x"}, False)],
)
def test_run_passes_where_every_bar_does_and_there_is_one(history: dict[str, Any] | None, passed: bool) -> None:
    assert gpu_memory.is_passed([a_row(allocated=0.1)], "Example 24", history) is passed
    assert not gpu_memory.is_passed([], "Example 24", None)


def test_models_share_what_is_left_of_the_budget() -> None:
    spent = gpu_memory._share(0.0, 3)
    ample = gpu_memory._share(1e12, 3)
    assert spent()
    assert not ample()


def test_history_that_cannot_be_recorded_is_told_and_ends_nothing(tmp_path: Path) -> None:
    cpu = Device(kind="cpu", index=None, name="Example CPU", total_bytes=8 * GIB)
    bench = gpu_memory.open_bench(cpu, None, tmp_path, lambda: False)
    found = gpu_memory.history_of("meta-llama/Llama-3.2-1B", a_config(), bench, tmp_path / "history.gz")
    assert found["failed"].startswith("Error: no GPU is visible here")
    assert found["config"]["sequence_length"] == 64
    assert "FAIL  allocator history: Error" in gpu_memory.report([a_row()], "Example 24", found, on_gpu=True)


# The command


def test_without_a_gpu_it_exits_4_with_one_line() -> None:
    done = CliRunner().invoke(gpu_memory.command, [], env={"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""})
    assert done.exit_code == 4
    assert done.stderr.startswith("Error: no GPU is visible here")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**CONFIG, "max_position_embeddings": 1024}))
    return path


def rehearse(model: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What it prints, and its record."""
    output = model.parent / "results"
    asked = ["--gpu", "cpu", "--models", str(model), "--memory-limit", "2GiB", "--output", str(output), *options]
    done = CliRunner().invoke(gpu_memory.command, asked)
    assert done.exit_code == 0, done.output
    (path,) = output.iterdir() if output.exists() and any(output.iterdir()) else (None,)
    return done.output, json.loads(path.read_text()) if path else {}


def test_no_time_is_no_probe(model: Path) -> None:
    said, record = rehearse(model, "--budget-s", "0")
    assert "--budget-s is spent after 0 of" in said
    assert record == {}


@pytest.mark.slow
def test_rehearsal_measures_predicts_and_keeps_every_row(model: Path) -> None:
    said, record = rehearse(model, "--limit-configs", "2")
    first, second = record["rows"]
    assert first["verdict"] == "fits"
    assert first["prediction"]["training_peak_allocated_bytes"] > 0
    assert first["measured"]["peak_allocated_bytes"] > 0
    assert len(first["measured"]["micro_batch_times_s"]) >= 1
    assert set(first["errors"]) == {"allocated"}
    assert abs(first["errors"]["allocated"]) < 2
    assert "1,024 positions" in second["skipped"]
    assert record["schema"] == "autotune.gpu_memory/1"
    assert record["history"] is None
    assert "no bars" in said
    assert str(model.parent) not in json.dumps(record)
