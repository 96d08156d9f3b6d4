"""How a training command's config is read and changed."""

from __future__ import annotations

import json
import os
import re
import stat
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import InvalidRequest
from autotune.recover.command import CommandNotFound, TrainingCommand, read_command
from autotune.recover.facts import Launch, Settings

HALVED = {"micro_batch_size": 4, "gradient_accumulation_steps": 2}
PROGRAMS = (
    *("python", "torchrun", "accelerate", "trl", "axolotl", "llamafactory-cli", "deepspeed"),
    *("uv", "env", "bash", "mytrain"),
)
HF_SCRIPT = "from transformers import HfArgumentParser, TrainingArguments\n"
TRL_SCRIPT = "from trl import SFTConfig, TrlParser\n"

Read = Callable[..., TrainingCommand]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of programs: what matters of one is its name."""
    folder = tmp_path_factory.mktemp("environment") / "bin"
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def read(programs: Path, tmp_path: Path) -> Read:
    def made(command: str | list[str], *, hooked: bool = False, start: Settings | None = None, **environ: str) -> Any:
        words = command.split() if isinstance(command, str) else command
        return read_command(words, cwd=tmp_path, environ={"PATH": str(programs), **environ}, hooked=hooked, start=start)

    return made


def packages(programs: Path, tmp_path: Path, **versions: str) -> Path:
    """An environment with these packages and a Python of its own."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").write_text("#!/bin/sh\n")
    (folder / "python").chmod(0o755)
    for name, version in versions.items():
        (tmp_path / f"venv/lib/python3.11/site-packages/{name}-{version}.dist-info").mkdir(parents=True)
    return folder / "python"


def launched(command: TrainingCommand, change: dict[str, Any], folder: Path, **more: Any) -> Launch:
    return command.launch(change, **{"resume": None, **more}, folder=folder)


# Arguments


@pytest.mark.parametrize(
    ("given_words", "change", "expected"),
    [
        ("--per_device_train_batch_size 8", {"micro_batch_size": 4}, "--per_device_train_batch_size 4"),
        ("--per_device_train_batch_size=8", {"micro_batch_size": 4}, "--per_device_train_batch_size=4"),
        ("--per-device-train-batch-size 8", {"micro_batch_size": 4}, "--per-device-train-batch-size 4"),
        (
            "--per_device_train_batch_size 8 --seed 1 --per_device_train_batch_size 16",
            {"micro_batch_size": 4},
            "--per_device_train_batch_size 8 --seed 1 --per_device_train_batch_size 4",
        ),
        ("--per_device_train_batch 8", {"micro_batch_size": 4}, "--per_device_train_batch 4"),
        (
            "--per_device_train_batch_size 8 --bf16",
            HALVED,
            "--per_device_train_batch_size 4 --bf16 --gradient_accumulation_steps 2",
        ),
        (
            "--per-device-train-batch-size 8",
            HALVED,
            "--per-device-train-batch-size 4 --gradient-accumulation-steps 2",
        ),
        (
            "--per_device_train_batch_size 8 -- rest",
            HALVED,
            "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 -- rest",
        ),
        ("--gradient_checkpointing", {"gradient_checkpointing": "off"}, "--gradient_checkpointing=False"),
        ("--gradient_checkpointing True", {"gradient_checkpointing": "off"}, "--gradient_checkpointing False"),
        ("--gradient_checkpointing=true", {"gradient_checkpointing": "off"}, "--gradient_checkpointing=false"),
        ("--gradient_checkpointing yes", {"gradient_checkpointing": "off"}, "--gradient_checkpointing no"),
        ("--gradient_checkpointing 0", {"gradient_checkpointing": "full"}, "--gradient_checkpointing 1"),
        ("--gradient_checkpointing", {"gradient_checkpointing": "full"}, "--gradient_checkpointing"),
        ("--no_gradient_checkpointing", {"gradient_checkpointing": "full"}, "--gradient_checkpointing"),
        ("--no-gradient-checkpointing x", {"gradient_checkpointing": "full"}, "--gradient-checkpointing=True x"),
        ("--activation_checkpointing False", {"gradient_checkpointing": "full"}, "--activation_checkpointing True"),
        (
            "--num_train_epochs 1",
            {"gradient_checkpointing": "full"},
            "--num_train_epochs 1 --gradient_checkpointing True",
        ),
    ],
)
def test_an_argument_is_rewritten_where_it_stands_and_added_where_it_is_missing(
    read: Read, tmp_path: Path, given_words: str, change: dict[str, Any], expected: str
) -> None:
    launch = launched(read(f"python train.py {given_words}"), change, tmp_path / "f")
    assert " ".join(launch.argv) == f"python train.py {expected}"
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gradient_checkpointing", "full"),
        ("--gradient_checkpointing false", "off"),
        ("--gradient_checkpointing --gradient_checkpointing false", "off"),
        ("--gradient_checkpointing true --activation_checkpointing false", "off"),
        ('--activation_checkpointing --activation_checkpointing_kwargs={"every_n_layers":2}', "every_2"),
        ('--gradient_checkpointing --gradient_checkpointing_kwargs {"offload":true}', "offload"),
        ('--gradient_checkpointing --gradient_checkpointing_kwargs {"use_reentrant":false}', "full"),
        ("--num_train_epochs 1", "off"),
    ],
)
def test_checkpointing_is_read_in_both_spellings(read: Read, words: str, expected: str) -> None:
    assert read(f"python train.py {words}").settings.gradient_checkpointing == expected


