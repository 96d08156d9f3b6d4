"""Trains a tiny model once a scenario, each in a fork of one process that has the libraries imported.

`python trainer_scenarios.py FOLDER`: reads FOLDER/<name>/scenario.json, in the order of FOLDER/order.json, and leaves
FOLDER/<name>/result.json. Needs torch and transformers only; runs under any interpreter that has them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from autotune.recover import apply

SAMPLES = [{"input_ids": [10 + i, *range(40, 48 + (i * 5) % 16)]} for i in range(32)]
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "attention_dropout": 0.2,
    "pad_token_id": 0,
}


class Model(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Notes which samples it sees, and runs out of memory when told to."""

    def forward(self, input_ids: Any = None, **named: Any) -> Any:
        self.scenario.sees(self, input_ids)
        return super().forward(input_ids=input_ids, **named)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    width = max(len(sample["input_ids"]) for sample in samples)
    rows = torch.tensor([sample["input_ids"] + [0] * (width - len(sample["input_ids"])) for sample in samples])
    return {"input_ids": rows, "attention_mask": (rows != 0).long(), "labels": rows.masked_fill(rows == 0, -100)}


class Samples(list):  # type: ignore[type-arg]
    """Cannot be fetched from once the step is reached that the scenario names."""

    scenario: Any = None

    def __getitem__(self, index: Any) -> Any:
        scenario = self.scenario
        if scenario is not None and scenario.told.get("oom") == "fetch" and scenario.step == scenario.told["at"]:
            raise MemoryError("no room for a batch (simulated)")
        return super().__getitem__(index)


class Scenario(TrainerCallback):  # type: ignore[misc]
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told = json.loads((folder / "scenario.json").read_text())
        self.step = 0
        self.calls = 0
        self.applied: int | None = None
        self.seen: dict[int, list[int]] = {}
        self.losses: dict[int, float] = {}
        self.rates: dict[int, float] = {}

    def sees(self, model: Any, input_ids: Any) -> None:
        if not model.training:
            if self.told.get("oom") == "evaluate":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (simulated)")
            return
        self.calls += 1
        self.seen.setdefault(self.step + 1, []).extend(int(row[0]) - 10 for row in input_ids)
        if (
            self.told.get("oom") == "forward"
            and self.step == self.told["at"]
            and self.calls == self.told.get("call", 2)
        ):
            torch.rand(3)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (simulated)")

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        def fail(*_: Any) -> None:
            if self.step == self.told["at"]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (simulated)")

        if self.told.get("oom") == "optimizer":
            getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(fail)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step, self.calls = state.global_step, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step
        if self.told.get("signal_at") == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.told.get("control_at") == self.step:
            (self.folder / "control.json").write_text('{"do": "save_and_stop"}')

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]
            self.rates[state.global_step] = logs["learning_rate"]

    def write(self, **facts: Any) -> None:
        result = {"losses": self.losses, "rates": self.rates, "seen": self.seen, "applied": self.applied, **facts}
        (self.folder / "result.json").write_text(json.dumps(result))

    def run(self) -> None:
        torch.set_num_threads(1)
        told = self.told
        if told.get("plan"):
            os.environ["AUTOTUNE_PLAN"] = str(self.folder / "plan.json")
        settings = {
            "output_dir": told["output_dir"],
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 5,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **told.get("arguments", {}),
        }
        self.applied = apply(TrainingArguments(**settings)).per_device_train_batch_size
        transformers.set_seed(3)
        model = Model(transformers.LlamaConfig(**MODEL))
        model.scenario = self
        samples = Samples(SAMPLES)
        samples.scenario = self
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=samples,
            eval_dataset=SAMPLES[:4],
            data_collator=collate,
            callbacks=[self],
        )
        trainer = apply(apply(trainer))
        trainer.train(resume_from_checkpoint=told.get("resume"))


def main(folder: Path) -> None:
    for name in json.loads((folder / "order.json").read_text()):
        child = os.fork()
        if child == 0:
            scenario = Scenario(folder / name)
            try:
                scenario.run()
                scenario.write(error=None)
            except BaseException as error:  # noqa: BLE001 - what it dies of is the result
                traceback.print_exc()
                scenario.write(error=type(error).__name__)
            sys.stderr.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        (folder / name / "status").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
