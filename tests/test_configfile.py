"""A config file: what it says, and every mistake in one line."""

from __future__ import annotations

import json
import os
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
        ({"target_modules": []}, "one or more names of modules, or all-linear"),
        ({"target_modules": 5}, "names of modules, or all-linear, not 5"),
        ({"target_modules": True}, "names of modules, or all-linear, not true"),
        ({"target_modules": ""}, "names of modules"),
        ({"target_modules": ",,"}, "names of modules"),
        ({"target_modules": ["q_proj", " "]}, "names of modules"),
        ({"target_modules": {"a": 1}}, "holds more than one value"),
        ({"model": ["a"]}, "must be an id or a path"),
        ({"model": "x", "sequence_length": {"a": {"b": 1}}}, "'sequence_length' holds more than one value"),
        ({"quantization": True}, "quantization must be one of nf4, none, not true"),
        ({"quantization": 4}, "one of nf4, none, not 4"),
        ({"gradient_checkpointing": 5}, "gradient_checkpointing must be off, full, offload or every_N"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing must be off"),
        ({"gradient_checkpointing": "every_" + "9" * 5000}, "N from 1 to 9,999"),
        ({"lora_dropout": "0.1"}, "lora_dropout must be a number, such as 0.05, not '0.1'"),
        ({"lora_dropout": float("inf")}, "below 1, not inf"),
        ({"lora_dropout": float("nan")}, "below 1, not nan"),
        ({"lora_dropout": 10**400}, "below 1, not a number of more than 30 digits"),
        ({"compute_dtype": ["a"]}, "compute_dtype must be one of float32, bfloat16, float16, not a list of 1"),
        ({"optimizer": 5}, "optimizer must be the name of an optimizer, such as adamw_8bit, not 5"),
        ({"optimizer": " "}, "optimizer must be the name"),
        ({"sequence_length": 10**4000}, "from 1 to 10,000,000, not a number of more than 30 digits"),
        ({"lora_alpha": -(10**4000)}, "not a number of more than 30 digits"),
        ({"loss": "x" * 5000}, "one of full, chunked, liger, not 'xxx"),
        ({"x" * 5000: 1}, "unknown key 'xxx"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    data = {**NEEDED, **changes}
    with pytest.raises(InvalidRequest) as caught:
        read_config(written(tmp_path, json.dumps(data), "config.json"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", ["false", "off", "null", "~", "none"])
def test_quantization_is_off_where_it_is_said_to_be(tmp_path: Path, value: str) -> None:
    text = f"model: a\nsequence_length: 8\nmicro_batch_size: 1\nquantization: {value}\n"
    assert read_config(written(tmp_path, text)).config.quantization is Quantization.NONE


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "no text"),
        (b"a: [1, 2", "neither YAML nor JSON"),
        (b"- 1\n- 2\n", "holds no keys"),
        (b"", "holds no keys"),
        (b"!!python/object/apply:os.system ['true']", "holds no keys"),
        (b"model: !!python/object/apply:os.system ['true']", "unknown|missing"),
        (b"model: !!python/name:os.system x", "value of 'model' cannot be read"),
        (b"model: !!bool x", "value of 'model' cannot be read"),
        (b"sequence_length: " + b"9" * 5000, "value of 'sequence_length' cannot be read"),
        (b"model: a\nmicro_batch_size: 1\nsequence_length: 0x" + b"f" * 60_000, "not a number of more than 30 digits"),
        (b"model: a\nlora_dropout: 1\nmodel: b", "'model' is there twice"),
        (b"[a, b]: 1", "a key is a list"),
        (b"a: " + b"[" * 1000, "neither YAML nor JSON"),
        (b"a: &a [*a]", "more than one value"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "'b' holds more than one value"),
        (b"#" * 70_000, "larger than 64 KiB"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=words):
        read_config(path)


@pytest.mark.parametrize("content", ["{", "[" * 5000, '{"model": "a", "model": "b"}', '{"a": NaN, "b": [[1]]}'])
def test_json_that_is_no_config_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(InvalidRequest, match=r"neither YAML nor JSON|is there twice|more than one value"):
        read_config(written(tmp_path, content, "config.JSON"))


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    for name in ("config.json", "config.yaml"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + json.dumps(NEEDED).encode())
        assert read_config(tmp_path / name).config.sequence_length == 4096


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "pipe.yaml", Path("/dev/zero"), tmp_path / ("x" * 5000)):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            read_config(path)


def test_a_model_named_longer_than_a_path_can_be_is_left_to_say_later(tmp_path: Path) -> None:
    found = read_config(written(tmp_path, json.dumps({**NEEDED, "model": "x" * 5000}), "config.json"))
    assert found.model == "x" * 5000
    assert found.stated == set(NEEDED)
