"""Surfaces: what a grid holds, what a file gives back, and that it is what the predictor says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.errors import InvalidRequest
from autotune.predict.forecast import forecast
from autotune.predict.steptime import forecast_time
from autotune.predict.store import TraceStore
from autotune.predict.trace import Trace
from autotune.probe.dry_run import DryRunner
from autotune.values import AllocatorSetting, TrainingConfig, Upcast
from benchmarks.surfaces import (
    CARDS,
    FOLDER,
    LENGTHS,
    MICRO_BATCHES,
    MODELS,
    Surface,
    card_named,
    compute_dtype_of,
    grid,
    problems,
    read_surfaces,
    target_named,
    write_surfaces,
)
from tests.fakes import a_model
from tests.test_predict_plot import CONFIG, a_trace
from tests.test_predict_steptime import optimizer_work, work

TWO_CARDS = ("RTX 3060 12GB", "H100 SXM 80GB")
MODEL = a_model("owner/Small-Llama")


def few(sequence_length: int, compute_dtype: str) -> list[TrainingConfig]:
    """Two configs that share the tests' trace."""
    one = replace(CONFIG, gradient_accumulation_steps=8, sequence_length=sequence_length, compute_dtype=compute_dtype)
    return [one, replace(one, allocator=AllocatorSetting.EXPANDABLE_SEGMENTS)]


def a_timed_trace() -> Trace:
    """The tests' trace with a product in its forward and a sum in its optimizer step."""
    trace = a_trace()
    trace.programs["first"][0].works = [work("matmul", flops=1e9, count=3), work("memory", moved=1e6)]
    trace.optimizer[0][0].works = [optimizer_work()]
    return trace


@pytest.fixture
def runner(tmp_path: Path) -> DryRunner:
    """One whose traces are made already."""
    store = TraceStore(tmp_path / "traces")
    for card in TWO_CARDS:
        store.keep(MODEL, few(256, "bfloat16")[0], target_named(card).kernels, a_timed_trace())
    return DryRunner(store, python="/no/interpreter")


def test_a_grid_has_every_product_once_and_a_few_others() -> None:
    configs = grid(1024, "bfloat16")
    assert len(set(configs)) == len(configs)
    assert {config.effective_batch_size for config in configs} == {16}
    plain = [c for c in configs if c.upcast is Upcast.NONE and c.optimizer == "adamw_torch_fused"]
    assert len(plain) == 5 * 3 * 2 * len(MICRO_BATCHES)
    assert 140 <= sum(config.loss != "liger" for config in configs) <= len(configs) <= 200


def test_half_precision_is_of_cards_before_compute_capability_8() -> None:
    kinds = {name: compute_dtype_of(card_named(name)) for name in CARDS}
    for name, kind in kinds.items():
        assert (kind == "float16") == (float(card_named(name).compute_capability or 0) < 8)
    assert Counter(kinds.values()) == {"float16": 2, "bfloat16": 9}


def test_cards_of_one_kernel_set_share_their_bytes(runner: DryRunner) -> None:
    found = problems(MODEL, TWO_CARDS, [256], runner, few)
    assert [list(problem["cards"]) for problem in found] == [[card] for card in TWO_CARDS]
    (both,) = problems(MODEL, ("RTX 3060 12GB", "RTX 4090"), [256], runner, few)
    assert list(both["cards"]) == ["RTX 3060 12GB", "RTX 4090"]


def test_a_file_gives_back_what_the_predictor_says(runner: DryRunner, tmp_path: Path) -> None:
    write_surfaces(tmp_path, MODEL, problems(MODEL, TWO_CARDS, [256], runner, few))
    read = list(read_surfaces(MODEL.name, tmp_path))
    assert [(one.card, one.sequence_length, len(one.points)) for one in read] == [(card, 256, 2) for card in TWO_CARDS]
    for surface in read:
        _is_as_predicted(surface, a_timed_trace())


def _is_as_predicted(surface: Surface, trace: Trace) -> None:
    target, card = target_named(surface.card), card_named(surface.card)
    for point, config in zip(surface.points, few(256, "bfloat16"), strict=True):
        expected = forecast(trace, config, target).prediction()
        seconds = forecast_time(trace, config, card).by_kind
        found = point.prediction(target)
        assert point.config == config
        assert found.seconds_by_kind == pytest.approx({kind: s for kind, s in seconds.items() if s}, rel=1e-4)
        assert found.step_time_s == pytest.approx(expected.step_time_s, rel=1e-4)
        assert replace(found, seconds_by_kind=None, step_time_s=expected.step_time_s) == expected


def test_the_same_predictions_are_the_same_bytes(runner: DryRunner, tmp_path: Path) -> None:
    found = problems(MODEL, TWO_CARDS, [256], runner, few)
    first, second = (write_surfaces(tmp_path / name, MODEL, found) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_a_model_without_surfaces_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"python -m benchmarks\.surfaces"):
        list(read_surfaces("owner/none", tmp_path))


def test_what_is_committed_has_every_problem_and_stays_small() -> None:
    for model in MODELS:
        found = {(one.card, one.sequence_length): one.points for one in read_surfaces(model)}
        assert set(found) == {(card, length) for card in CARDS for length in LENGTHS}
        for (card, length), points in found.items():
            assert [point.config for point in points] == grid(length, compute_dtype_of(card_named(card)))
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3 * 2**20
