"""Every built-in config builds the model it names: its parameters are the published count, to the last one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from autotune.workload.models import CatalogueEntry, catalogue, check_config

CATALOGUE = catalogue()


@pytest.fixture(scope="module")
def parameters_of() -> Any:
    """Counts a config's parameters on `meta`, where nothing is allocated; a shape is built once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    seen: dict[str, int] = {}

    def count(config: dict[str, Any]) -> int:
        if repr(config) not in seen:
            built = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(built)
            seen[repr(config)] = sum(parameter.numel() for parameter in model.parameters())
        return seen[repr(config)]

    return count


@pytest.mark.parametrize("model_id", CATALOGUE)
def test_parameters_are_the_published_count(model_id: str, parameters_of: Any) -> None:
    entry = CATALOGUE[model_id]
    counted = parameters_of(entry.config)
    if entry.parameters_rounded:
        digits = len(str(entry.parameters)) - 3  # a page states three digits: "7.24B"
        assert abs(counted - entry.parameters) <= 0.5 * 10**digits
    else:
        assert counted == entry.parameters


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_configs_say_what_a_real_config_json_says(entry: CatalogueEntry) -> None:
    stated = {"architectures", "model_type", "vocab_size", "max_position_embeddings", "rope_theta", "torch_dtype"}
    stated |= {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    assert stated <= entry.config.keys()
    assert entry.source.startswith("https://huggingface.co/")
    check_config(entry.config, entry.id)


def test_a_wrong_width_changes_the_count(parameters_of: Any) -> None:
    entry = CATALOGUE["HuggingFaceTB/SmolLM2-135M"]
    assert parameters_of({**entry.config, "intermediate_size": 1537}) != entry.parameters


@pytest.mark.parametrize("size", ["4b", "12b", "27b"])
def test_text_towers_say_that_they_are(size: str) -> None:
    entry = CATALOGUE[f"google/gemma-3-{size}-pt"]
    assert entry.config["model_type"] == "gemma3_text"
    assert entry.note is not None
    assert "text tower" in entry.note


def test_instruct_models_differ_from_their_base_only_where_stated() -> None:
    base, instruct = CATALOGUE["Qwen/Qwen2.5-7B"].config, CATALOGUE["Qwen/Qwen2.5-7B-Instruct"].config
    assert {key for key in base if base[key] != instruct[key]} == {"max_position_embeddings"}


def test_the_models_people_start_with_are_there() -> None:
    assert len(CATALOGUE) >= 35
    assert {"meta-llama/Meta-Llama-3-8B", "HuggingFaceTB/SmolLM2-135M"} <= CATALOGUE.keys()
