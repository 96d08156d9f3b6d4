"""The fastest config at each length: what is measured, what is predicted, what is left out."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.cli.fit_text import print_fit
from autotune.frontier import candidates_of, frontier, lengths_of
from autotune.recommendation import fit_document, fit_file_document
from autotune.search.space import build_space, needs_at_least
from autotune.values import (
    MIB,
    FrontierRow,
    LengthMix,
    Origin,
    Recommendation,
    TrainingConfig,
    TrialRecord,
)
from tests.fakes import FakeExecutor, FakePredictor, Law, a_cpu, a_gpu, a_model, a_request, an_environment
from tests.test_tuner import Scene, limited
from tests.tiny import CONFIG

LIMIT = 1500 * MIB


def fitted(law: Law | None = None, mib: int = 1500, **errors: Any) -> Scene:
    """A card, a fit's executor, and a predictor that is wrong as `errors` say."""
    law = law or Law()
    predictor = FakePredictor(law=law, allowed_bytes=mib * MIB, **errors)
    request = limited(mib, sequence_length=512)
    return Scene(executor=FakeExecutor(law=law), device=a_gpu(), request=request, predictor=predictor)


def frontier_of(
    scene: Scene,
    result: Recommendation | None = None,
    *,
    stored: Iterable[TrialRecord] = (),
    clock: Callable[[], float] = lambda: 0.0,
) -> tuple[dict[int, FrontierRow], tuple[str, ...]]:
    """Rows by length, and what was left out."""
    result = result or scene.fit()
    scene.predictor.asked.clear()
    candidates = candidates_for(scene, result)
    rows, left_out = frontier(result, stored, candidates, scene.predictor, monotonic=clock)
    assert [row.sequence_length for row in rows] == sorted({row.sequence_length for row in rows})
    return {row.sequence_length: row for row in rows}, left_out


def candidates_for(scene: Scene, result: Recommendation) -> tuple[TrainingConfig, ...]:
    return candidates_of(build_space(scene.request, scene.device), result.trials)


def best_under(law: Law, configs: Iterable[TrainingConfig], length: int, limit: int = LIMIT) -> float | None:
    """Tokens per second of the fastest that fits at this length."""
    there = [replace(config, sequence_length=length) for config in configs]
    return max((law.speed(config) for config in there if law.peak_bytes(config) <= limit), default=None)


@pytest.mark.parametrize(
    ("wanted", "longest", "on_cpu", "lengths"),
    [
        (2048, 8192, False, (2048, 1024, 4096, 512, 8192)),
        (512, 512, False, (512,)),
        (256, 256, False, (256,)),
        (3000, 5000, False, (3000, 4096, 2048, 5000, 1024, 512)),
        (256, 1024, True, (256, 128, 512, 64, 1024)),
    ],
)
def test_lengths_double_up_to_the_models_limit_and_the_nearest_come_first(
    wanted: int, longest: int, on_cpu: bool, lengths: tuple[int, ...]
) -> None:
    request = a_request(model=a_model(max_position_embeddings=longest), sequence_length=wanted)
    assert lengths_of(request, a_cpu() if on_cpu else a_gpu()) == lengths


def test_the_length_fitted_is_measured_and_the_others_are_predicted() -> None:
    scene = fitted()
    result = scene.fit()
    rows, left_out = frontier_of(scene, result)
    assert result.proof is not None
    assert rows[512].origin == "measured"
    assert (rows[512].config, rows[512].tokens_per_second) == (result.proof.config, result.proof.tokens_per_second)
    assert {row.origin for length, row in rows.items() if length != 512} == {"predicted"}
    assert left_out == ()


@pytest.mark.parametrize("errors", [{}, {"time_error": 2.0}, {"memory_error": 0.93}, {"memory_error": 1.07}])
def test_a_predicted_row_is_the_fastest_that_fits_though_predictions_are_off(errors: dict[str, float]) -> None:
    scene = fitted(**errors)
    result = scene.fit()
    rows, _ = frontier_of(scene, result)
    predicted = [row for row in rows.values() if row.origin == "predicted" and row.fits]
    assert len(predicted) >= 2
    for row in predicted:
        best = best_under(scene.executor.law, candidates_for(scene, result), row.sequence_length)
        assert best is not None
        assert scene.executor.law.peak_bytes(row.config) <= LIMIT
        assert scene.executor.law.speed(row.config) >= 0.99 * best
        assert row.tokens_per_second == pytest.approx(best, rel=0.03)
        assert row.memory_bytes == pytest.approx(scene.executor.law.peak_bytes(row.config), rel=0.03)