def test_what_is_not_stated_is_the_trainers_own_default(read: Read) -> None:
    assert read("python train.py --num_train_epochs 1").settings == Settings(
        trainer="transformers",
        output_dir="trainer_output",
        micro_batch_size=8,
        gradient_accumulation_steps=1,
        eval_micro_batch_size=8,
        gradient_checkpointing="off",
        optimizer="adamw_torch_fused",
        save_strategy="steps",
        save_steps=500,
        dataloader_workers=0,
    )
    found = read(
        "trl sft --model_name_or_path x --use_peft --lora_target_modules q_proj v_proj --load_in_4bit"
    ).settings
    assert (found.trainer, found.model, found.sequence_length) == ("trl", "x", 1024)
    assert (found.gradient_checkpointing, found.compute_dtype, found.quantization) == ("full", "bfloat16", "nf4")
    assert (found.lora_rank, found.lora_alpha, found.target_modules) == (16, 32, ("q_proj", "v_proj"))
    assert read("trl grpo --output_dir o").settings.sequence_length is None


def test_defaults_are_those_of_the_installed_trainers(read: Read) -> None:
    from transformers import TrainingArguments
    from trl import ModelConfig, SFTConfig

    ours = read("python train.py --num_train_epochs 1").settings
    theirs = TrainingArguments(use_cpu=True)
    assert ours.micro_batch_size == theirs.per_device_train_batch_size
    assert ours.eval_micro_batch_size == theirs.per_device_eval_batch_size
    assert ours.gradient_accumulation_steps == theirs.gradient_accumulation_steps
    assert ours.optimizer == theirs.optim
    assert (ours.save_strategy, ours.save_steps) == (theirs.save_strategy, theirs.save_steps)
    assert (ours.output_dir, ours.dataloader_workers) == (theirs.output_dir, theirs.dataloader_num_workers)
    sft, model = SFTConfig(use_cpu=True), ModelConfig()
    ours = read("trl sft --use_peft").settings
    assert (ours.gradient_checkpointing == "full", ours.sequence_length) == (sft.gradient_checkpointing, sft.max_length)
    assert (ours.compute_dtype == "bfloat16", ours.packing) == (sft.bf16, sft.packing)
    assert (ours.lora_rank, ours.lora_alpha) == (model.lora_r, model.lora_alpha)


def test_transformers_parses_what_was_rewritten_as_it_was_meant(read: Read, tmp_path: Path) -> None:
    from transformers import HfArgumentParser, TrainingArguments

    cases = [
        "--output_dir o --per-device-train-batch-size=8 --gradient_checkpointing",
        "--output_dir o --gradient_accumulation_steps 1 --activation_checkpointing true --logging_steps 3",
        '--output_dir o --num_train_epochs 1 --gradient_checkpointing_kwargs {"use_reentrant":true}',
    ]
    for mode in ("off", "full"):
        change = {**HALVED, "eval_micro_batch_size": 2, "gradient_checkpointing": mode, "dataloader_workers": 1}
        for case in cases:
            launch = launched(read(f"python train.py {case}"), change, tmp_path, resume=Path("o/checkpoint-3"))
            (made,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*launch.argv[2:], "--use_cpu"])
            assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (4, 2)
            assert (made.per_device_eval_batch_size, made.dataloader_num_workers) == (2, 1)
            assert made.gradient_checkpointing is (mode == "full")
            assert made.resume_from_checkpoint == "o/checkpoint-3"


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("every_2", {"use_reentrant": False, "every_n_layers": 2}),
        ("offload", {"use_reentrant": False, "offload": True}),
    ],
)
def test_partial_checkpointing_needs_a_transformers_that_has_it(
    programs: Path, tmp_path: Path, read: Read, mode: str, expected: dict[str, Any]
) -> None:
    words = [
        "python",
        "train.py",
        "--gradient_checkpointing",
        "--gradient_checkpointing_kwargs",
        '{"use_reentrant": false}',
    ]
    assert not read(words).can("gradient_checkpointing", mode)
    python = packages(programs, tmp_path, transformers="5.23.0")
    command = read([str(python), *words[1:]])
    assert command.can("gradient_checkpointing", mode)
    launch = launched(command, {"gradient_checkpointing": mode}, tmp_path)
    assert json.loads(launch.argv[-1]) == expected
    again = read(list(launch.argv))
    assert again.settings.gradient_checkpointing == mode
    back = launched(again, {"gradient_checkpointing": "full"}, tmp_path)
    assert json.loads(back.argv[-1]) == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("text", "added"),
    [
        (HF_SCRIPT, True),
        ("import argparse\np.add_argument('--per_device_train_batch_size')", False),
        (
            "p.add_argument('--per_device_train_batch_size'); p.add_argument('--gradient-accumulation-steps')",
            True,
        ),
        ("from mine import parse", True),
    ],
)
def test_nothing_is_added_that_a_scripts_own_parser_does_not_have(
    read: Read, tmp_path: Path, text: str, added: bool
) -> None:
    (tmp_path / "train.py").write_text(text)
    command = read("python train.py --per_device_train_batch_size 8")
    assert command.can("gradient_accumulation_steps", 2) is added
    assert command.settings.gradient_accumulation_steps == (None if "add_argument" in text else 1)
    assert read("python train.py --per_device_train_batch_size 8", hooked=True).can("gradient_accumulation_steps", 2)


