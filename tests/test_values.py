"""Values go to JSON and back unchanged, and refuse what no trainer could run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from autotune.values import ModelSource, ProbeReport, TrainingConfig, from_json, to_json
from tests.fakes import a_cpu, a_gpu
from tests.tiny import a_config


def test_a_model_keeps_infinities_of_its_config_on_the_way_to_a_worker() -> None:
    model = ModelSource(name="mamba", config={"time_step_limit": [0.0, float("inf")]})
    assert from_json(ModelSource, json.loads(json.dumps(to_json(model)))) == model


def test_a_measurement_that_is_not_finite_is_null() -> None:
    assert to_json(ProbeReport(loss=float("nan")))["loss"] is None


def test_unknown_keys_of_a_newer_version_are_ignored() -> None:
    assert from_json(TrainingConfig, {**to_json(a_config()), "of_tomorrow": 1}) == a_config()


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_size": 0},
        {"sequence_length": -1},
        {"gradient_accumulation_steps": 1.5},
        {"lora_rank": True},
        {"gradient_checkpointing": "every_0"},
        {"compute_dtype": "int8"},
        {"lora_dropout": 1.0},
        {"target_modules": ()},
        {"eval_micro_batch_size": 0},
    ],
    ids=str,
)
def test_what_no_trainer_could_run_is_refused_with_its_value(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        replace(a_config(), **change)


def test_two_names_of_one_shape_are_one_model() -> None:
    one = ModelSource(name="a", config={"hidden_size": 8, "transformers_version": "4"})
    assert one.fingerprint == ModelSource(name="b", config={"hidden_size": 8, "transformers_version": "5"}).fingerprint
    assert one.fingerprint != ModelSource(name="a", config={"hidden_size": 16}).fingerprint


def test_a_database_is_named_for_model_and_memory_alone() -> None:
    assert a_gpu(12).slug == "nvidia-geforce-rtx-3060-12gib"
    assert a_cpu(name="AMD EPYC 7B13").slug == "amd-epyc-7b13"
