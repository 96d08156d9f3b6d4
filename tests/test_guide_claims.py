"""Verdicts on the common guide's claims follow from the predictions: another prediction, another verdict."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest

from autotune.predict.forecast import Forecast
from autotune.predict.memory import MemoryForecast
from autotune.values import LossPath, TrainingConfig
from benchmarks import guide_claims
from benchmarks.guide_claims import CLAIMS, LEAN, SIZES, Claim, Found, Predict, judged, table

PARTS = {"base weights": 5.5e9, "adapters": 0.2e9, "gradients": 1e9, "optimizer state": 2e9, "logits and loss": 4e9}
Law = Callable[[TrainingConfig], float]


def law(
    used: Law = lambda config: 10e9,
    tokens_per_s: Law = lambda config: 100.0,
    parts: Mapping[str, float] = MappingProxyType({}),
) -> Predict:
    """A made-up forecast: bytes in use and speed of a config, and parts at its peak."""

    def predict(config: TrainingConfig, card: str) -> Forecast:
        capacity = next((size for size, name in SIZES.items() if name == card), 16) * 10**9
        held = {part: round(size) for part, size in {**PARTS, **parts}.items()}
        size = round(used(config))
        return Forecast(
            config=config,
            memory=MemoryForecast(
                after_load_bytes=0,
                forward_peak_allocated_bytes=0,
                peak_allocated_bytes=sum(held.values()),
                peak_reserved_bytes=sum(held.values()),
                training_peak_allocated_bytes=sum(held.values()),
                evaluation_peak_allocated_bytes=0,
                parts=held,
            ),
            device_used_bytes=size,
            step_time_s=config.tokens_per_step / tokens_per_s(config),
            intervals={"device_used_bytes": (size, size)},
            capacity_bytes=capacity,
            fits=size <= capacity,
        )

    return predict


def checkpointed(on: float, off: float) -> Law:
    return lambda config: off if config.gradient_checkpointing == "off" else on


HOLDS_AND_NOT: list[tuple[Callable[[Predict], Claim], Predict, Predict]] = [
    (guide_claims.base_weights, law(), law(parts={"base weights": 8e9})),
    (guide_claims.adapters, law(), law(parts={"adapters": 84e6})),
    (guide_claims.states, law(), law(parts={"gradients": 0.2e9, "optimizer state": 0.3e9})),
    (guide_claims.activations, law(), law(parts={"casts": 4e9})),
    (guide_claims.minimum, law(lambda c: 11e9), law(lambda c: 7e9)),
    (guide_claims.minimum, law(lambda c: 11e9), law(lambda c: 13e9)),
    (guide_claims.comfortable, law(), law(lambda c: 17e9)),
    (
        guide_claims.shorter,
        law(lambda c: c.sequence_length * 1e6),
        law(lambda c: c.sequence_length * 1e6 * (1.0 if c.loss is LossPath.FULL else 0.1)),
    ),
    (
        guide_claims.micro_batch,
        law(lambda c: 1e9, lambda c: 100 / c.micro_batch_size),
        law(lambda c: 1e9, lambda c: 100 * c.micro_batch_size),
    ),
    (guide_claims.micro_batch, law(lambda c: 5e9 * c.micro_batch_size), law(lambda c: 17e9)),
    (guide_claims.checkpointing, law(checkpointed(10e9, 13e9), checkpointed(85, 100)), law(checkpointed(10e9, 13e9))),
    (
        guide_claims.checkpointing,
        law(checkpointed(10e9, 13e9), checkpointed(85, 100)),
        law(checkpointed(10e9, 30e9), checkpointed(85, 100)),
    ),
    (guide_claims.wrong_setting, law(checkpointed(9e9, 20e9)), law(checkpointed(9e9, 12e9))),
    (guide_claims.wrong_setting, law(checkpointed(9e9, 20e9)), law(checkpointed(16e9, 20e9))),
]


@pytest.mark.parametrize(("claim", "right", "wrong"), HOLDS_AND_NOT, ids=lambda one: getattr(one, "__name__", ""))
def test_another_prediction_is_another_verdict(
    claim: Callable[[Predict], Claim], right: Predict, wrong: Predict
) -> None:
    assert claim(right).verdict == "holds"
    assert claim(wrong).verdict == "corrected"


def test_a_claim_that_is_true_of_some_holds_in_part_and_says_of_which() -> None:
    row = judged("words", [Found("here", True), Found("there", False)])
    assert row.verdict == "holds in part"
    assert row.predicted == "here ✓; there ✗"


def test_a_recipe_that_alone_fits_is_told_apart() -> None:
    row = guide_claims.comfortable(law(lambda config: 10e9 if config.loss is LEAN.loss else 20e9))
    assert row.verdict == "holds in part"
    assert re.findall("[✓✗]", row.predicted) == ["✗", "✗", "✗", "✗", "✓", "✓"]


def test_every_claim_of_the_guide_has_its_row() -> None:
    rows = [claim(law()) for claim in CLAIMS]
    wanted = ("5.5 GB", "200 MB", "AdamW", "activations", "3060", "9070", "halving", "accumulation", "10–20 %",
              "9 GB to 20 GB", "Unsloth", "FlashAttention 2")  # fmt: skip
    assert all(words in row.words for words, row in zip(wanted, rows, strict=True))
    text = table(rows)
    assert text.startswith("| the guide says | predicted here | measured | verdict |")
    assert text.count("| no card |") == len(rows)


def test_what_was_not_predicted_is_not_judged() -> None:
    row = guide_claims.unsloth(law())
    assert row.verdict == "not judged"
    assert "nothing is predicted" in row.predicted


def test_flash_attention_is_judged_by_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "blackwell: 24 of 24 cards ✓" in guide_claims.flash_attention(law()).predicted
    monkeypatch.setattr(guide_claims, "NEWEST", ("turing",))
    assert guide_claims.flash_attention(law()).verdict == "corrected"
