"""The benchmark of the search on a card: its arithmetic by hand, and a rehearsal of every part on the CPU."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autotune.errors import InvalidRequest
from autotune.landscape import LandscapeWriter, read_landscape
from autotune.search.runnable import unrunnable
from autotune.values import GIB, MIB, Trainer, TrainingConfig, Verdict, to_json
from benchmarks import gpu_search, gpu_search_live
from benchmarks.gpu_fit import Limit, LimitResult, choose_device
from benchmarks.gpu_search import Asked
from benchmarks.gpu_search_live import Compared
from benchmarks.replay import Recorded, seconds_of
from tests.fakes import a_gpu, a_request
from tests.made_landscape import a_landscape
from tests.tiny import CONFIG

CARD = a_gpu(80)


def asked(folder: Path, **changes: Any) -> Asked:
    fields = {"device": CARD, "gpu": "auto", "model": "meta-llama/Meta-Llama-3-8B", "lengths": (1024, 4096)}
    return Asked(**{**fields, "effective_batch_size": 16, "folder": folder, "deadline": None, **changes})


# The landscapes


def test_both_lengths_have_at_least_150_configs_without_optional_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_search, "optional_packages", lambda python: frozenset())
    plans = {length: [plan for _, plan in gpu_search.plans_of(asked(tmp_path), length)] for length in (1024, 4096)}
    configs = [config for each in plans.values() for plan in each for config in plan.configs]
    assert len(configs) == len(set(configs)) == 180
    assert {config.effective_batch_size for config in configs} == {16}
    assert {config.micro_batch_size for config in configs} == {1, 2, 4, 8, 16}
    assert len({config.sequence_length for config in configs}) == 2


def test_a_landscape_says_how_far_it_is(tmp_path: Path) -> None:
    one = asked(tmp_path, lengths=(256,))
    landscape = a_landscape(900)
    with LandscapeWriter(one.landscape(256)) as file:
        for value in (landscape.header, *landscape.rows[:10]):
            file.append(value)
    plan = gpu_search.Plan(configs=tuple(row.config for row in landscape.rows[5:25]), skipped={})
    found = gpu_search.swept(one, 256, [plan], [None])
    assert (found.planned, found.measured, found.is_whole) == (20, 5, False)
    assert gpu_search.swept(one, 256, [plan], [{"failed": []}]).is_whole


def test_no_sweep_starts_when_its_time_is_over() -> None:
    assert gpu_search.measure(["--no-such-option"], time.monotonic()) is None


def test_a_sweep_that_fails_ends_the_benchmark() -> None:
    with pytest.raises(InvalidRequest, match="exit code 2"):
        gpu_search.measure(["--no-such-option"], None)


def test_limits_above_what_a_landscape_was_measured_under_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    landscape = a_landscape(900)
    with LandscapeWriter(path) as file:
        for value in (landscape.header, *landscape.rows[:1]):
            file.append(value)
    sizes = [None, 600 * MIB, 900 * MIB, 2 * GIB]
    limits = [Limit(text=str(size), memory_limit_bytes=size) for size in sizes]
    assert gpu_search.limits_within(path, limits) == [None, 600 * MIB]


@pytest.mark.parametrize("text", ["", "many", "1024;4096", "1"])
def test_lengths_that_are_no_tokens_are_told(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--lengths"):
        gpu_search.lengths_of(text)


# Regret, others' settings


def answer(config: TrainingConfig | None, step_s: float = 1.0) -> LimitResult:
    speed = config.tokens_per_step / step_s if config else None
    return LimitResult(
        limit="card", memory_limit_bytes=None, config=to_json(config) if config else None, tokens_per_second=speed
    )


def test_regret_is_of_the_answers_row_and_of_its_proof() -> None:
    landscape = a_landscape(900)
    recorded = Recorded(landscape)
    best = recorded.best
    assert best is not None
    slow = max((row for row in recorded.rows.values() if row.verdict is Verdict.FITS), key=seconds_of)
    found = gpu_search_live.regret_of(256, answer(slow.config, 2 * seconds_of(best)), landscape)
    assert found.regret == pytest.approx(seconds_of(slow) / seconds_of(best) - 1)
    assert found.proof_over_best == pytest.approx(1.0)
    elsewhere = replace(slow.config, lora_rank=3)
    outside = gpu_search_live.regret_of(256, answer(elsewhere, 0.9 * seconds_of(best)), landscape)
    assert (outside.regret, outside.proof_over_best) == (None, pytest.approx(-0.1))
    nothing = gpu_search_live.regret_of(256, answer(None), landscape)
    assert (nothing.regret, nothing.proof_over_best) == (None, None)
    assert "no row" in gpu_search_live.regret_table([outside, nothing])


def test_others_settings_run_on_a_card_and_have_one_effective_batch() -> None:
    found = gpu_search_live.others(2048, CARD)
    trl, notebook = found.values()
    assert {config.effective_batch_size for config in found.values()} == {gpu_search_live.COMPARED_BATCH}
    assert (trl.trainer, trl.micro_batch_size, trl.gradient_checkpointing) == (Trainer.TRL, 8, "full")
    assert (notebook.micro_batch_size, notebook.gradient_accumulation_steps) == (2, 4)
    assert (notebook.optimizer, notebook.gradient_checkpointing) == ("paged_adamw_8bit", "full")
    for config in found.values():
        request = replace(a_request(), start=config)
        assert unrunnable(request, CARD, frozenset(), config) is None


def test_trls_defaults_are_those_of_the_installed_trl() -> None:
    trl = pytest.importorskip("trl")
    defaults = {item.name: item.default for item in fields(trl.SFTConfig)}
    config = gpu_search_live.others(2048, CARD)["trl's defaults"]
    assert config.micro_batch_size == defaults["per_device_train_batch_size"]
    assert config.gradient_accumulation_steps == defaults["gradient_accumulation_steps"]
    assert (config.gradient_checkpointing == "full") is defaults["gradient_checkpointing"]
    assert config.optimizer == defaults["optim"]
    assert (config.loss.value, defaults["loss_type"]) == ("chunked", "nll")


def test_ratio_is_unknown_where_one_does_not_run() -> None:
    config = gpu_search_live.others(1024, CARD)["a notebook's"]

    def one(name: str, *speeds: float) -> Compared:
        verdict = Verdict.FITS if speeds else Verdict.DEVICE_OOM
        return Compared(
            name=name,
            sequence_length=1024,
            config=config,
            verdicts=(verdict,),
            tokens_per_second=speeds,
            peak_reserved_bytes=None,
        )

    found = [one("fitted", 300.0, 100.0), one("a", 100.0), one("b")]
    assert [(each["against"], each["ratio"]) for each in gpu_search_live.ratios(found)] == [("a", 2.0), ("b", None)]
    assert "device_oom" in gpu_search_live.compared_table(found)


# The command


def test_without_a_gpu_it_exits_4_with_one_line(tmp_path: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = CliRunner().invoke(gpu_search.command, ["--output", str(tmp_path)], env=environment)
    assert done.exit_code == 4
    assert len(done.stderr.splitlines()) == 1


def rehearse(folder: Path, part: str, *more: str) -> Result:
    model = folder / "tiny.json"
    model.write_text(json.dumps({**CONFIG, "max_position_embeddings": 256}))
    options = ["--gpu", "cpu", "--model", str(model), "--lengths", "64", "--effective-batch-size", "2"]
    home = {"AUTOTUNE_HOME": str(folder / "home")}
    given = [*options, "--part", part, "--output", str(folder / "results"), *more]
    return CliRunner().invoke(gpu_search.command, given, env=home)


def record(folder: Path, part: str) -> dict[str, Any]:
    (path,) = (folder / "results").glob(f"gpu_search-{part}-*.json")
    text = path.read_text()
    assert str(folder) not in text
    found: dict[str, Any] = json.loads(text)
    assert found["schema"] == "autotune.gpu_search/1"
    assert found["device"]["kind"] == "cpu"
    assert found["environment"]["torch"]
    return found


def test_a_replay_or_a_fit_without_a_landscape_says_what_to_do(tmp_path: Path) -> None:
    for part in ("replay", "fit"):
        done = rehearse(tmp_path, part)
        assert done.exit_code == 1
        assert "--part sweep measures them" in done.stderr


def test_no_time_measures_nothing_and_says_how_to_go_on(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "all", "--minutes", "0")
    assert done.exit_code == 0, done.output
    assert "Not all is measured yet: the same command goes on" in done.stderr
    assert [one["measured"] for one in record(tmp_path, "sweep")["landscapes"]] == [0]


@pytest.mark.slow
def test_a_sweep_is_ended_in_time_and_the_same_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path / "home"))
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    device = choose_device("cpu")
    model = str(tmp_path / "tiny.json")
    one = asked(tmp_path, device=device, gpu="cpu", model=model, lengths=(64,), effective_batch_size=1)
    (_, _), (arguments, plan) = gpu_search.plans_of(one, 64)
    began = time.monotonic()
    assert gpu_search.measure(arguments, began + 4) is None
    assert time.monotonic() - began < 60
    document = gpu_search.measure(arguments, None)
    assert document is not None
    assert document["measured"] + document["known"] == len(plan.configs) == 2
    assert gpu_search.swept(one, 64, [plan], [document]).is_whole


@pytest.mark.slow
def test_rehearsal_sweeps_replays_fits_and_compares(tmp_path: Path) -> None:
    done = rehearse(
        tmp_path, "all", "--limits", "600MiB,card", "--fit-limits", "card", "--searcher", "autotune,halving"
    )
    assert done.exit_code == 0, done.output
    (swept,) = record(tmp_path, "sweep")["landscapes"]
    assert swept["is_whole"]
    assert (swept["measured"], swept["fits"], swept["failed"]) == (swept["planned"], swept["planned"], [])
    rows = read_landscape(tmp_path / "results" / swept["landscape"]).rows
    assert len(rows) == swept["planned"] == 12

    replayed = record(tmp_path, "replay")
    assert [one["name"].partition(" under ")[2] for one in replayed["landscapes"]] == ["600.0 MiB", ""]
    assert {result["searcher"] for result in replayed["results"]} == {"autotune", "halving"}

    (fit,) = record(tmp_path, "fit")["fits"]
    assert fit["fit"]["status"] == "fitted"
    assert fit["best_step_time_s"] > 0
    assert fit["proof_over_best"] > -1

    compared = record(tmp_path, "compare")
    by_name = {one["name"]: one for one in compared["compared"]}
    assert set(by_name) == {"fitted", "trl's defaults", "a notebook's"}
    assert {verdict for one in by_name.values() for verdict in one["verdicts"]} == {"fits"}
    assert {one["config"]["trainer"] for one in by_name.values()} == {"transformers", "trl"}
    assert [one["ratio"] > 0 for one in compared["ratios"]] == [True, True]