def test_a_flag_of_a_scripts_own_parser_comes_and_goes_as_one_word(read: Read, tmp_path: Path) -> None:
    text = "p.add_argument('--per_device_train_batch_size'); p.add_argument('--gradient_checkpointing', {})"
    (tmp_path / "train.py").write_text(text.format("action='store_true'"))
    on = launched(read("python train.py --per_device_train_batch_size 8"), {"gradient_checkpointing": "full"}, tmp_path)
    assert on.argv[-1] == "--gradient_checkpointing"
    off = launched(read(list(on.argv)), {"gradient_checkpointing": "off"}, tmp_path)
    assert off.argv == ("python", "train.py", "--per_device_train_batch_size", "8")


_OTHER = st.one_of(
    st.from_regex(r"--[xyz][a-z_]{0,6}(=[a-z0-9.]{0,3})?", fullmatch=True),
    st.text(alphabet=string.ascii_letters + string.digits + "{}$./ é", min_size=1, max_size=6),
)
_OURS = st.sampled_from(
    [
        ["--per_device_train_batch_size", "8"],
        ["--per-device-train-batch-size=8"],
        ["--gradient_accumulation_steps=3"],
        ["--per_device_eval_batch_size", "2"],
        ["--gradient_checkpointing", "True"],
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(_OTHER.map(lambda word: [word]), _OURS), max_size=8))
def test_rewriting_alters_no_other_word(programs: Path, chunks: list[list[str]]) -> None:
    words = ["python", "train.py", "--num_train_epochs", "1", *(word for chunk in chunks for word in chunk)]
    command = read_command(words, cwd=programs, environ={"PATH": str(programs)}, hooked=False)
    change = {**HALVED, "gradient_checkpointing": "off"}
    found = list(launched(command, change, programs).argv)
    told = re.compile(r"--(per.device.train.batch.size|gradient.accumulation.steps|gradient.checkpointing)(=.*)?")

    def others(all_words: list[str]) -> list[str]:
        kept, skip = [], False
        for word in all_words:
            match = told.fullmatch(word)
            if not match and not skip:
                kept.append(word)
            skip = bool(match and match[2] is None)
        return kept

    assert others(found) == others(words)
    again = read_command(found, cwd=programs, environ={"PATH": str(programs)}, hooked=False).settings
    assert (again.micro_batch_size, again.gradient_accumulation_steps, again.gradient_checkpointing) == (4, 2, "off")


# Launchers


@pytest.mark.parametrize(
    ("launcher", "world_size"),
    [
        ("torchrun --nproc_per_node 2 --nnodes=2 train.py", 4),
        ("torchrun --standalone --nproc-per-node=gpu train.py", None),
        ("python -m torch.distributed.run --nproc_per_node=3 train.py", 3),
        ("torchrun --nproc_per_node 2 -m my.train", 2),
        ("accelerate launch --multi_gpu --num_processes 2 --gradient_accumulation_steps 9 train.py", 2),
        ("accelerate launch --config_file acc.yaml train.py", None),
        ("accelerate launch --num_processes=2 -m my.train", 2),
        ("deepspeed --num_gpus 4 train.py", 4),
        ("env A=B python -u -W ignore -m my.train", None),
        ("uv run --with x python train.py", None),
        ("uv run -- python train.py", None),
        ("mytrain", None),
    ],
)
def test_launchers_in_front_are_left_alone(read: Read, tmp_path: Path, launcher: str, world_size: int | None) -> None:
    command = read(f"{launcher} --per_device_train_batch_size 8")
    assert command.world_size == world_size
    assert command.settings.gradient_accumulation_steps == 1
    launch = launched(command, HALVED, tmp_path)
    assert " ".join(launch.argv) == f"{launcher} --per_device_train_batch_size 4 --gradient_accumulation_steps 2"


