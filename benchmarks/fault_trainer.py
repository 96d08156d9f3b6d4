"""A real transformers Trainer with LoRA, tiny, on the CPU, with faults on demand: the fault table's other trainer.

`python -m benchmarks.fault_trainer --output_dir DIR --max_steps 16 --per_device_train_batch_size 4 …`
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.fault_inject import FAULTS_VARIABLE, LAUNCH_VARIABLE, Fault, Injector, Spec, read_spec
from benchmarks.fault_ledger import FIRST_STATE, Ledger, advance, of, read_ledger
from benchmarks.fault_list import EFFECTIVE_BATCH

_VOCABULARY, _TOKENS = 96, 24


class Samples(Dataset[dict[str, Any]]):
    """Random tokens, the same for a sample's id everywhere."""

    def __init__(self, count: int) -> None:
        draw = torch.Generator().manual_seed(7)
        self.tokens = torch.randint(0, _VOCABULARY, (count, _TOKENS), generator=draw)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index], "sample": index}


class Notes(TrainerCallback):  # type: ignore[misc]
    """Keeps the ledger."""

    def __init__(self, ledger: Ledger, injector: Injector) -> None:
        self.ledger, self.injector = ledger, injector
        self.ids: list[int] = []
        self.rate = 0.0
        self.losses: list[float] = []
        self.state = FIRST_STATE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            known = [
                one for one in of(read_ledger(self.ledger.path.parent), "step") if one["step"] == state.global_step
            ]
            self.state = known[-1]["state"]
        self.ledger.write(
            "begin",
            step=state.global_step,
            micro=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ids, self.losses = [], []
        self.injector.before_step(state.global_step + 1, args.dataloader_num_workers)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        self.state = advance(self.state, step, self.ids, self.rate)
        loss = sum(self.losses)
        self.ledger.write("step", step=step, ids=self.ids, rate=self.rate, loss=loss, state=self.state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        self.ledger.write("checkpoint", step=state.global_step, path=str(folder))
        self.injector.after_save(folder, state.global_step)


class FaultyTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose micro batches need what the memory law says, taken from torch's own allocator."""

    def __init__(self, spec: Spec, notes: Notes, **kwargs: Any) -> None:
        super().__init__(callbacks=[notes], **kwargs)
        self.spec, self.notes = spec, notes

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids = inputs.pop("sample").tolist()
        if not model.training:
            self.allocate(Fault.OOM_EVALUATION, len(ids), self.spec.eval_tokens)
            return super().compute_loss(model, inputs, *args, **kwargs)
        tokens = self.spec.long_tokens if self.spec.long_sample in ids else self.spec.tokens
        self.allocate(Fault.OOM_MID_EPOCH if self.state.global_step else Fault.OOM_FIRST_STEP, len(ids), tokens)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        time.sleep(self.spec.step_s * len(ids) / EFFECTIVE_BATCH)
        self.notes.ids += ids
        self.notes.losses.append(float(loss.detach()))
        return loss

    def allocate(self, fault: Fault, samples: int, tokens: int) -> None:
        need = self.spec.law.need(samples, tokens, checkpointing=bool(self.args.gradient_checkpointing))
        try:
            torch.empty(need, dtype=torch.uint8)  # no page is touched
        except RuntimeError:
            self.notes.ledger.write("fault", fault=fault, step=self.state.global_step)
            raise

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.notes.injector.in_save(Path(output_dir), self.state.global_step)
        super()._save_optimizer_and_scheduler(output_dir)


def main() -> None:
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    spec = read_spec(Path(os.environ[FAULTS_VARIABLE]))
    ledger = Ledger(Path(spec.folder))
    injector = Injector(spec, ledger)
    ledger.write(
        "start",
        micro=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        evaluation=args.per_device_eval_batch_size,
        workers=args.dataloader_num_workers,
        checkpointing=bool(args.gradient_checkpointing),
        optimizer=str(args.optim),
        resume=args.resume_from_checkpoint,
        launch=os.environ.get(LAUNCH_VARIABLE),
    )
    torch.set_num_threads(1)
    injector.at_load()
    notes = Notes(ledger, injector)
    trainer = FaultyTrainer(
        spec,
        notes,
        model=tiny_model(),
        args=args,
        train_dataset=Samples(spec.samples),
        eval_dataset=Samples(16),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    ledger.write("end", step=trainer.state.global_step, state=notes.state, weights=weights(trainer.model))


def tiny_model() -> Any:
    set_seed(3)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def weights(model: Any) -> list[float]:
    """Length of the trained weights, and their part along a fixed direction."""
    flat = torch.cat([one.detach().flatten() for one in model.parameters() if one.requires_grad])
    direction = torch.randn(flat.numel(), generator=torch.Generator().manual_seed(11))
    return [float(flat.norm()), float(flat @ direction)]


if __name__ == "__main__":
    main()
