"""A fit file comes back as it was written, is never left half-written, and says what is wrong with it."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from autotune.errors import InvalidRequest
from autotune.fitfile import SCHEMA, read_fit, write_file, write_fit
from autotune.values import Attention, LossPath, TrainingConfig, to_json

CONFIG = TrainingConfig(
    sequence_length=512,
    micro_batch_size=2,
    gradient_accumulation_steps=4,
    attention=Attention.EAGER,
    loss=LossPath.CHUNKED,
    target_modules=("q_proj", "v_proj"),
)


def document(config: Any = CONFIG, **more: Any) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "status": "fitted",
        "gpu": {"name": "Größte Karte", "total_bytes": 25769803776, "rehearsal": False},
        "model": {"name": "org/a-model", "fingerprint": "0123456789ab"},
        "config": config,
        "measured": {"peak_reserved_bytes": 10**10, "tokens_per_second": 1234.5, "loss": None},
        **more,
    }


def written(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(document(config)))
    return path


def test_a_fit_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "fit.yaml"
    write_fit(path, document(), force=False)
    fit = read_fit(path)
    assert (fit.config, fit.model) == (CONFIG, "org/a-model")
    assert fit.gpu["name"] == "Größte Karte"
    assert fit.document == to_json(document())
    assert path.read_text(encoding="utf-8").startswith("# A fit by autotune")
    assert list(fit.document) == list(document())
    assert os.listdir(tmp_path) == ["fit.yaml"]


def test_the_json_of_fit_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(to_json(document(trials=[]))))
    assert read_fit(path).config == CONFIG


def test_what_a_person_would_write_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "fit.yaml"
    path.write_text(
        f"schema: {SCHEMA}\nmodel: m\nconfig:\n  sequence_length: 64\n  micro_batch_size: 1\n"
        "  gradient_checkpointing: off\n  target_modules: q_proj\n  lora_dropout: 0\n"
    )
    expected = TrainingConfig(sequence_length=64, micro_batch_size=1, target_modules=("q_proj",))
    assert read_fit(path).config == expected
    assert read_fit(path).gpu == {}


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "fit.yaml"
    path.write_text("mine")
    with pytest.raises(InvalidRequest, match="--force") as caught:
        write_fit(path, document(), force=False)
    assert caught.value.exit_code == 1
    assert path.read_text() == "mine"
    write_fit(path, document(), force=True)
    assert read_fit(path).config == CONFIG


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"its folder does not exist; make .*none first"):
        write_fit(tmp_path / "none" / "fit.yaml", document(), force=False)
    with pytest.raises(InvalidRequest, match="is a folder"):
        write_fit(tmp_path, document(), force=True)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "fit.yaml"
    path.write_text("old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(InvalidRequest, match=r"cannot be written \(No space left on device\)"):
        write_file(path, "new", force=True)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["fit.yaml"]


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder that even root cannot write to")
def test_a_read_only_place_is_one_clear_line() -> None:
    with pytest.raises(InvalidRequest, match=r"^/proc/fit\.yaml: cannot be written \(.+\)"):
        write_file(Path("/proc/fit.yaml"), "new", force=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a fit file"),
        (b"- a\n- b\n", "is not a fit file"),
        (b"model: m\n", "is not a fit file"),
        (b"a: [1,\n", "is not YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        (b"\xff\xfe\xfd", "is not YAML"),
        (b"schema: autotune.fit/2\n", r"is of schema autotune\.fit/2, this autotune reads autotune\.fit/1"),
        (b"schema: other/1\n", "is not a fit file"),
        (b"schema: autotune.fit/1\nstatus: nothing_fits\nconfig: null\n", "no config .*nothing_fits"),
        (b"schema: autotune.fit/1\nmodel: m\nconfig: [1]\n", "config must be a mapping"),
        (b"schema: autotune.fit/1\nmodel: m\nconfig: {}\n", r"config\.sequence_length is missing"),
        (b"schema: autotune.fit/1\nconfig: {sequence_length: 1, micro_batch_size: 1}\n", "which model"),
        (b"schema: autotune.fit/1\nmodel: m\ngpu: 3\nconfig: {sequence_length: 1, micro_batch_size: 1}\n", "gpu must"),
    ],
)
def test_what_is_no_fit_file_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "fit.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=message):
        read_fit(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no such file; write one with: autotune fit --output"):
        read_fit(tmp_path / "fit.yaml")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_fit(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batchsize": 2}, r"unknown key config\.micro_batchsize; did you mean micro_batch_size\?"),
        ({"lora_rnak": 2}, r"unknown key config\.lora_rnak; did you mean lora_rank\?"),
        ({"zzz": 2}, r"unknown key config\.zzz; the keys are sequence_length, "),
        ({"micro_batch_size": "two"}, r"config\.micro_batch_size: expected int, found 'two'"),
        ({"micro_batch_size": 0}, r"config\.micro_batch_size: micro_batch_size must be a positive integer, not 0"),
        ({"attention": "flash"}, r"config\.attention: 'flash' is not a valid Attention"),
        ({"gradient_checkpointing": True}, r"config\.gradient_checkpointing: expected str, found True"),
        ({"target_modules": 3}, r"config\.target_modules: 'int' object is not iterable"),
        ({"lora_dropout": 1}, r"config\.lora_dropout: lora_dropout must be at least 0 and below 1"),
        ({"eval_micro_batch_size": "x"}, r"config\.eval_micro_batch_size: expected int"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "fit.yaml", to_json(CONFIG) | change)
    with pytest.raises(InvalidRequest, match=message):
        read_fit(path)


def test_a_key_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    data = to_json(CONFIG)
    del data["attention"]
    assert read_fit(written(tmp_path / "fit.yaml", data)).config == replace(CONFIG, attention=Attention.SDPA)