def test_it_ends_where_nothing_fits_any_more_with_what_would_take_least() -> None:
    scene = fitted()
    scene.request = replace(scene.request, model=a_model(max_position_embeddings=131_072))
    rows, _ = frontier_of(scene)
    longest = max(rows)
    last = rows.pop(longest)
    assert all(row.fits for row in rows.values())
    assert longest < max(lengths_of(scene.request, scene.device))
    assert (last.fits, last.origin, last.tokens_per_second) == (False, "predicted", None)
    assert (last.config.micro_batch_size, last.config.loss.value) == (1, "chunked")
    assert last.config.gradient_checkpointing in ("full", "offload")
    assert last.memory_bytes is not None
    assert last.memory_bytes > LIMIT


def test_few_memories_are_predicted() -> None:
    scene = fitted()
    rows, _ = frontier_of(scene)
    assert len(scene.predictor.asked) <= 3 * len(rows)


def test_what_ran_out_of_memory_is_not_expected_to_fit_where_it_is_longer() -> None:
    scene = fitted(mib=700)
    scene.predictor = None
    result = scene.fit()
    died = [trial.config for trial in result.trials if trial.tokens_per_second is None]
    small = Law(weights_bytes=1, unquantized_bytes=1, logits_bytes_per_token=1, activation_bytes_per_token=1)
    scene.predictor = FakePredictor(law=small, allowed_bytes=700 * MIB)  # expects everything to fit
    rows, _ = frontier_of(scene, result)
    assert died
    assert {512, 1024, 8192} <= set(rows)
    assert not [row for row in rows.values() for config in died if row.fits and needs_at_least(row.config, config)]


def other(scene: Scene, result: Recommendation, **changes: Any) -> TrialRecord:
    """A trial of another fit: the proof's config at 1,024 tokens, a hundred tokens a second."""
    assert result.proof is not None
    config = replace(result.proof.config, sequence_length=1024)
    step_s = config.tokens_per_step / 100 / config.gradient_accumulation_steps
    report = replace(
        result.proof.report,
        micro_batch_times_s=(step_s,) * 3,
        optimizer_times_s=(0.0,) * 3,
        device_used_bytes=1234 * MIB,
        peak_reserved_bytes=changes.pop("reserved", 1000 * MIB),
    )
    return replace(result.proof, **{"config": config, "report": report, "id": 999, "origin": Origin.PROBE, **changes})


def test_a_stored_trial_of_another_length_is_a_measured_row() -> None:
    scene = fitted()
    result = scene.fit()
    rows, _ = frontier_of(scene, result, stored=[other(scene, result)])
    assert rows[1024].origin == "measured"
    assert rows[1024].tokens_per_second == pytest.approx(100)
    assert rows[1024].memory_bytes == 1234 * MIB


