"""A trainer without torch: HF arguments, Trainer's checkpoints, real out-of-memory texts, faults on demand.

`python -m benchmarks.stand_in --output_dir DIR --max_steps 40 --per_device_train_batch_size 4 …`

Its model is a hash over all samples and learning rates of all steps in order: a lost, repeated or reordered step shows.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autotune.recover.trainer.report import Reporter
from benchmarks.fault_checkpoint import last_checkpoint, read_checkpoint, rotate, write_checkpoint
from benchmarks.fault_inject import FAULTS_VARIABLE, LAUNCH_VARIABLE, Fault, Injector, Spec, read_spec
from benchmarks.fault_ledger import FIRST_STATE, Ledger, Task, advance, rate_at

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def flag(text: str) -> bool:
    return text.lower() in ("1", "true", "yes")


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stand_in", allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, required=True)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8)
    parser.add_argument("--eval_steps", type=int, default=0)
    parser.add_argument("--eval_strategy", default="no")
    parser.add_argument("--logging_steps", type=float, default=500)
    parser.add_argument("--save_strategy", default="steps")
    parser.add_argument("--save_steps", type=int, default=500)
    parser.add_argument("--save_total_limit", type=int)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--gradient_checkpointing", type=flag, nargs="?", const=True, default=False)
    parser.add_argument("--gradient_checkpointing_kwargs")
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--resume_from_checkpoint")
    return parser.parse_args(argv)


class StandIn:
    """One attempt at training."""

    def __init__(self, args: argparse.Namespace, spec: Spec) -> None:
        self.args, self.spec = args, spec
        self.ledger, self.report = Ledger(Path(spec.folder)), Reporter()
        self.injector = Injector(spec, self.ledger)
        self.micro: int = args.per_device_train_batch_size
        self.state, self.step = FIRST_STATE, 0

    def run(self) -> None:
        with self.report:
            self.load()
            self.train()
        self.ledger.write("end", step=self.step, state=self.state)

    def load(self) -> None:
        args = self.args
        versions = {"transformers": "4.57.6" if self.spec.legacy else "5.23.0", "python": sys.version.split()[0]}
        self.report.start(**versions)
        resume = self.resume_from()
        self.ledger.write(
            "start",
            micro=self.micro,
            accumulation=args.gradient_accumulation_steps,
            evaluation=args.per_device_eval_batch_size,
            workers=args.dataloader_num_workers,
            checkpointing=args.gradient_checkpointing,
            optimizer=args.optim,
            resume=str(resume) if resume else None,
            launch=os.environ.get(LAUNCH_VARIABLE),
        )
        self.injector.at_load()
        self.allocate(Fault.OOM_LOAD, 0, 0, 0)
        if resume is not None:
            saved = read_checkpoint(resume)
            self.step, self.state = saved.step, saved.state
            if self.spec.legacy:
                self.micro = saved.train_batch_size
        self.task = Task(
            self.spec.samples, args.max_steps, self.micro * args.gradient_accumulation_steps, self.spec.seed
        )

    def resume_from(self) -> Path | None:
        asked = self.args.resume_from_checkpoint
        if asked is None or asked.lower() == "false":
            return None
        return last_checkpoint(self.args.output_dir) if asked.lower() == "true" else Path(asked)

    def train(self) -> None:
        args = self.args
        self.report.begin(step=self.step, **self.facts())
        self.ledger.write("begin", step=self.step, micro=self.micro, accumulation=args.gradient_accumulation_steps)
        while self.step < args.max_steps:
            self.train_step(self.step + 1)
            if args.eval_strategy == "steps" and self.step % args.eval_steps == 0:
                self.evaluate()
            if args.save_strategy == "steps" and (self.step % args.save_steps == 0 or self.step == args.max_steps):
                self.save()

    def train_step(self, step: int) -> None:
        self.injector.before_step(step, self.args.dataloader_num_workers)
        began = time.perf_counter()
        ids = self.task.order[step - 1]
        micros = [ids[at : at + self.micro] for at in range(0, len(ids), self.micro)]
        times = [self.train_micro(step, micro) for micro in micros]
        rate = rate_at(step, self.args.max_steps)
        self.state, self.step = advance(self.state, step, ids, rate), step
        self.ledger.write("step", step=step, ids=ids, rate=rate)
        longest = max(self.length(one) for one in ids)
        self.report.step(
            step,
            seconds=time.perf_counter() - began,
            micro_batches=times,
            samples=len(ids),
            tokens=sum(len(micro) * max(map(self.length, micro)) for micro in micros),
            longest={"samples": self.micro, "tokens": longest},
            loss=2.0 - step / self.args.max_steps,
            learning_rate=rate,
            allocated=self.spec.law.need(self.micro, longest, checkpointing=self.args.gradient_checkpointing),
            reserved=None,
        )

    def train_micro(self, step: int, ids: Sequence[int]) -> float:
        began = time.perf_counter()
        longest = max(map(self.length, ids))
        self.report.batch_begins(len(ids), longest)
        self.allocate(Fault.OOM_FIRST_STEP if step == 1 else Fault.OOM_MID_EPOCH, len(ids), longest, step)
        time.sleep(self.spec.step_s * len(ids) / len(self.task.order[0]))
        return time.perf_counter() - began

    def length(self, sample: int) -> int:
        long = self.spec.long_step and sample == self.task.order[self.spec.long_step - 1][-1]
        return self.spec.long_tokens if long else self.spec.tokens

    def allocate(self, fault: Fault, samples: int, tokens: int, step: int) -> None:
        """Take and give back what the memory law says; raises as torch does where there is not enough."""
        law = self.spec.law
        need = law.need(samples, tokens, checkpointing=self.args.gradient_checkpointing)
        asked = need - law.fixed_bytes
        if law.capacity_bytes is not None and need > law.capacity_bytes:
            raise self.injector.out_of_memory(fault, asked, law.fixed_bytes, step)
        if law.capacity_bytes is None and need:
            try:
                mmap.mmap(-1, need, _PRIVATE).close()  # counts against RLIMIT_DATA; no page is touched
            except OSError as error:
                raise self.injector.out_of_memory(fault, need, 0, step) from error

    def evaluate(self) -> None:
        self.report.phase("evaluate")
        samples: int = self.args.per_device_eval_batch_size
        self.report.batch = {"samples": samples, "tokens": self.spec.eval_tokens}
        self.allocate(Fault.OOM_EVALUATION, samples, self.spec.eval_tokens, self.step)
        self.report.batch = None
        self.report.phase("train")

    def save(self) -> None:
        began = time.perf_counter()
        self.report.phase("save")
        folder = self.args.output_dir / f"checkpoint-{self.step}"
        trainer_state = {
            "global_step": self.step,
            "max_steps": self.args.max_steps,
            "train_batch_size": self.micro,
            "save_steps": self.args.save_steps,
            "epoch": self.step * len(self.task.order[0]) / self.spec.samples,
            "log_history": [{"step": self.step, "loss": 2.0 - self.step / self.args.max_steps}],
        }
        step = self.step
        write_checkpoint(
            folder,
            step,
            self.state,
            trainer_state=trainer_state,
            between=lambda place: self.injector.in_save(place, step),
        )
        self.ledger.write("checkpoint", step=step, path=str(folder))
        self.report.saved(str(folder), step, seconds=time.perf_counter() - began)
        rotate(self.args.output_dir, self.args.save_total_limit)
        self.report.phase("train")
        self.injector.after_save(folder, step)

    def facts(self) -> dict[str, Any]:
        args, spec = self.args, self.spec
        return {
            "max_steps": args.max_steps,
            "micro_batch_size": self.micro,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "eval_micro_batch_size": args.per_device_eval_batch_size,
            "gradient_checkpointing": args.gradient_checkpointing,
            "output_dir": str(args.output_dir),
            "save_strategy": args.save_strategy,
            "save_steps": args.save_steps,
            "save_total_limit": args.save_total_limit,
            "dataset_longest": spec.long_tokens if spec.long_step else spec.tokens,
            "device": "cpu" if spec.law.capacity_bytes is None else "cuda:0",
            "device_total_bytes": spec.law.capacity_bytes,
        }


def main() -> None:
    args = read_arguments(sys.argv[1:])
    StandIn(args, read_spec(Path(os.environ[FAULTS_VARIABLE]))).run()


if __name__ == "__main__":
    main()
