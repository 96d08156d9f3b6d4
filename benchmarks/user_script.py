"""QLoRA as a user's own script does it: load 16-bit weights, quantise them on the way, train one step with the Trainer.

`python user_script.py make FOLDER DTYPE` writes random weights beside FOLDER/config.json, once.
`python user_script.py train FOLDER SETTINGS` takes one optimizer step and prints its times as a last line of JSON;
SETTINGS is the JSON of a training config and a device.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
import transformers


def make(folder: str, dtype: str) -> None:
    """Random 16-bit weights for the config in `folder`, saved as a hub model is."""
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)


class TimedTrainer(transformers.Trainer):  # type: ignore[misc]
    """The Trainer, with the seconds of its forward, backward and optimizer noted."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_callback(StepEnd(self))
        self.micro_batch_times_s: list[float] = []
        self.last_micro_batch_ended = 0.0
        self.optimizer_time_s = 0.0
        self.step_done = 0.0  # on the monotonic clock, which all processes of a machine share

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        began = now(self.args.device)
        loss = super().training_step(*arguments, **named)
        self.last_micro_batch_ended = now(self.args.device)
        self.micro_batch_times_s.append(self.last_micro_batch_ended - began)
        return loss


class StepEnd(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: TimedTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """After clipping, the optimizer's step and zero_grad."""
        self.trainer.step_done = now(args.device)
        self.trainer.optimizer_time_s = self.trainer.step_done - self.trainer.last_micro_batch_ended


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def train(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One optimizer step from a folder of 16-bit weights; its times in seconds."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    dtype = getattr(torch, settings["compute_dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=settings["double_quant"],
            bnb_4bit_compute_dtype=dtype,
        ),
        dtype=dtype,
        attn_implementation=settings["attention"],
        device_map={"": settings["device"]},
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as output:
        trainer = TimedTrainer(
            model=get_peft_model(model, lora),
            args=arguments(settings, output),
            train_dataset=rows(settings, model.config.get_text_config().vocab_size),
        )
        trainer.train()
    return {
        "step_done": trainer.step_done,
        "micro_batch_times_s": trainer.micro_batch_times_s,
        "optimizer_time_s": trainer.optimizer_time_s,
    }


def arguments(settings: dict[str, Any], output: str) -> transformers.TrainingArguments:
    on_cpu = settings["device"] == "cpu"
    return transformers.TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=settings["micro_batch_size"],
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        max_steps=1,
        optim=settings["optimizer"],
        bf16=settings["compute_dtype"] == "bfloat16",
        fp16=settings["compute_dtype"] == "float16",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def rows(settings: dict[str, Any], vocab_size: int) -> list[dict[str, list[int]]]:
    """Random tokens of full length for one optimizer step."""
    count = settings["micro_batch_size"] * settings["gradient_accumulation_steps"]
    length = settings["sequence_length"]
    tokens = torch.randint(0, vocab_size, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": row} for row in tokens]


if __name__ == "__main__":
    action, where, what = sys.argv[1:]
    if action == "make":
        make(where, what)
    else:
        print(json.dumps(train(where, json.loads(what))))
