"""The ways in which a user starts one small training: a script with the Trainer, and three trainers with a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("train_trainer.py")
SEEDED = Path(__file__).with_name("seeded")
LONG = {49: 511, 81: 510}  # tokens of rows that the order of seed 42 brings in steps 10 and 12 of twelve
MICRO_BATCH = 8

_SFT = """\
# A user's own file, with what was learned the hard way
model_name_or_path: {model}
dtype: float32
load_in_4bit: true
bnb_4bit_quant_type: nf4
use_bnb_nested_quant: true
use_peft: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.0
lora_target_modules: all-linear
dataset_name: {data}
max_length: 1024
pad_to_multiple_of: 64   # few shapes: oneDNN keeps some MiB for each that it has met
learning_rate: 1.0e-3
lr_scheduler_type: cosine
num_train_epochs: 1
per_device_train_batch_size: {micro}   # the largest that fits, mostly
gradient_accumulation_steps: 1
gradient_checkpointing: false
optim: adamw_torch
bf16: false
use_cpu: true
logging_steps: 1
save_strategy: steps
save_steps: 4
report_to: none
disable_tqdm: true
output_dir: {output}
"""

_AXOLOTL = """\
base_model: {model}
load_in_4bit: true
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_dropout: 0.0
lora_target_linear: true
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
datasets:
  - path: {data}/train.jsonl
    ds_type: json
    type: completion
    field: text
val_set_size: 0
dataset_prepared_path: {folder}/prepared
output_dir: {folder}/out
sequence_len: 1024
sample_packing: false
seed: 42
shuffle_merged_datasets: false   # the sampler shuffles
pad_to_sequence_len: false
micro_batch_size: {micro}     # per GPU
gradient_accumulation_steps: 1
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.001
bf16: false
fp16: false
tf32: false
gradient_checkpointing: false
attn_implementation: sdpa
logging_steps: 1
save_steps: 4
dataloader_num_workers: 0
dataloader_pin_memory: false
"""

_LLAMAFACTORY = """\
model_name_or_path: {model}
quantization_bit: 4
quantization_method: bnb
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.0
lora_target: all
dataset_dir: {folder}
dataset: letters
template: empty
cutoff_len: 1024
output_dir: {folder}/out
per_device_train_batch_size: {micro}  # per GPU
gradient_accumulation_steps: 1
disable_gradient_checkpointing: true
learning_rate: 1.0e-3
lr_scheduler_type: cosine
num_train_epochs: 1
optim: adamw_torch
save_steps: 4
logging_steps: 1
preprocessing_num_workers: 1
dataloader_num_workers: 0
flash_attn: sdpa
use_cpu: true
report_to: none
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one run finds its model and data, and leaves what it makes."""

    folder: Path
    model: Path
    data: Path  # the folder with train.jsonl

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def steps(self) -> Path:
        return self.folder / "steps.jsonl"


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step, whichever attempt took it last."""

    samples: tuple[int, ...]  # their ids; for trl their tokens, all samples being of different lengths
    learning_rate: float
    loss: float


def environment(venv: Path) -> dict[str, str]:
    """As in an activated environment: no hub, one thread, and the same adapter drawn each time."""
    python_path = os.pathsep.join(filter(None, [str(SEEDED), os.environ.get("PYTHONPATH")]))
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    return {
        **os.environ,
        **quiet,
        "PATH": path,
        "PYTHONPATH": python_path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def trainer_command(place: Place) -> list[str]:
    named: dict[str, Any] = {
        "model": place.model,
        "data": place.data / "train.jsonl",
        "steps": place.steps,
        "output_dir": place.output,
        "per_device_train_batch_size": MICRO_BATCH,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return ["python", str(SCRIPT), *(word for name, value in named.items() for word in (f"--{name}", str(value)))]


def torchrun_command(place: Place) -> list[str]:
    """Two ranks with half of the samples each; one of them meets a long one."""
    _, *words = trainer_command(place)
    half = [str(MICRO_BATCH // 2) if word == str(MICRO_BATCH) else word for word in words]
    return ["torchrun", "--standalone", "--nproc_per_node", "2", *half, "--ddp_backend", "gloo"]


def trl_command(place: Place) -> list[str]:
    file = place.folder / "sft.yaml"
    file.write_text(_SFT.format(model=place.model, data=place.data, micro=MICRO_BATCH, output=place.output))
    return ["trl", "sft", "--config", str(file)]


def axolotl_command(place: Place) -> list[str]:
    file = place.folder / "axolotl.yaml"
    file.write_text(_AXOLOTL.format(model=place.model, data=place.data, micro=MICRO_BATCH, folder=place.folder))
    return ["axolotl", "train", str(file)]


def llamafactory_command(place: Place) -> list[str]:
    """Its data set in its own words beside its config."""
    rows = [json.loads(line) for line in (place.data / "train.jsonl").read_text().splitlines()]
    samples = [{"instruction": "say", "input": "", "output": row["text"]} for row in rows]
    (place.folder / "letters.json").write_text(json.dumps(samples))
    (place.folder / "dataset_info.json").write_text(json.dumps({"letters": {"file_name": "letters.json"}}))
    file = place.folder / "llamafactory.yaml"
    file.write_text(_LLAMAFACTORY.format(model=place.model, micro=MICRO_BATCH, folder=place.folder))
    return ["llamafactory-cli", "train", str(file)]


def trainer_steps(place: Place) -> dict[int, Step]:
    lines = [json.loads(line) for line in place.steps.read_text().splitlines()]
    return {line["step"]: Step(tuple(line["ids"]), line["learning_rate"], line["loss"]) for line in lines}


def logged_steps(place: Place) -> dict[int, Step]:
    """From the trainer's own log. trl counts tokens from 0 again when it resumes, so each is told by what it added."""
    lines = [line for line in last_state(place)["log_history"] if "loss" in line]
    steps, before = {}, 0
    for line in lines:
        so_far = round(line.get("num_tokens", 0))
        tokens, before = so_far - (before if so_far > before else 0), so_far
        steps[line["step"]] = Step((tokens,), line["learning_rate"], line["loss"])
    return steps


def last_state(place: Place) -> dict[str, Any]:
    """Of the checkpoint that the training's end wrote."""
    newest = max(place.output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state: dict[str, Any] = json.loads((newest / "trainer_state.json").read_text())
    return state
