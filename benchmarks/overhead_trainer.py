"""A real transformers Trainer on the CPU that times its own steps: what `benchmarks.run_overhead` supervises.

`python -m benchmarks.overhead_trainer --output_dir DIR --max_steps 30 --per_device_train_batch_size 8 …`
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

_TOKENS, _VOCABULARY = 128, 512


class Samples(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        self.tokens = torch.randint(0, _VOCABULARY, (512, _TOKENS), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Clock(TrainerCallback):  # type: ignore[misc]
    """From the end of one step to the end of the next, so that other callbacks are in it."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


def main() -> None:
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    clock = Clock()
    Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=Samples(), callbacks=[clock]).train()
    times = {"wall": differences(clock.wall), "cpu": differences(clock.cpu)}
    Path(args.output_dir, "times.json").write_text(json.dumps(times), encoding="utf-8")


def differences(moments: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(moments)]


if __name__ == "__main__":
    main()