@pytest.mark.parametrize(
    "changes",
    [
        {"model_fingerprint": "another"},
        {"memory_limit_bytes": 4000 * MIB},
        {"environment": an_environment(torch="2.9.0")},
        {"origin": Origin.DATABASE},
        {"device_slug": "another"},
        {"reserved": LIMIT + 1},  # under less headroom
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_trial_under_other_conditions_is_none(changes: dict[str, Any]) -> None:
    scene = fitted()
    result = scene.fit()
    rows, _ = frontier_of(scene, result, stored=[other(scene, result, **changes)])
    assert rows[1024].origin == "predicted"


def test_a_trial_that_trains_something_else_is_none() -> None:
    scene = fitted()
    result = scene.fit()
    trial = other(scene, result)
    rows, _ = frontier_of(scene, result, stored=[replace(trial, config=replace(trial.config, lora_rank=4))])
    assert rows[1024].origin == "predicted"


def test_a_proof_counts_before_faster_probes() -> None:
    scene = fitted()
    result = scene.fit()
    proof = other(scene, result, origin=Origin.PROOF)
    quick = replace(proof.report, micro_batch_times_s=(0.001,) * 3)
    rows, _ = frontier_of(scene, result, stored=[proof, replace(proof, origin=Origin.PROBE, report=quick, id=1000)])
    assert rows[1024].tokens_per_second == pytest.approx(100)


def test_nothing_that_would_need_a_dry_run_is_predicted() -> None:
    scene = fitted()
    result = scene.fit()
    scene.predictor.is_known = lambda config: config.sequence_length < 1024
    rows, left_out = frontier_of(scene, result)
    assert set(rows) == {512}
    assert all(config.sequence_length < 1024 for config in scene.predictor.asked)
    assert left_out == (
        "1,024, 2,048, 4,096, 8,192 tokens were left out of the lengths: no dry run at hand says what fits",
    )


def test_nothing_is_said_not_to_fit_where_what_takes_least_is_not_known() -> None:
    scene = fitted()
    result = scene.fit()
    scene.predictor.is_known = lambda config: config.gradient_checkpointing == "off"
    rows, left_out = frontier_of(scene, result)
    assert all(row.fits for row in rows.values())
    assert "no dry run at hand" in left_out[0]


def test_predictions_stop_when_their_time_is_over_and_the_nearest_lengths_are_there() -> None:
    scene = fitted(Law(activation_bytes_per_token=90_000, logits_bytes_per_token=60_000))
    result = scene.fit()
    whole, nothing = frontier_of(scene, result)
    assert {512, 1024, 2048, 4096} <= set(whole)
    assert nothing == ()
    clock = itertools.count(step=0.05)
    rows, left_out = frontier_of(scene, result, clock=lambda: next(clock))
    assert {512, 1024} <= set(rows) < set(whole)
    missing = [f"{length:,}" for length in sorted(set(whole) - set(rows))]
    assert left_out == (f"{', '.join(missing)} tokens were left out of the lengths: predicting takes more than 3 s",)


def test_with_a_dataset_tokens_of_its_rows_are_counted_and_no_length_beyond_is_shown() -> None:
    scene = fitted()
    scene.request = limited(1500, sequence_length=2048)
    result = scene.fit()
    full, _ = frontier_of(scene, result)
    mix = LengthMix(
        quantiles=(100.0, 300.0, 900.0, 1800.0), samples=4, longest=1800, longest_untruncated=1800, truncated=0
    )
    padded = other(scene, result)  # counts padding: another thing than a row of this dataset
    rows, _ = frontier_of(scene, replace(result, request=replace(result.request, lengths=mix)), stored=[padded])
    assert max(full) > 2048
    assert set(rows) == {512, 1024, 2048}
    assert rows[1024].origin == "predicted"
    for length, mean in ((512, (100 + 300 + 512 + 512) / 4), (1024, (100 + 300 + 900 + 1024) / 4)):
        both = rows[length].tokens_per_second, full[length].tokens_per_second
        assert None not in both
        assert both[0] == pytest.approx((both[1] or 0) * mean / length)


def test_without_predictions_only_what_was_measured_is_shown() -> None:
    scene = fitted()
    result = scene.fit()
    rows, left_out = frontier(
        result, [other(scene, result)], candidates_for(scene, result), None, monotonic=lambda: 0.0
    )
    assert [(row.sequence_length, row.origin) for row in rows] == [(512, "measured"), (1024, "measured")]
    assert left_out == ()


def test_where_nothing_fits_shorter_lengths_are_still_predicted() -> None:
    scene = fitted(Law(weights_bytes=500 * MIB), mib=700)
    scene.request = limited(700, sequence_length=2048)
    result = scene.fit()
    assert result.proof is None
    rows, _ = frontier_of(scene, result)
    assert {length: row.fits for length, row in rows.items()} == {512: True, 1024: False}


def test_document_and_file_hold_the_rows_in_plain_numbers() -> None:
    scene = fitted()
    result = scene.fit()
    rows, _ = frontier_of(scene, result)
    result = replace(result, frontier=tuple(rows.values()))
    for document in (fit_document(result), fit_file_document(result)):
        shown = json.loads(json.dumps(document))["frontier"]
        assert [row["sequence_length"] for row in shown] == sorted(rows)
        assert {row["origin"] for row in shown} == {"measured", "predicted"}
        assert all(row["config"]["sequence_length"] == row["sequence_length"] for row in shown)
        assert set(shown[0]) == {
            *("sequence_length", "config", "origin", "fits", "tokens_per_second", "memory_bytes")
        }  # fmt: skip


def test_the_table_marks_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    scene = fitted()
    scene.request = replace(scene.request, model=a_model(max_position_embeddings=131_072))
    result = scene.fit()
    rows, _ = frontier_of(scene, result)
    print_fit(replace(result, frontier=tuple(rows.values())), None)
    lines = capsys.readouterr().out.partition("Fastest at each length")[2].splitlines()
    table = [line for line in lines if re.search(r"(measured|predicted)( not to fit)? *$", line)]
    assert len(table) == len(rows)
    assert sum("➜" in line and " measured" in line for line in table) == 1
    assert table[-1].rstrip().endswith("predicted not to fit")


def test_a_fit_on_the_cpu_prints_and_draws_its_frontier_and_knows_it_again(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    arguments = ["fit", "--gpu", "cpu", "--model", "tiny.json", "--effective-batch-size", "2", "--max-probes", "2"]
    arguments += ["--sequence-length", "64", "--json", "--plot"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "AUTOTUNE_HOME": str(tmp_path / "home")}
    program = [sys.executable, "-c", "from autotune.cli.main import main; main()"]

    def fit(picture: str) -> dict[str, Any]:
        command = [*program, *arguments, picture]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    first, again = fit("first.svg"), fit("again.svg")
    assert again["from_database"]
    for document in (first, again):
        origins = {row["sequence_length"]: row["origin"] for row in document["frontier"]}
        assert origins[64] == "measured"
        assert origins[128] == "predicted"
    drawn = (tmp_path / "first.svg").read_text()
    assert "hollow: predicted" in drawn
    assert "filled: measured" in drawn
    filled = [fill for fill in re.findall(r'<circle [^>]*fill="([^"]+)"', drawn) if fill != "white"]
    assert len(filled) == 2  # one length: its memory and its speed
