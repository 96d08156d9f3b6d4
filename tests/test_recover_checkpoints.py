"""Which checkpoint a run resumes from. Real ones, written by transformers' Trainer, are cut off and taken apart."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotune.errors import StoreError
from autotune.recover.checkpoints import (
    STATE,
    complete_reason,
    newest_complete,
    prepare_resume,
    present,
    set_aside_incomplete,
)
from autotune.recover.facts import Checkpoint
from autotune.recover.whole import broken
from autotune.values import GIB
from tests.tiny import CONFIG


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of real runs of four steps, saved after two and four: a whole model, and an adapter on one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    shape = LlamaConfig(**{**CONFIG, "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32})
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(8)]
    found = {}
    for name in ("model", "adapter"):
        folder = tmp_path_factory.mktemp(name)
        model: Any = LlamaForCausalLM(shape)
        if name == "adapter":
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=data).train()
        found[name] = folder
    return found


@pytest.fixture(params=["model", "adapter"])
def output_dir(request: pytest.FixtureRequest, written: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to take apart."""
    return Path(shutil.copytree(written[request.param], tmp_path / "out"))


NEEDED = {
    "model": ("model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE),
    "adapter": (
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        STATE,
    ),
}


def test_a_finished_save_is_complete_and_the_newest_is_of_the_highest_step(output_dir: Path) -> None:
    assert complete_reason(output_dir / "checkpoint-2") is None
    os.utime(output_dir / "checkpoint-2" / STATE)  # written later, of a lower step
    assert newest_complete(output_dir) == Checkpoint(path=output_dir / "checkpoint-4", step=4)
    assert newest_complete(output_dir, upto=3) == Checkpoint(path=output_dir / "checkpoint-2", step=2)
    assert newest_complete(output_dir / "elsewhere") is None


@pytest.mark.parametrize("kind", ["model", "adapter"])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.data())
def test_a_needed_file_that_is_cut_off_anywhere_makes_it_incomplete(
    written: dict[str, Path], tmp_path: Path, kind: str, chosen: st.DataObject
) -> None:
    source = written[kind] / "checkpoint-4"
    folder = tmp_path / "checkpoint-4"
    if not folder.exists():
        shutil.copytree(source, folder)
    name = chosen.draw(st.sampled_from(NEEDED[kind]))
    whole = (source / name).read_bytes()
    size = len(whole.rstrip())  # a last line's end is no loss
    kept = chosen.draw(st.integers(0, size - 1))
    try:
        (folder / name).write_bytes(whole[:kept])
        reason = complete_reason(folder)
        assert reason is not None
        assert name in reason
    finally:
        (folder / name).write_bytes(whole)
    assert complete_reason(folder) is None


def test_a_needed_file_that_is_missing_makes_it_incomplete(written: dict[str, Path], tmp_path: Path) -> None:
    for kind, names in NEEDED.items():
        for name in set(names) - {"config.json"}:  # without it the Trainer resumes as well
            folder = Path(shutil.copytree(written[kind], tmp_path / kind / name)) / "checkpoint-4"
            (folder / name).unlink()
            assert complete_reason(folder) is not None, name


def test_an_incomplete_one_is_passed_over(output_dir: Path) -> None:
    (output_dir / "checkpoint-4" / "optimizer.pt").unlink()
    found = newest_complete(output_dir)
    assert found is not None
    assert found.step == 2
    shutil.rmtree(output_dir / "checkpoint-2")
    assert newest_complete(output_dir) is None


def test_transformers_own_mark_of_an_unfinished_save_is_heeded(output_dir: Path) -> None:
    (output_dir / "checkpoint-4" / "checkpoint-is-incomplete.txt").touch()
    assert "marked" in (complete_reason(output_dir / "checkpoint-4") or "")


def test_a_save_of_weights_alone_says_that_it_cannot_be_resumed_exactly(output_dir: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (output_dir / "checkpoint-4" / name).unlink()
    assert "save_only_model" in (complete_reason(output_dir / "checkpoint-4") or "")
    assert set_aside_incomplete(output_dir, {}) == ()


def test_a_state_of_another_step_or_of_none_is_not_taken(output_dir: Path) -> None:
    path = output_dir / "checkpoint-4" / STATE
    path.write_text(json.dumps({"global_step": 3}))
    assert complete_reason(path.parent) == f"{STATE} is of step 3"
    for text in ("{}", "[4]", "4"):
        path.write_text(text)
        assert complete_reason(path.parent) is not None


def test_another_runs_leftovers_are_not_taken(output_dir: Path) -> None:
    old = time.time() - 3600
    os.utime(output_dir / "checkpoint-4" / STATE, (old, old))
    found = newest_complete(output_dir, since=time.time() - 600)
    assert found is not None
    assert found.step == 2
    leftovers = present(output_dir)
    assert newest_complete(output_dir, leftovers=leftovers) is None
    os.utime(output_dir / "checkpoint-2" / STATE, (old - 9, old - 9))  # written anew, under a clock that was set back
    found = newest_complete(output_dir, leftovers=leftovers)
    assert found is not None
    assert found.step == 2
    assert newest_complete(output_dir, max_steps=4) is not None
    assert newest_complete(output_dir, max_steps=400) is None


def test_every_ranks_random_state_is_asked_for(output_dir: Path) -> None:
    folder = output_dir / "checkpoint-4"
    assert complete_reason(folder, world_size=2) is not None
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert complete_reason(folder, world_size=2) == "rng_state_1.pth is missing"
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert complete_reason(folder, world_size=2) is None
    (folder / "rng_state_0.pth").unlink()
    assert complete_reason(folder) == "rng_state_0.pth is missing"


def test_a_sharded_model_needs_its_index_and_every_shard(written: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["model"], tmp_path / "out")) / "checkpoint-4"
    shard = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    assert complete_reason(folder) == "it holds no weights"
    other = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard, "b": other}}))
    assert complete_reason(folder) == f"{other} is missing"
    shutil.copy(folder / shard, folder / other)
    assert complete_reason(folder) is None
    os.truncate(folder / other, 40)
    assert other in (complete_reason(folder) or "")


