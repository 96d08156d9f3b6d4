"""A user's own training script: 4-bit LoRA with the plain Trainer, its arguments on the command line.

Each optimizer step is a line of STEPS: the attempt (one more than the file has seen), the ids of its samples in order,
its loss and its learning rate.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainerCallback

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@dataclass
class ScriptArguments:
    """What the Trainer does not ask."""

    model: str
    data: str
    steps: str
    eval_data: str | None = None


class IdTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, with the ids of its samples kept."""

    ids: list[int]

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        self.ids += inputs.pop("id").tolist()
        return super().training_step(model, inputs, *rest, **named)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        inputs.pop("id")
        return super().prediction_step(model, inputs, *rest, **named)


class StepLog(TrainerCallback):  # type: ignore[misc]
    """A line a step."""

    def __init__(self, path: Path, trainer: IdTrainer) -> None:
        self.path, self.trainer = path, trainer
        seen = [json.loads(line)["attempt"] for line in path.read_text().splitlines()] if path.exists() else []
        self.attempt = max(seen, default=0) + 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.trainer.ids = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **named: Any) -> None:
        if "loss" not in logs:
            return
        line = {
            "attempt": self.attempt,
            "step": state.global_step,
            "ids": self.trainer.ids,
            "micro_batch_size": state.train_batch_size,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Collator:
    """Pads to the longest sample of the micro batch."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        short = [longest - len(row["input_ids"]) for row in rows]
        pairs = list(zip(rows, short, strict=True))
        return {
            "input_ids": torch.tensor([row["input_ids"] + [self.pad] * n for row, n in pairs]),
            "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * n for row, n in pairs]),
            "labels": torch.tensor([row["input_ids"] + [-100] * n for row, n in pairs]),
            "id": torch.tensor([row["id"] for row in rows]),
        }


def read_rows(path: str, tokenizer: Any) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{"id": row["id"], "input_ids": tokenizer(row["text"])["input_ids"]} for row in rows]


def load_model(path: str) -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def main() -> None:
    parser = transformers.HfArgumentParser((ScriptArguments, transformers.TrainingArguments))
    script, args = parser.parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    transformers.set_seed(args.seed)
    trainer = IdTrainer(
        model=load_model(script.model),
        args=args,
        train_dataset=read_rows(script.data, tokenizer),
        eval_dataset=read_rows(script.eval_data, tokenizer) if script.eval_data else None,
        data_collator=Collator(tokenizer.pad_token_id),
    )
    trainer.add_callback(StepLog(Path(script.steps), trainer))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