def test_world_size_of_trainers_that_launch_themselves(read: Read, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("output_dir: o\n")
    assert read("trl sft --config x.yaml --num_processes 2").world_size == 2
    (tmp_path / "acc.yaml").write_text("num_processes: 4\n")
    assert read("accelerate launch --config_file acc.yaml train.py --num_train_epochs 1").world_size == 4
    assert read("axolotl train x.yaml --launcher torchrun -- --nproc_per_node=2").world_size == 2
    forced = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    assert read("llamafactory-cli train x.yaml", **forced).world_size == 2
    assert read("env FORCE_TORCHRUN=1 NPROC_PER_NODE=3 llamafactory-cli train x.yaml").world_size == 3


def test_nothing_is_added_behind_a_shells_words(read: Read, tmp_path: Path) -> None:
    command = read("bash run.sh --per_device_train_batch_size 8")
    assert command.can("micro_batch_size", 4)
    assert not command.can("gradient_accumulation_steps", 2)
    with pytest.raises(InvalidRequest, match="nothing in it can be read or changed"):
        read(["bash", "-c", "python train.py --per_device_train_batch_size 8"])


# Config files

TRL_YAML = """\
# a run of mine
model_name_or_path: meta/x   # the model
learning_rate: 1e-4
per_device_train_batch_size: 8  # as large as it goes
max_length: 2048
gradient_checkpointing_kwargs: {use_reentrant: false}  # as advised
lora_target_modules:
  - q_proj
  - 'v_proj'  # both

output_dir: "out"
report_to: none
save_steps: 20
"""
AXOLOTL_YAML = """\
base_model: meta/x
load_in_4bit: true
adapter: qlora
sequence_len: 4096 # long
datasets:
- path: data.jsonl   # mine
  type: alpaca
micro_batch_size: 8
gradient_accumulation_steps: 1
gradient_checkpointing: false
# secrets stay where they are
hub_token: ${HF_TOKEN}
lora_r: 32
lora_target_linear: true
bf16: auto
output_dir: './out'
"""
LLAMAFACTORY_YAML = """\
### model
model_name_or_path: meta/x
quantization_bit: 4
### method
stage: sft
finetuning_type: lora
lora_target: all
### train
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
learning_rate: 1.0e-4
disable_gradient_checkpointing: true   # we have the room
cutoff_len: 2048
output_dir: saves/x
bf16: true
"""


@pytest.mark.parametrize(
    ("command", "text", "replaced", "added"),
    [
        (
            "trl sft --config x.yaml",
            TRL_YAML,
            {"per_device_train_batch_size: 8 ": "per_device_train_batch_size: 4 "},
            "gradient_accumulation_steps: 2\ngradient_checkpointing: true\nresume_from_checkpoint: out/checkpoint-3\n",
        ),
        (
            "axolotl train x.yaml",
            AXOLOTL_YAML,
            {
                "micro_batch_size: 8": "micro_batch_size: 4",
                "steps: 1": "steps: 2",
                "gradient_checkpointing: false": "gradient_checkpointing: true",
            },
            "resume_from_checkpoint: out/checkpoint-3\n",
        ),
        (
            "llamafactory-cli train x.yaml",
            LLAMAFACTORY_YAML,
            {
                "batch_size: 8": "batch_size: 4",
                "steps: 1": "steps: 2",
                "disable_gradient_checkpointing: true   #": "disable_gradient_checkpointing: false  #",
            },
            "resume_from_checkpoint: out/checkpoint-3\n",
        ),
    ],
)
def test_a_copy_of_the_file_differs_in_what_was_changed_alone(
    read: Read, tmp_path: Path, command: str, text: str, replaced: dict[str, str], added: str
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    change = {**HALVED, "gradient_checkpointing": "full"}
    launch = launched(read(command), change, tmp_path / "f", resume=Path("out/checkpoint-3"))
    copy = Path(next(word for word in launch.argv if word.endswith(".yaml")))
    expected = text
    for old, new in replaced.items():
        assert old in expected
        expected = expected.replace(old, new)
    assert copy.read_text() == expected + added
    assert (tmp_path / "x.yaml").read_text() == text
    assert (copy.parent, stat.S_IMODE(copy.stat().st_mode)) == (tmp_path / "f", 0o600)
    again = read(list(launch.argv)).settings
    assert (again.micro_batch_size, again.gradient_accumulation_steps, again.gradient_checkpointing) == (4, 2, "full")
    assert again.resume_from_checkpoint == "out/checkpoint-3"
    assert "HF_TOKEN" not in "\n".join(launch.shown)


def test_files_of_each_trainer_are_read_in_its_own_words(read: Read, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(AXOLOTL_YAML)
    assert read("accelerate launch -m axolotl.cli.train x.yaml").settings == Settings(
        trainer="axolotl",
        model="meta/x",
        output_dir="./out",
        sequence_length=4096,
        micro_batch_size=8,
        gradient_accumulation_steps=1,
        eval_micro_batch_size=8,
        gradient_checkpointing="off",
        quantization="nf4",
        double_quant=True,
        compute_dtype="bfloat16",
        lora_rank=32,
        target_modules=("all-linear",),
        packing=False,
        save_strategy="epoch",
    )
    (tmp_path / "x.yaml").write_text(LLAMAFACTORY_YAML)
    found = read("llamafactory-cli train x.yaml gradient_accumulation_steps=3").settings
    assert (found.gradient_accumulation_steps, found.sequence_length, found.quantization) == (3, 2048, "nf4")
    assert (found.lora_rank, found.lora_alpha, found.target_modules) == (8, 16, ("all-linear",))
    assert found.gradient_checkpointing == "off"


def test_trl_parses_the_copy_as_it_was_meant(read: Read, tmp_path: Path) -> None:
    from trl import ModelConfig, SFTConfig, TrlParser

    (tmp_path / "x.yaml").write_text(TRL_YAML)
    (tmp_path / "train.py").write_text(TRL_SCRIPT)
    for words in ("trl sft --config x.yaml", "python train.py --config x.yaml"):
        change = {**HALVED, "eval_micro_batch_size": 1, "gradient_checkpointing": "off"}
        launch = launched(read(words), change, tmp_path / "f", resume=tmp_path / "out/checkpoint-3")
        config, _ = TrlParser((SFTConfig, ModelConfig)).parse_args_and_config([*launch.argv[2:], "--use_cpu", "True"])
        assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 2)
        assert (config.per_device_eval_batch_size, config.gradient_checkpointing) == (1, False)
        assert config.resume_from_checkpoint == str(tmp_path / "out/checkpoint-3")
        assert (config.max_length, config.save_steps, config.learning_rate) == (2048, 20, 1e-4)


def test_arguments_count_more_than_the_file_and_are_rewritten_themselves(read: Read, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(TRL_YAML)
    command = read("trl sft --config x.yaml --per_device_train_batch_size 2 --num_processes 2")
    assert command.settings.micro_batch_size == 2
    launch = launched(command, {"micro_batch_size": 1}, tmp_path / "f")
    assert " ".join(launch.argv) == "trl sft --config x.yaml --per_device_train_batch_size 1 --num_processes 2"
    (tmp_path / "x.yaml").write_text(LLAMAFACTORY_YAML)
    launch = launched(read("llamafactory-cli train x.yaml cutoff_len=512"), {"sequence_length": 256}, tmp_path / "f")
    assert launch.argv[-2:] == ("x.yaml", "cutoff_len=256")
    (tmp_path / "x.yaml").write_text(AXOLOTL_YAML)
    launch = launched(
        read("axolotl train x.yaml --micro-batch-size 2 -- -n 2"), {"micro_batch_size": 1}, tmp_path / "f"
    )
    assert " ".join(launch.argv) == "axolotl train x.yaml --micro-batch-size 1 -- -n 2"


@pytest.mark.parametrize("indent", [None, 2, 4])
def test_json_keeps_its_order_and_indent(read: Read, tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "train.py").write_text(HF_SCRIPT)
    keys = {"output_dir": "é", "per_device_train_batch_size": 8, "lr_scheduler_kwargs": {"a": 1}, "seed": 1}
    (tmp_path / "args.json").write_text(json.dumps(keys, indent=indent))
    launch = launched(read("python train.py args.json"), HALVED, tmp_path / "f")
    expected = {**keys, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert (tmp_path / "f/config-args.json").read_text() == json.dumps(expected, indent=indent, ensure_ascii=False)
    assert launch.argv == ("python", "train.py", str(tmp_path / "f/config-args.json"))


def test_a_file_that_a_script_names_counts_where_it_holds_arguments_of_a_trainer(read: Read, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 1}')
    (tmp_path / "conf.yaml").write_text("per_device_train_batch_size: 8\n")
    command = read("python train.py --deepspeed ds.json --cfg=conf.yaml")
    assert command.carriers == ("file",)
    launch = launched(command, HALVED, tmp_path / "f")
    assert launch.argv[-1] == f"--cfg={tmp_path}/f/config-conf.yaml"
    assert yaml.safe_load((tmp_path / "f/config-conf.yaml").read_text())["per_device_train_batch_size"] == 4


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("off", {"gradient_checkpointing": False, "activation_offloading": False}),
        ("full", {"gradient_checkpointing": True, "activation_offloading": False}),
        ("offload", {"gradient_checkpointing": True, "activation_offloading": True}),
    ],
)
def test_axolotl_offloads_with_a_key_of_its_own(
    read: Read, tmp_path: Path, mode: str, expected: dict[str, bool]
) -> None:
    (tmp_path / "x.yaml").write_text("micro_batch_size: 2\ngradient_checkpointing: true\nactivation_offloading: true\n")
    command = read("axolotl train x.yaml")
    assert command.settings.gradient_checkpointing == "offload"
    reading = launched(command, {"gradient_checkpointing": mode, "micro_batch_size": 1}, tmp_path / "f")
    found = yaml.safe_load(Path(reading.argv[-1]).read_text())
    assert {name: found[name] for name in expected} == expected
    assert not command.can("gradient_checkpointing", "every_2")


def test_axolotls_batch_of_one_step_is_never_joined_by_an_accumulation(read: Read, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("micro_batch_size: 4\nbatch_size: 16\n")
    command = read("axolotl train x.yaml")
    assert command.settings.gradient_accumulation_steps == 4
    launch = launched(command, {"micro_batch_size": 2, "gradient_accumulation_steps": 8}, tmp_path / "f")
    assert yaml.safe_load(Path(launch.argv[-1]).read_text()) == {"micro_batch_size": 2, "batch_size": 16}
    launch = launched(command, {"gradient_accumulation_steps": 2}, tmp_path / "f")
    assert yaml.safe_load(Path(launch.argv[-1]).read_text()) == {"micro_batch_size": 4, "batch_size": 8}


def test_a_start_from_nothing_overrides_a_trainer_that_resumes_by_itself(read: Read, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("auto_resume_from_checkpoints: true\noutput_dir: o\n")
    launch = launched(read("axolotl train x.yaml"), {}, tmp_path / "f", fresh=True)
    assert yaml.safe_load(Path(launch.argv[-1]).read_text())["auto_resume_from_checkpoints"] is False
    launch = launched(read("llamafactory-cli train x.yaml"), {}, tmp_path / "f", fresh=True)
    assert yaml.safe_load(Path(launch.argv[-1]).read_text())["overwrite_output_dir"] is True
    assert launched(read("axolotl train x.yaml"), {}, tmp_path / "f").argv == ("axolotl", "train", "x.yaml")


@pytest.mark.parametrize("text", ["a:\n    b: null\nmicro_batch_size: 8\n", "---\nc:\nd: []\nmicro_batch_size: 8\n"])
def test_a_files_own_way_of_writing_is_kept(read: Read, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    launch = launched(read("axolotl train x.yaml"), {"micro_batch_size": 4}, tmp_path / "f")
    assert Path(launch.argv[-1]).read_text() == text.replace("8", "4")


def test_a_path_with_an_equals_sign_is_a_path(read: Read, tmp_path: Path) -> None:
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1/x.yaml").write_text("per_device_train_batch_size: 8\n")
    for word in ("lr=1/x.yaml", "--config=lr=1/x.yaml", "cfg=lr=1/x.yaml"):
        launch = launched(read(f"python train.py {word}"), {"micro_batch_size": 4}, tmp_path / "f")
        assert launch.argv[-1] == word.removesuffix("lr=1/x.yaml") + str(tmp_path / "f/config-x.yaml")


@pytest.mark.parametrize(
    ("words", "trainer"),
    [
        ("python -m trl sft --config x.yaml", "trl"),
        ("python -m trl.scripts.sft --config x.yaml", "trl"),
        ("torchrun --nproc_per_node 2 trl/scripts/dpo.py --config x.yaml", "trl"),
        ("accelerate launch -m axolotl.cli.train x.yaml", "axolotl"),
        ("python -m axolotl.cli.main train x.yaml", "axolotl"),
        ("python -m llamafactory.cli train x.yaml", "llamafactory"),
        ("llamafactory-cli train --stage sft --output_dir o", "llamafactory"),
    ],
)
def test_trainers_are_known_however_they_are_started(read: Read, tmp_path: Path, words: str, trainer: str) -> None:
    (tmp_path / "x.yaml").write_text("output_dir: o\n")
    command = read(words)
    assert (command.settings.trainer, command.settings.output_dir) == (trainer, "o")


# Placeholders


@pytest.mark.parametrize(
    ("words", "resume", "expected"),
    [
        ("--bs {micro_batch_size} {other} {{micro_batch_size}}", None, "--bs 2 {other} {{micro_batch_size}}"),
        ("--x=a{micro_batch_size}b{gradient_accumulation_steps}", None, "--x=a2b4"),
        ("--e {eval_micro_batch_size}", None, "--e 2"),
        ("--a --resume {resume_from_checkpoint} --b", None, "--a --b"),
        ("--a --resume={resume_from_checkpoint} --b", None, "--a --b"),
        ("--a --resume {resume_from_checkpoint} --b", "o/checkpoint-3", "--a --resume o/checkpoint-3 --b"),
        ("a.b={resume_from_checkpoint}", None, "a.b="),
        ("--gradient_checkpointing {gradient_checkpointing}", None, "--gradient_checkpointing True"),
        ("--mode={gradient_checkpointing}", None, "--mode=full"),
    ],
)
def test_placeholders_are_filled(read: Read, tmp_path: Path, words: str, resume: str | None, expected: str) -> None:
    start = Settings(micro_batch_size=4, gradient_accumulation_steps=2, gradient_checkpointing="off")
    command = read(f"mytrain {words} {{micro_batch_size}}", start=start)
    assert command.carriers[-1] == "placeholders"
    assert command.settings.micro_batch_size == 4
    change = {"micro_batch_size": 2}
    if "gradient_checkpointing" in words:
        change |= {"gradient_checkpointing": "full"}
    if "accumulation" in words:
        change |= {"gradient_accumulation_steps": 4}
    launch = launched(command, change, tmp_path, resume=Path(resume) if resume else None)
    assert " ".join(launch.argv) == f"mytrain {expected} 2"


def test_a_word_that_is_only_a_checkpoint_becomes_empty_without_one(read: Read, tmp_path: Path) -> None:
    launch = launched(read(["mytrain", "x", "{resume_from_checkpoint}"]), {}, tmp_path)
    assert launch.argv == ("mytrain", "x", "")


def test_a_placeholder_without_a_value_says_what_to_give(read: Read) -> None:
    with pytest.raises(InvalidRequest, match=r"\{sequence_length\} in the command .* give --plan with a fit file"):
        read("mytrain {sequence_length}")


# What the script or the hook is told


def test_a_script_that_reads_the_plan_can_be_told_everything(read: Read, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("from autotune.recover import apply\n")
    command = read("python train.py", start=Settings(micro_batch_size=4))
    assert (command.carriers, command.settings.micro_batch_size) == (("environment",), 4)
    assert {"micro_batch_size", "sequence_length", "lora_rank", "optimizer"} <= command.changeable
    assert command.can_resume
    launch = launched(command, {"micro_batch_size": 2}, tmp_path, resume=Path("o/checkpoint-1"))
    assert launch.argv == ("python", "train.py")
    assert launch.shown == (
        "micro_batch_size: 4 → 2 (in the script)",
        "resume from o/checkpoint-1 (in the script)",
    )


def test_with_the_hook_alone_its_settings_can_be_changed_and_nothing_is_known(read: Read) -> None:
    command = read("python train.py --lr 1", hooked=True)
    assert (command.carriers, command.settings) == (("hook",), Settings())
    assert command.changeable == {
        *("micro_batch_size", "gradient_accumulation_steps", "eval_micro_batch_size", "gradient_checkpointing"),
        *("dataloader_workers", "allocator"),
    }
    assert [command.can("gradient_checkpointing", mode) for mode in ("off", "full", "offload", "every_2")] == [
        *(True, True, False, False)
    ]


@pytest.mark.parametrize(
    ("before", "value", "expected"),
    [
        ({}, "expandable_segments", {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:False"},
            "expandable_segments",
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"},
        ),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "default", {"PYTORCH_ALLOC_CONF": ""}),
        ({}, "default", {}),
    ],
)
def test_the_allocator_is_set_beside_what_is_there(
    programs: Path, read: Read, tmp_path: Path, before: dict[str, str], value: str, expected: dict[str, str]
) -> None:
    python = packages(programs, tmp_path, torch="2.13.0")
    command = read(f"{python} train.py --num_train_epochs 1", **before)
    assert launched(command, {"allocator": value}, tmp_path).environ == expected


def test_the_allocators_variable_is_the_one_that_this_torch_reads(programs: Path, read: Read, tmp_path: Path) -> None:
    python = packages(programs, tmp_path, torch="2.9.1")
    change = {"allocator": "expandable_segments"}
    assert list(launched(read(f"{python} t.py --save_strategy no"), change, tmp_path).environ) == [
        "PYTORCH_CUDA_ALLOC_CONF"
    ]
    unknown = launched(read("python t.py --save_strategy no"), change, tmp_path).environ
    assert sorted(unknown) == ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"]
    words = "env PYTORCH_CUDA_ALLOC_CONF=a:1 python t.py --save_strategy no"
    assert launched(read(words), change, tmp_path).argv[1] == "PYTORCH_CUDA_ALLOC_CONF=a:1,expandable_segments:True"


def test_an_argument_that_a_script_makes_no_use_of_does_not_resume_it(read: Read, tmp_path: Path) -> None:
    for call, resumes in (("trainer.train()", False), ("trainer.train(args.resume_from_checkpoint)", True)):
        (tmp_path / "train.py").write_text(HF_SCRIPT + call)
        assert read("python train.py").can_resume is resumes
        assert read("python train.py", hooked=True).can_resume
    (tmp_path / "train.py").write_text(HF_SCRIPT + "trainer.train()")
    with pytest.raises(InvalidRequest, match="cannot be told to resume"):
        launched(read("python train.py"), {}, tmp_path, resume=Path("o/c-1"))


def test_only_what_changes_is_shown(read: Read, tmp_path: Path) -> None:
    command = read("python train.py --hub_token SECRET --per_device_train_batch_size 8")
    assert launched(command, HALVED, tmp_path, resume=Path("o/c-1")).shown == (
        "--per_device_train_batch_size 8 → 4",
        "--gradient_accumulation_steps 2 (added)",
        "--resume_from_checkpoint o/c-1 (added)",
    )
    assert launched(command, {}, tmp_path) == Launch(argv=command.argv, environ={})


@pytest.mark.parametrize(
    ("words", "there"),
    [
        ("python t.py --per_device_train_batch_size 8", True),
        ("python -u -W error t.py --per_device_train_batch_size 8 -I", True),
        ("python -Xdev -m t -E --per_device_train_batch_size 8", True),
        ("python -I t.py --per_device_train_batch_size 8", False),
        ("python -u -X dev -sE -m t --per_device_train_batch_size 8", False),
        ("env A=1 python -S t.py --per_device_train_batch_size 8", False),
    ],
)
def test_an_interpreter_that_ignores_its_path_leaves_the_hook_out(read: Read, words: str, there: bool) -> None:
    assert ("hook" in read(words, hooked=True).carriers) is there


def test_with_no_other_way_the_interpreters_option_is_named(read: Read) -> None:
    with pytest.raises(InvalidRequest, match="-I, -E or -S leaves the hook out"):
        read("python -I t.py", hooked=True)


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no command"),
        ([" "], "there is no command"),
        (["python train.py --x 1"], "is one word: give the command as words after --"),
        (["nonesuch", "x"], "there is no program 'nonesuch'"),
        (["--dry-run", "python", "train.py"], "the options of autotune go before --"),
        (["HF_HOME=/x", "python", "train.py"], "put env in front"),
        (["python", "t.py", "--batch", "{micro_batch_size}"], "give --plan with a fit file, or write the value"),
        (["python", "train.py"], "nothing in it can be read or changed: .*AUTOTUNE_PLAN"),
        (["python", "t.py", "--per_device_train_batch_size", "four"], "--per_device_train_batch_size is 'four', not a"),
        (["python", "t.py", "--per_device_train_batch_size", "0"], "at least 1"),
        (["python", "t.py", "--per_device_train_batch_size"], "batch_size has no value: give it a whole number"),
        (["python", "t.py", "--gradient_checkpointing=maybe"], "not true or false"),
        (["python", "t.py", "--gradient_checkpointing", "--gradient_checkpointing_kwargs", "x"], "no JSON object"),
        (["trl", "sft", "--config", "none.yaml"], r"none.yaml cannot be read \(No such file"),
        (["axolotl", "train", "."], "it is a folder"),
        (["trl", "sft", "--config", "broken.yaml"], r"broken.yaml is no YAML \(line 3\)"),
        (["trl", "sft", "--config", "list.yaml"], "list.yaml holds no keys"),
        (["trl", "sft", "--config", "twice.yaml"], "twice.yaml: seed is there twice"),
        (["trl", "sft", "--config", "word.yaml"], "word.yaml: max_length is 'long', not a whole number"),
        (["llamafactory-cli", "train", "broken.json"], r"broken.json is no JSON \(line 1\)"),
        (["llamafactory-cli", "train", "twice.json"], "twice.json: a is there twice"),
        (["llamafactory-cli", "train", "binary.yaml"], "is no text"),
    ],
)
def test_bad_input_is_told_in_one_line(read: Read, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "broken.yaml").write_text("a: 1\nb: [1\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "word.yaml").write_text("max_length: long\n")
    (tmp_path / "broken.json").write_text("{a: 1}")
    (tmp_path / "twice.json").write_text('{"a": 1, "a": 2}')
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match=message) as error:
        read(words)
    assert "\n" not in str(error.value)


def test_a_program_that_cannot_be_run_has_a_shells_exit_code(read: Read, tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text("x")
    for word, code in (("nonesuch", 127), ("./nonesuch", 127), ("./train.sh", 126), (f"{tmp_path}", 126)):
        with pytest.raises(CommandNotFound) as error:
            read([word, "x"])
        assert error.value.exit_code == code


def test_a_change_that_a_command_cannot_be_told_is_refused(read: Read, tmp_path: Path) -> None:
    command = read("python train.py --per_device_train_batch_size 8")
    for change in ({"lora_rank": 4}, {"sequence_length": 512}, {"output_dir": "x"}, {"allocator": "other"}):
        with pytest.raises(InvalidRequest, match="cannot be told"):
            launched(command, change, tmp_path)


def test_reading_a_command_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from autotune.recover.command import read_command;"
        "heavy = {'torch', 'transformers', 'yaml', 'ruamel'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environ, timeout=60).returncode == 0
