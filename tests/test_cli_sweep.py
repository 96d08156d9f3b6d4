"""`autotune sweep` as a user runs it: for real on the CPU, stopped, killed, resumed, and asked wrongly."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from autotune.cli import fit, sweep, sweep_run
from autotune.cli.fit_request import build_request
from autotune.cli.sweep_run import check_same, request_of
from autotune.errors import InvalidRequest
from autotune.hardware.cpu import read_cpu
from autotune.landscape import Header, LandscapeWriter, Row, read_begun, read_landscape
from autotune.values import MIB, Device, Environment, Origin, Verdict
from benchmarks.kill_fit import RunningFit, stored, tiny_model
from tests.fakes import a_cpu
from tests.test_cli_fit_bad_input import PROGRAM, Ended, Terminal
from tests.test_cli_fit_bad_input import terminal as terminal
from tests.test_landscape import HEADER, a_row

linux = pytest.mark.skipif(sys.platform != "linux", reason="a memory limit as Linux enforces it")
GRID = ["--set", "micro_batch_size=1,8", "--set", "gradient_checkpointing=off,full"]


def command(model: Path, output: Path, *more: str) -> list[str]:
    asked = ["--model", str(model), "--sequence-length", "256", "--effective-batch-size", "8"]
    return [*PROGRAM, "sweep", "--gpu", "cpu", *asked, "--output", str(output), *GRID, *more]


@contextmanager
def a_sweep(folder: Path, *more: str) -> Iterator[RunningFit]:
    """One at 96 MiB, in which micro batches of 8 run out of memory."""
    limited = ("--memory-limit", "96MiB", "--no-prediction", "--micro-batches", "1")
    running = RunningFit(folder / "home", command(tiny_model(folder), folder / "l.jsonl", *limited, *more))
    try:
        yield running
    finally:
        running.end()


def rows(folder: Path) -> tuple[Row, ...]:
    begun = read_begun(folder / "l.jsonl")
    return begun.rows if begun else ()


def wait_for_rows(folder: Path, running: RunningFit, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(rows(folder)) < count:
        assert running.process.poll() is None, running.errors
        assert time.monotonic() < deadline, running.errors
        time.sleep(0.02)


@linux
@pytest.mark.slow
def test_a_grid_is_measured_into_a_landscape_the_database_and_a_study(terminal: Terminal) -> None:
    output, study = terminal.folder / "l.jsonl", terminal.folder / "study.db"
    model = tiny_model(terminal.folder)
    asked = command(model, output, "--memory-limit", "96MiB", "--optuna", str(study), "--json")
    ended = terminal.run(*asked[len(PROGRAM) :])
    assert ended.code == 0, ended.err
    found = read_landscape(output)
    assert [row.config.micro_batch_size for row in found.rows] == [1, 8, 1, 8]
    assert [row.config.gradient_accumulation_steps for row in found.rows] == [8, 1, 8, 1]
    assert [row.verdict for row in found.rows] == [Verdict.FITS, Verdict.DEVICE_OOM] * 2
    for row in found.rows:
        assert row.predicted is not None
        assert row.predicted.seconds_by_kind
        assert (row.needed_bytes or 0) <= 96 * MIB
    assert found.header.fresh_start_s > max(row.startup_s for row in found.rows)
    assert (found.header.memory_limit_bytes, found.header.device.uuid) == (96 * MIB, None)
    assert str(terminal.folder) not in output.read_text(encoding="utf-8")

    document = json.loads(ended.out)
    assert (document["measured"], document["known"], document["failed"]) == (4, 0, [])
    assert document["verdicts"] == {"fits": 2, "device_oom": 2}
    trials = stored(terminal.home, read_cpu())
    assert [trial.config for trial in trials[1:]] == [row.config for row in found.rows]
    assert {trial.origin for trial in trials} == {Origin.PROBE}
    loaded = optuna.load_study(study_name="l", storage=f"sqlite:///{study}")
    assert len(loaded.trials) == 4

    again = terminal.run(*asked[len(PROGRAM) :])
    assert json.loads(again.out)["known"] == 4
    assert read_landscape(output) == found
    assert len(stored(terminal.home, read_cpu())) == len(trials)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["SIGINT", "SIGTERM", "KILL"])
def test_the_same_command_goes_on_where_a_sweep_was_stopped(tmp_path: Path, number: signal.Signals) -> None:
    with a_sweep(tmp_path) as running:
        wait_for_rows(tmp_path, running, 1)
        running.process.send_signal(number)
        code = running.wait(30)
        words = [line for line in running.errors.splitlines() if "nterrupted" in line]
        assert running.survivors() == []
    assert (code, len(words)) == ((-9, 0) if number is signal.SIGKILL else (130, 1)), running.errors
    kept = rows(tmp_path)
    assert 1 <= len(kept) < 4
    with a_sweep(tmp_path) as running:
        assert running.wait() == 0, running.errors
    finished = read_landscape(tmp_path / "l.jsonl").rows
    assert finished[: len(kept)] == kept
    assert len({row.config for row in finished}) == len(finished) == 4


def test_a_sweep_asks_what_a_fit_with_its_options_asks() -> None:
    shared = ["--gpu", "cpu", "--sequence-length", "128", "--memory-limit", "1GiB", "--trainer", "trl"]
    asked = sweep.command.make_context("sweep", [*shared, "--output", "l.jsonl"]).params
    assert request_of(asked, {}, a_cpu()) == build_request(fit.command.make_context("fit", shared).params, a_cpu())


def test_the_grids_longest_length_is_wanted_where_none_is_stated() -> None:
    asked = sweep.command.make_context("sweep", ["--output", "l.jsonl"]).params
    request, _ = request_of(asked, {"sequence_length": (128, 64)}, a_cpu())
    assert (request.start.sequence_length, request.sequence_length_stated) == (128, True)


def at_work(terminal: Terminal, *arguments: str) -> Ended:
    output = ["--output", str(terminal.folder / "l.jsonl")]
    return terminal.run("sweep", "--gpu", "cpu", "--model", str(terminal.folder / "tiny.json"), *output, *arguments)


def write(path: Path, *values: Header | Row) -> None:
    with LandscapeWriter(path) as file:
        for value in values:
            file.append(value)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--set", "micro_batch=1"], 2, "unknown field 'micro_batch': did you mean micro_batch_size?"),
        (["--set", "micro_batch_size=3"], 1, "does not divide the effective batch of 8"),
        (["--set", "attention=flash_attention_2"], 1, "FlashAttention 2 does not run on cpu"),
        (["--set", "sequence_length=256,100000"], 1, "sequence length 100,000 is above the 4,096 positions"),
        (["--grid", "none.yaml"], 1, "none.yaml cannot be read"),
        (["--grid", "truncated.json"], 1, "truncated.json is neither YAML nor JSON"),
        (["--output", "no/l.jsonl"], 1, "no is no folder"),
        (["--output", "."], 1, "is a folder"),
        (["--output", "there.yaml"], 1, "there.yaml exists and is no landscape"),
        (["--optuna", "there.yaml"], 1, "there.yaml exists and is no storage of Optuna"),
        (["--optuna", "folder/../l.jsonl", "--output", "l.jsonl"], 2, "--optuna and --output are both l.jsonl"),
        (["--set", "optimizer=adamw_tosch"], 2, "the grid's optimizer adamw_tosch is not known"),
        (["--micro-batches", "0"], 2, "1 or more"),
        (["--max-configs", "0"], 2, "1 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_sweep_is_one_line(terminal: Terminal, arguments: list[str], code: int, said: str) -> None:
    ended = at_work(terminal, *arguments)
    assert ended.code == code
    assert said in ended.error
    assert not (terminal.folder / "l.jsonl").exists()


def test_without_output_it_says_so(terminal: Terminal) -> None:
    ended = terminal.run("sweep", "--gpu", "cpu")
    assert ended.code == 2
    assert "--output" in ended.error


def test_a_file_of_another_device_is_not_continued(terminal: Terminal) -> None:
    write(terminal.folder / "l.jsonl", HEADER, a_row())
    ended = at_work(terminal, "--set", "micro_batch_size=1")
    assert ended.code == 1
    assert "was measured with device" in ended.error
    assert len(read_landscape(terminal.folder / "l.jsonl").rows) == 1


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"device": replace(HEADER.device, name="Another card")}, "device"),
    ({"model": replace(HEADER.model, config={"model_type": "gpt2"})}, "model"),
    ({"start": replace(HEADER.start, sequence_length=128)}, "sequence length 128, not 64"),
    ({"start": replace(HEADER.start, lora_rank=8)}, "lora rank 8, not 16"),
    ({"memory_limit_bytes": 1}, "memory limit 1, not none"),
    ({"headroom_bytes": 1}, "headroom 1, not"),
    ({"installed": ()}, "optional packages none, not flash_attn"),
    ({"environment": None}, "software none"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[said for _, said in CHANGES])
def test_what_a_file_was_measured_with_must_be_the_same(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_same(replace(HEADER, **change), HEADER, Path("l.jsonl"))
    assert f"l.jsonl was measured with {said}" in str(caught.value)


def test_free_memory_and_the_programs_own_version_may_differ() -> None:
    device: Device = replace(HEADER.device, free_bytes=1)
    assert HEADER.environment is not None
    environment: Environment = replace(HEADER.environment, autotune="9.9")
    check_same(replace(HEADER, name="x", device=device, environment=environment, fresh_start_s=1.0), HEADER, Path("l"))


@pytest.mark.slow
def test_rows_that_another_sweep_wrote_meanwhile_are_not_measured_twice(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = terminal.folder / "l.jsonl"
    asked = [*command(tiny_model(terminal.folder), output, "--no-prediction")[len(PROGRAM) :], "--max-configs", "1"]
    assert terminal.run(*asked).code == 0
    before = output.read_bytes()
    monkeypatch.setenv("AUTOTUNE_HOME", str(terminal.home))
    monkeypatch.setattr(sweep_run, "_begun", lambda path: None)  # as it was before the other one
    with pytest.raises(InvalidRequest, match="has grown meanwhile: give the same command again"):
        sweep.command.main(asked[1:], standalone_mode=False)
    assert output.read_bytes() == before
