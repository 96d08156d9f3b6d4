"""A config file: what it says, and every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotune.configfile import read_config
from autotune.errors import InvalidRequest
from autotune.values import Attention, LossPath, Quantization, Trainer

NEEDED = {"model": "some/model", "sequence_length": 4096, "micro_batch_size": 4}


def written(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_yaml_file_gives_its_settings(tmp_path: Path) -> None:
    text = """
model: some/model
sequence_length: 4096
micro_batch_size: 4
gradient_checkpointing: off
attention: flash_attention_2
loss: chunked
quantization: none
target_modules: [q_proj, v_proj]
eval_micro_batch_size: null
trainer: loop
"""
    found = read_config(written(tmp_path, text))
    config = found.config
    assert found.model == "some/model"
    assert (config.sequence_length, config.micro_batch_size, config.gradient_checkpointing) == (4096, 4, "off")
    assert (config.attention, config.loss) == (Attention.FLASH_ATTENTION_2, LossPath.CHUNKED)
    assert (config.quantization, config.trainer) == (Quantization.NONE, Trainer.LOOP)
    assert config.target_modules == ("q_proj", "v_proj")


def test_json_says_the_same_as_yaml(tmp_path: Path) -> None:
    as_json = read_config(written(tmp_path, json.dumps(NEEDED), "config.json"))
    as_yaml = read_config(written(tmp_path, "".join(f"{k}: {v}\n" for k, v in NEEDED.items())))
    assert as_json == as_yaml


def test_a_model_beside_the_file_is_found_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text("{}")
    found = read_config(written(tmp_path, "model: ./tiny.json\nsequence_length: 8\nmicro_batch_size: 1\n"))
    assert found.model == str(tmp_path / "tiny.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_dropuot": 0.1}, "did you mean lora_dropout?"),
        ({"batch": 3, "zzz": 1}, "unknown key 'batch'"),
        ({"model": None}, "model is missing"),
        ({"sequence_length": None}, "sequence_length is missing"),
        ({"sequence_length": 0}, "from 1 to 10,000,000, not 0"),
        ({"micro_batch_size": -2}, "not -2"),
        ({"micro_batch_size": 2.5}, "must be a whole number"),
        ({"micro_batch_size": True}, "must be a whole number"),
        ({"sequence_length": 10**12}, "not 1000000000000"),
        ({"attention": "flash"}, "one of eager, sdpa, flash_attention_2, not 'flash'"),
        ({"loss": "fused"}, "one of full, chunked, liger"),
        ({"gradient_checkpointing": "some"}, "off, full, offload or every_N"),
        ({"compute_dtype": "int8"}, "compute_dtype must be one of"),
        ({"lora_dropout": 2}, "lora_dropout must be at least 0 and below 1"),
        ({"autocast": "yes please"}, "autocast must be true or false"),
        ({"target_modules": [1, 2]}, "names of modules"),
        ({"target_modules": []}, "at least one module"),
        ({"model": ["a"]}, "must be an id or a path"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    data = {**NEEDED, **changes}
    with pytest.raises(InvalidRequest) as caught:
        read_config(written(tmp_path, json.dumps(data), "config.json"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "no text"),
        (b"a: [1, 2", "neither YAML nor JSON"),
        (b"- 1\n- 2\n", "holds no keys"),
        (b"", "holds no keys"),
        (b"!!python/object/apply:os.system ['true']", "neither YAML nor JSON"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=words):
        read_config(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            read_config(path)
