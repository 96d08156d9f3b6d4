"""The benchmarks: their arithmetic on given samples, and each whole command once on the CPU with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from autotune.errors import InvalidRequest
from autotune.values import GIB, MIB, Device
from benchmarks import gpu_fit, probe_cost, records
from benchmarks.gpu_fit import Limit, LimitResult
from benchmarks.probe_cost import FRESH, LOAD, WARM, WARM_FIRST, Sample

ROOT = Path(__file__).parent.parent
CPU = Device(kind="cpu", index=None, name="Example CPU @ 3.00GHz", total_bytes=8 * GIB)
GPU = Device(kind="cuda", index=0, name="NVIDIA Example 24", uuid="GPU-1", total_bytes=24 * GIB, free_bytes=23 * GIB)
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def samples(**overheads: list[float]) -> list[Sample]:
    return [
        Sample(way=way, round=n, first_step_s=s + 2, wall_time_s=s + 2.5, overhead_s=s, phases_s={})
        for way, seconds in overheads.items()
        for n, s in enumerate(seconds)
    ]


QUIET = samples(**{WARM_FIRST: [6.0], WARM: [0.4, 0.5, 0.9], FRESH: [6.0, 7.0, 8.0], LOAD: [10.0, 12.0]})


# Records


def test_shareable_text_has_no_root_and_no_other_process() -> None:
    data = {"log": "at /home/someone/venv/x.py", "tenants": [{"pid": 7, "name": "/home/b/game", "used_bytes": 5}]}
    kept = records.shareable({"trials": [data]}, ["/home/someone/venv", "/home/someone"])
    assert kept == {"trials": [{"log": "at …/x.py", "tenants": [{"used_bytes": 5}]}]}


def test_roots_put_the_inner_folder_first_and_leave_out_the_root_of_all() -> None:
    roots = records.private_roots(Path("/"))
    assert "/" not in roots
    assert str(ROOT) in roots
    assert roots.index(str(Path(sys.prefix).absolute())) <= roots.index(str(ROOT))


def test_circumstances_keep_no_local_identity() -> None:
    known = records.circumstances(GPU)
    assert "GPU-1" not in json.dumps(known)
    assert known["device"]["name"] == GPU.name
    assert known["environment"]["torch"]


def test_second_record_of_a_day_gets_its_own_file(tmp_path: Path) -> None:
    first = records.record_path(tmp_path / "new", "gpu_fit", GPU, "2026-01-02")
    records.write_record(first, {"a": 1})
    second = records.record_path(tmp_path / "new", "gpu_fit", GPU, "2026-01-02")
    assert first.name == "gpu_fit-2026-01-02-nvidia-example-24-24gib.json"
    assert second.name == "gpu_fit-2026-01-02-nvidia-example-24-24gib-2.json"
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_record_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    records.write_record(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        records.write_record(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_table_aligns_names_left_and_numbers_right() -> None:
    assert records.plain_table([("way", "s"), ("a", "10.0")]) == "way     s\na    10.0"


# probe_cost


def test_summary_holds_medians_and_ratios_to_a_later_warm_probe() -> None:
    facts = probe_cost.summary(QUIET)
    assert facts[WARM]["overhead_s"] == {"median": 0.5, "min": 0.4, "max": 0.9}
    assert facts[FRESH]["overhead_to_warm"] == pytest.approx(14)
    assert facts[LOAD]["first_step_to_warm"] == pytest.approx(13 / 2.5)
    assert facts[WARM_FIRST]["samples"] == 1


@pytest.mark.parametrize(
    ("warm", "fresh", "held"),
    [(0.5, 7.0, [True, True]), (1.0, 10.0, [True, True]), (1.1, 20.0, [False, True]), (0.9, 8.0, [True, False])],
)
def test_bars_are_held_at_their_bounds_and_not_past_them(warm: float, fresh: float, held: list[bool]) -> None:
    measured = samples(**{WARM_FIRST: [7.0], WARM: [warm], FRESH: [fresh], LOAD: [9.0]})
    bars = probe_cost.bars_of(measured, CPU)
    assert [bar.held for bar in bars] == held
    assert [line[:4] for line in probe_cost.report(measured, bars).splitlines()[-2:]] == [
        "pass" if one else "FAIL" for one in held
    ]


def test_seconds_of_a_warm_probe_are_a_bar_on_the_cpu_alone() -> None:
    assert len(probe_cost.bars_of(QUIET, CPU)) == 2
    assert [bar.bound for bar in probe_cost.bars_of(QUIET, GPU)] == [probe_cost.MIN_FRESH_TO_WARM]


@pytest.mark.slow
def test_probe_cost_measures_every_way_and_keeps_raw_samples(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "results"
    options = ["--model", str(model), "--sequence-length", "64", "--rounds", "1", "--output", str(output)]
    done = CliRunner().invoke(probe_cost.command, options)
    assert done.exit_code == 0, done.output
    assert all(words in done.stdout for words in probe_cost.WORDS.values())
    (path,) = output.iterdir()
    record = json.loads(path.read_text())
    assert record["schema"] == "autotune.probe_cost/1"
    assert [sample["way"] for sample in record["samples"]] == [WARM_FIRST, WARM, WARM, FRESH, LOAD]
    assert all(0 < s["overhead_s"] < s["wall_time_s"] for s in record["samples"])
    assert all(0 < s["first_step_s"] <= s["wall_time_s"] + 0.5 for s in record["samples"])
    assert record["summary"][FRESH]["overhead_to_warm"] > 1
    assert str(tmp_path) not in path.read_text()
    assert str(ROOT) not in path.read_text()


def test_sequence_longer_than_the_model_allows_ends_in_one_line(model: Path) -> None:
    done = CliRunner().invoke(probe_cost.command, ["--model", str(model), "--sequence-length", "513"])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: sequence length 513 is above the 512 positions")


# gpu_fit


def trial(wall_s: float, *optimizer_s: float) -> dict[str, Any]:
    return {"report": {"wall_time_s": wall_s, "optimizer_times_s": list(optimizer_s), "startup_s": wall_s / 2}}


@pytest.mark.parametrize(
    ("trials", "seconds"),
    [
        ([], None),
        ([trial(9.0)], None),
        ([trial(9.0, 0.1)], 30.0),
        ([trial(9.0), trial(3.0, 0.1), trial(4.0, 0.1), trial(8.0, 0.1, 0.1)], 18.0),
    ],
)
def test_first_step_leaves_out_only_the_probes_after_it(trials: list[dict[str, Any]], seconds: float | None) -> None:
    assert gpu_fit.first_step_s(trials, 30.0) == seconds


def test_limits_are_sizes_or_the_whole_card() -> None:
    assert gpu_fit.parse_limits("12GiB, card") == [
        Limit(text="12GiB", memory_limit_bytes=12 * GIB),
        Limit(text="card", memory_limit_bytes=None),
    ]


@pytest.mark.parametrize("text", ["", "12 parsecs", "card,-1GiB"])
def test_limits_that_are_no_sizes_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        gpu_fit.parse_limits(text)


@pytest.mark.parametrize(("text", "out_of_time", "why"), [("25GiB", False, "more than"), ("8GiB", True, "--budget-s")])
def test_limit_above_the_card_or_past_the_budget_is_skipped(
    text: str, out_of_time: bool, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (limit,) = gpu_fit.parse_limits(text)
    result = gpu_fit.run_limit(limit, [], GPU, out_of_time=out_of_time)
    assert result.exit_code is None
    assert why in (result.skipped or "")
    assert capsys.readouterr().err.startswith(f"Skipped {text}: ")


def test_nothing_fits_is_a_result_and_a_failure_keeps_its_last_line() -> None:
    limit = Limit(text="8GiB", memory_limit_bytes=8 * GIB)
    probes = {"count": 1, "out_of_memory": 1, "wall_time_s": 9.5}
    document = {"status": "nothing_fits", "config": None, "measured": None, "trials": [trial(9.0)], "probes": probes}
    nothing = gpu_fit.result_of(limit, 3, 12.0, json.dumps(document), "Error: nothing fits")
    failed = gpu_fit.result_of(limit, 1, 3.0, "", "Error: no")
    assert (nothing.status, nothing.out_of_memory, nothing.tokens_per_second) == ("nothing_fits", 1, None)
    assert (failed.status, failed.last_line) == (None, "Error: no")
    assert "nothing_fits" in gpu_fit.table([nothing, failed])


@pytest.mark.parametrize(
    ("codes", "exits"), [([0, 3, None], 0), ([None], 0), ([0, 1, 0], 1), ([2], 1), ([0, 4], 4), ([1, 130], 130)]
)
def test_exit_code_is_of_what_failed(codes: list[int | None], exits: int) -> None:
    results = [LimitResult(limit="x", memory_limit_bytes=None, exit_code=code) for code in codes]
    assert gpu_fit.exit_code(results) == exits


def test_without_a_gpu_it_exits_4_with_one_line() -> None:
    done = CliRunner().invoke(gpu_fit.command, [], env={"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""})
    assert done.exit_code == 4
    assert done.stderr.startswith("Error: no GPU is visible here")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_gpu_fit_keeps_the_document_of_every_limit(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "results"
    options = ["--gpu", "cpu", "--limits", "600MiB,100TiB", "--model", str(model), "--sequence-length", "64"]
    done = CliRunner().invoke(gpu_fit.command, [*options, "--effective-batch-size", "2", "--output", str(output)])
    assert done.exit_code == 0, done.output
    (path,) = output.iterdir()
    record = json.loads(path.read_text())
    fitted, skipped = record["limits"]
    assert fitted["fit"]["schema"] == "autotune.fit/1"
    assert fitted["fit"]["request"]["memory_limit_bytes"] == 600 * MIB
    assert fitted["config"] == fitted["fit"]["config"]
    assert fitted["probes"] == len(fitted["fit"]["trials"]) > 1
    assert 0 < fitted["first_startup_s"] < fitted["first_step_s"] < fitted["total_s"]
    assert fitted["tokens_per_second"] > 0
    assert "100TiB is more than" in skipped["skipped"]
    assert "600MiB" in done.stdout
    assert "fitted" in done.stdout
    assert str(tmp_path) not in path.read_text()
    assert str(ROOT) not in path.read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_interrupted_fit_is_passed_on_and_what_was_there_is_kept(model: Path, tmp_path: Path) -> None:
    options = ["--gpu", "cpu", "--limits", "600MiB,500MiB", "--model", str(model), "--sequence-length", "64"]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_fit", *options, "--output", str(tmp_path / "results")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stderr is not None
        said = ""
        while "Fitting" not in said:
            said = process.stderr.readline()
            assert said, "it ended before it began"
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) == 130
    (path,) = (tmp_path / "results").iterdir()
    assert [result["exit_code"] for result in json.loads(path.read_text())["limits"]] == [130]


@pytest.mark.parametrize("command", [probe_cost.command, gpu_fit.command])
def test_benchmark_help_has_an_example(command: click.Command) -> None:
    done = CliRunner().invoke(command, ["--help"])
    assert done.exit_code == 0
    assert "Example:\n    python -m benchmarks." in done.output


def test_every_command_has_its_row_and_its_paragraph() -> None:
    folder = ROOT / "benchmarks"
    told = (folder / "README.md").read_text(encoding="utf-8")
    commands = {path.stem for path in folder.glob("*.py") if 'if __name__ == "__main__"' in path.read_text("utf-8")}
    started = {"user_script", "stand_in", "fault_trainer", "overhead_trainer", "gpu_run_trainer"}  # by other benchmarks
    for name in commands - started:
        assert f"| `python -m benchmarks.{name}` |" in told
        assert f"\n## {name}\n" in told
