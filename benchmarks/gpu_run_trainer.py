"""4-bit LoRA of random weights with transformers' own Trainer, one sample longer than all others: for `gpu_run`.

`python -m benchmarks.gpu_run_trainer --model ID --log FILE --samples 192 --long_at_step 16 --output_dir DIR …`
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed

from autotune.values import TrainingConfig
from autotune.workload.build import build_base
from autotune.workload.loss import IGNORED
from autotune.workload.models import resolve_model
from autotune.workload.prepare import add_adapters

Row = dict[str, Any]


@dataclass
class ScriptArguments:
    """What the Trainer does not ask."""

    model: str
    log: str  # a line a step is added
    samples: int
    short_length: int
    long_length: int
    long_at_step: int  # the optimizer step, from 1, that the shuffled order brings the long sample in
    lora_r: int = 16
    lora_alpha: int = 16


class IdTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, with the ids of its samples and the longest of them kept."""

    ids: list[int]
    longest: int

    def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        self.ids += inputs.pop("id").tolist()
        self.longest = max(self.longest, inputs["input_ids"].shape[1])
        return super().training_step(model, inputs, *rest, **named)


class StepLog(TrainerCallback):  # type: ignore[misc]
    """A line a step, with the attempt: one more than the file has seen."""

    def __init__(self, path: Path, trainer: IdTrainer) -> None:
        self.path, self.trainer = path, trainer
        seen = [json.loads(line)["attempt"] for line in path.read_text().splitlines()] if path.exists() else []
        self.attempt = max(seen, default=0) + 1
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.trainer.ids, self.trainer.longest = [], 0
        self.began = time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
        if "loss" not in logs:
            return
        line = {
            "attempt": self.attempt,
            "step": state.global_step,
            "began": self.began,
            "ended": time.time(),
            "ids": self.trainer.ids,
            "longest": self.trainer.longest,
            "micro_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Padded to the longest sample of the micro batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, IGNORED)
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        tokens[place, :length] = labels[place, :length] = torch.tensor(row["input_ids"])
        mask[place, :length] = 1
    ids = torch.tensor([row["id"] for row in rows])
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels, "id": ids}


def make_rows(script: ScriptArguments, vocabulary: int, *, step_samples: int, seed: int) -> list[Row]:
    """Random tokens, the same each time."""
    long_id = first_of_step(script.long_at_step, samples=script.samples, step_samples=step_samples, seed=seed)
    numbers = torch.Generator().manual_seed(seed)
    lengths = [script.long_length if row == long_id else script.short_length for row in range(script.samples)]
    return [
        {"id": row, "input_ids": torch.randint(0, vocabulary, (length,), generator=numbers).tolist()}
        for row, length in enumerate(lengths)
    ]


def first_of_step(step: int, *, samples: int, step_samples: int, seed: int) -> int:
    """The sample that the shuffled order brings first in a step, as accelerate's SeedableRandomSampler shuffles."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return int(order[(step - 1) * step_samples])


def make_model(script: ScriptArguments, args: TrainingArguments) -> Any:
    """As `from_pretrained` with a `device_map` leaves one, with adapters: nothing of it is a float32 copy."""
    from transformers.utils.quantization_config import QuantizationMethod

    config = TrainingConfig(
        sequence_length=script.short_length,
        micro_batch_size=1,
        compute_dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        lora_rank=script.lora_r,
        lora_alpha=script.lora_alpha,
    )
    model = build_base(resolve_model(script.model), config, args.device, seed=args.seed).model
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES  # the Trainer and accelerate move no such model …
    model.hf_device_map = {"": args.device}  # … and look here for where it is
    return add_adapters(model, config)


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    if args.use_cpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    set_seed(args.seed)
    model = make_model(script, args)
    step_samples = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = make_rows(script, model.config.vocab_size, step_samples=step_samples, seed=args.seed)
    trainer = IdTrainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.add_callback(StepLog(Path(script.log), trainer))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)


if __name__ == "__main__":
    main()