def test_folders_of_zero_and_fsdp_are_known_by_what_is_written_last(written: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["model"], tmp_path / "out")) / "checkpoint-4"
    (folder / "global_step4").mkdir()
    (folder / "optimizer.pt").rename(folder / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert complete_reason(folder) is not None
    (folder / "latest").write_text("global_step4")
    assert complete_reason(folder) is None
    os.truncate(folder / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", 99)
    assert "optim_states" in (complete_reason(folder) or "")
    (folder / "model.safetensors").unlink()
    (folder / "latest").unlink()
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "optimizer_0").mkdir()
    assert complete_reason(folder) == "it holds no weights"
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"x")
    assert complete_reason(folder) is None


def test_incomplete_saves_of_the_run_are_set_aside_and_others_stay(output_dir: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-4"):
        (output_dir / name / "rng_state.pth").unlink()
    leftovers = {"checkpoint-2": present(output_dir)["checkpoint-2"]}
    (moved,) = set_aside_incomplete(output_dir, leftovers)
    assert moved.name.startswith("incomplete-checkpoint-4")
    assert sorted(present(output_dir)) == ["checkpoint-2"]


def test_a_smaller_micro_batch_is_written_and_nothing_else_changes(output_dir: Path) -> None:
    path = output_dir / "checkpoint-4" / STATE
    path.chmod(0o640)
    before, folder, text = path.stat(), path.parent.stat(), path.read_text()
    checkpoint = Checkpoint(path=path.parent, step=4)
    assert prepare_resume(checkpoint, 1)
    assert path.read_text() == text.replace('"train_batch_size": 2', '"train_batch_size": 1')
    assert (path.stat().st_mode, path.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert path.parent.stat().st_mtime_ns == folder.st_mtime_ns
    inode = path.stat().st_ino
    assert not prepare_resume(checkpoint, 1)
    assert path.stat().st_ino == inode
    assert complete_reason(path.parent) is None
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")]


def test_numbers_that_no_json_has_survive(tmp_path: Path) -> None:
    path = tmp_path / STATE
    path.write_text('{"a": NaN, "b": Infinity, "c": 0.1, "d": 12345678901234567890, "train_batch_size": null}')
    prepare_resume(Checkpoint(path=tmp_path, step=1), 3)
    assert " ".join(path.read_text().split()) == (
        '{ "a": NaN, "b": Infinity, "c": 0.1, "d": 12345678901234567890, "train_batch_size": 3 }'
    )


def test_a_state_that_cannot_be_rewritten_is_one_error_and_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / STATE
    with pytest.raises(StoreError, match="cannot be read"):
        prepare_resume(Checkpoint(path=tmp_path, step=1), 3)
    path.write_text('{"train_batch_size": 8}')

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        prepare_resume(Checkpoint(path=tmp_path, step=1), 3)
    assert os.listdir(tmp_path) == [STATE]
    assert json.loads(path.read_text()) == {"train_batch_size": 8}


def test_gigabytes_are_judged_in_milliseconds(written: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["model"], tmp_path / "out")) / "checkpoint-4"
    header = json.dumps({"w": {"dtype": "U8", "shape": [GIB], "data_offsets": [0, GIB]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + GIB)
    began = time.perf_counter()
    assert complete_reason(folder) is None
    assert time.perf_counter() - began < 0.05
    os.truncate(folder / "model.safetensors", GIB)
    assert "where its header says" in (complete_reason(folder) or "")


def test_an_archive_of_more_than_four_gigabytes_is_read_by_its_wide_records(tmp_path: Path) -> None:
    """Sparse: a zip64 whose 32-bit fields are full, its directory behind five gigabytes."""
    path, start = tmp_path / "optimizer.pt", 5 * GIB
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(start)
        file.write(b"PK\x01\x02".ljust(46, b"\0"))
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, 46, start))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, start + 46, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0))
    assert broken(path) is None
    os.truncate(path, path.stat().st_size - 1)
    assert broken(path) is not None
