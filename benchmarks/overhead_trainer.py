"""A real transformers Trainer on the CPU that times its own steps: what `benchmarks.run_overhead` supervises.

`python -m benchmarks.overhead_trainer --output_dir DIR --max_steps 30 --per_device_train_batch_size 8 …`
"""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from autotune.recover.trainer.session import current

GATE_VARIABLE = "AUTOTUNE_BENCHMARK_GATE"  # set: the hook is heard at every second step
_TOKENS, _VOCABULARY = 128, 512


class Samples(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        self.tokens = torch.randint(0, _VOCABULARY, (512, _TOKENS), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Clock(TrainerCallback):  # type: ignore[misc]
    """From the end of one step to the end of the next; under a supervisor its hook is in every second of them.

    Comes before the hook's callback, so the hook's own end of a step counts in the step after it.
    """

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.gate: Gate | None = None
        self.hooked: list[bool] = []
        self.inside: list[float] = []  # seconds within the hook's callback

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        if self.gate is not None:
            self.hooked.append(self.gate.is_open)
            self.inside.append(self.gate.inside_s)
            self.gate.turn()


class Gate:
    """Stands for the hook's callback, and lets events through or not."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.is_open, self.inside_s = callback, True, 0.0
        session: Any = current()
        self.session = session
        self.run = session.run

    def turn(self) -> None:
        self.is_open, self.inside_s = not self.is_open, 0.0
        self.session.run = self.run if self.is_open else None  # what the wrapped methods of the Trainer look at

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.callback, name)
        if not name.startswith("on_"):
            return method

        def event(*arguments: Any, **named: Any) -> Any:
            if not self.is_open:
                return None
            began = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                self.inside_s += time.perf_counter() - began

        return event


class TimedTrainer(Trainer):  # type: ignore[misc]
    """Puts a gate in front of the hook's callback, where there is one."""

    clock: Clock

    def _inner_training_loop(self, *arguments: Any, **named: Any) -> Any:
        callbacks = self.callback_handler.callbacks
        hooks = [one for one in callbacks if type(one).__name__ == "AutotuneCallback"]
        if not hooks or not os.environ.get(GATE_VARIABLE):
            return super()._inner_training_loop(*arguments, **named)
        place = callbacks.index(hooks[0])
        self.clock.gate = callbacks[place] = gate = Gate(hooks[0])
        try:
            return super()._inner_training_loop(*arguments, **named)
        finally:
            callbacks[place], gate.session.run = gate.callback, gate.run


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
    trainer = TimedTrainer(model=LlamaForCausalLM(config), args=args, train_dataset=Samples(), callbacks=[clock])
    trainer.clock = clock
    trainer.train()
    times: dict[str, list[Any]] = {"wall": differences(clock.wall), "cpu": differences(clock.cpu)}
    if clock.gate is not None:
        times |= {"hooked": clock.hooked[1:], "inside": clock.inside[1:]}
    Path(args.output_dir, "times.json").write_text(json.dumps(times), encoding="utf-8")


def differences(moments: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(moments)]


if __name__ == "__main__":
    main()
