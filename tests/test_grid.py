"""A declared grid becomes configs at the request's effective batch; what cannot run is counted by its reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from autotune.errors import InvalidRequest, UsageError
from autotune.grid import asked, parse_grid, plan_of_grid, plan_of_space, read_grid
from autotune.search.space import build_space
from autotune.values import LossPath
from tests.fakes import a_cpu, a_gpu, a_request

REQUEST = a_request()  # 256 tokens, effective batch 8


def test_values_are_read_as_their_fields_have_them() -> None:
    texts = ["micro-batch-size=1,2,2", "gradient_checkpointing=off,every_2", "double_quant=true,false"]
    assert parse_grid([*texts, "lora_dropout=0.05", "target_modules=all-linear,q_proj+v_proj"], "--set") == {
        "micro_batch_size": (1, 2),
        "gradient_checkpointing": ("off", "every_2"),
        "double_quant": (True, False),
        "lora_dropout": (0.05,),
        "target_modules": (["all-linear"], ["q_proj", "v_proj"]),
    }


def test_a_file_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("micro_batch_size: [1, 2]\ngradient_checkpointing: [off, full]\nloss: chunked\n")
    assert read_grid(path) == {
        "micro_batch_size": (1, 2),
        "gradient_checkpointing": ("off", "full"),
        "loss": ("chunked",),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("micro_batch_size", "give a field and its values"),
        ("=1", "give a field and its values"),
        ("micro_batch_size=", "give a field and its values"),
        ("micro_batch_size=0", "micro_batch_size must be from 1 to"),
        ("micro_batch_size=1,,2", "micro_batch_size must be a whole number, not ''"),
        ("micro_batch_size=two", "micro_batch_size must be a whole number, not 'two'"),
        ("micro_batch=1", "unknown field 'micro_batch': did you mean micro_batch_size?"),
        ("gradient_accumulation_steps=2", "follows the micro batch"),
        ("gradient_checkpointing=every_0", "gradient_checkpointing must be off, full"),
        ("attention=flash", "attention must be one of eager, sdpa"),
        ("sequence_length=1", "nothing is learned"),
    ],
)
def test_what_a_grid_cannot_say_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_grid([text], "--set")
    assert said in str(caught.value)
    assert str(caught.value).startswith("--set")


def test_a_field_declared_twice_is_one_line() -> None:
    with pytest.raises(UsageError, match="declared twice"):
        parse_grid(["loss=full", "loss=chunked"], "--set")


@pytest.mark.parametrize(
    ("text", "said"),
    [("loss: [fast]\n", "loss must be one of"), ("lss: [full]\n", "did you mean loss?"), ("loss: []\n", "no values")],
)
def test_what_a_file_cannot_say_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        read_grid(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)


def test_accumulation_follows_and_batches_rise_within_other_settings() -> None:
    grid = parse_grid(["micro_batch_size=8,1,4", "loss=full,chunked"], "--set")
    plan = plan_of_grid(grid, REQUEST, a_cpu(), ())
    assert [(c.loss, c.micro_batch_size, c.gradient_accumulation_steps) for c in plan.configs] == [
        (LossPath.FULL, 1, 8),
        (LossPath.FULL, 4, 2),
        (LossPath.FULL, 8, 1),
        (LossPath.CHUNKED, 1, 8),
        (LossPath.CHUNKED, 4, 2),
        (LossPath.CHUNKED, 8, 1),
    ]


def test_what_cannot_run_is_counted_by_its_reason() -> None:
    grid = parse_grid(["micro_batch_size=1,3", "attention=sdpa,flash_attention_2"], "--set")
    plan = plan_of_grid(grid, REQUEST, a_cpu(), ())
    assert [c.micro_batch_size for c in plan.configs] == [1]
    assert plan.skipped == {
        "micro_batch_size 3 does not divide the effective batch of 8": 2,
        "FlashAttention 2 does not run on cpu": 1,
    }


def test_a_grid_of_which_nothing_runs_says_why() -> None:
    with pytest.raises(InvalidRequest, match="does not divide the effective batch of 8"):
        plan_of_grid(parse_grid(["micro_batch_size=3,5"], "--set"), REQUEST, a_cpu(), ())


def test_a_grid_without_end_is_refused_before_it_is_made() -> None:
    texts = [f"{name}={','.join(map(str, range(2, 200)))}" for name in ("sequence_length", "lora_rank", "lora_alpha")]
    with pytest.raises(InvalidRequest, match="7,762,392 configs"):
        plan_of_grid(parse_grid(texts, "--set"), REQUEST, a_cpu(), ())


def test_without_a_grid_it_is_all_that_a_fit_may_try() -> None:
    device = a_gpu(24)
    plan = plan_of_space(REQUEST, device, ("flash_attn",))
    space = build_space(REQUEST, device, installed=("flash_attn",))
    assert set(plan.configs) == {one for one in space.configs() if space.legal(one) is None}
    assert len(plan.configs) > 100


def test_a_trial_is_one_of_the_request_that_a_fit_of_its_length_makes() -> None:
    grid = parse_grid(["sequence_length=128,256", "micro_batch_size=2"], "--set")
    short, long = plan_of_grid(grid, REQUEST, a_cpu(), ()).configs
    assert asked(REQUEST, long) == REQUEST
    assert asked(REQUEST, short) == dataclasses.replace(
        REQUEST, start=dataclasses.replace(REQUEST.start, sequence_length=128)
    )
