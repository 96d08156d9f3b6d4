"""The training step, once: micro batches to an optimizer step, an evaluation, a checkpoint; on meta, cpu or cuda."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from autotune.values import TrainingConfig
from autotune.workload import prepare
from autotune.workload.build import BaseModel
from autotune.workload.loss import IGNORED, Batch, prepare_loss

MAX_GRAD_NORM = 1.0  # TrainingArguments.max_grad_norm's default


def batch_of(tokens: torch.Tensor, *, padding_free: bool, padded: bool = False) -> Batch:
    """(B, T) tokens as a model takes them: input_ids, attention_mask and labels of that shape.

    Padding-free: one row of B × T, with positions and boundaries, as transformers' DataCollatorWithFlattening makes it.
    Padded: the last row of several ends in one token of padding, so that kernels get a mask as padded batches have it.
    """
    if not padding_free:
        mask, labels = torch.ones_like(tokens), tokens.clone()
        if padded and len(tokens) > 1:
            mask[-1, -1], labels[-1, -1] = 0, IGNORED
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    rows, length = tokens.shape
    labels = tokens.clone()
    labels[:, 0] = IGNORED  # no row's last token predicts the next row's first
    ends = torch.arange(rows + 1, dtype=torch.int32, device=tokens.device) * length
    return {
        "input_ids": tokens.view(1, -1),
        "labels": labels.view(1, -1),
        "position_ids": torch.arange(length, device=tokens.device).repeat(rows)[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": length,
        "max_length_k": length,
    }


class TrainingStep:
    """A model ready to train on random tokens, of full length unless told, in the way of `config.trainer`.

    Takes `base` over: `close` gives it back without adapters. Raises what torch raises when memory ends, and
    `UnsupportedModel` for a config that cannot run here. `autocast` stands in for `torch.autocast` where torch has
    none (meta).
    """

    def __init__(
        self,
        base: BaseModel,
        config: TrainingConfig,
        *,
        folder: str,
        seed: int = 0,
        autocast: Callable[[torch.dtype], Any] | None = None,
    ) -> None:
        self.config = config
        self.device = base.device
        self.vocab_size = int(base.model.config.get_text_config().vocab_size)
        prepare.check_loss_path(config, base.device)
        prepare.set_attention(base.model, config.attention)
        self.model = prepare.add_adapters(base.model, config)
        prepare.set_checkpointing(self.model, config)
        self._loss = prepare_loss(self.model, config)
        self.optimizer = prepare.make_optimizer(self.model, config, base.device, folder)
        self.trainable = prepare.trainable(self.model)
        self.optimizer_steps = 0
        self.skipped_steps = 0
        scales = config.autocast and config.compute_dtype == "float16" and self.device.type != "meta"
        self._scaler = torch.amp.GradScaler(self.device.type) if scales else None
        self._autocast_for = autocast
        self._autocasts = config.autocast and config.compute_dtype != "float32"
        if self._autocasts:
            self._wrap_forward()
        self._seed = seed
        self.model.train()

    def _wrap_forward(self) -> None:
        """Autocast with float32 outputs, as `Accelerator.prepare_model` wraps a model's forward."""
        from accelerate.utils.operations import convert_outputs_to_fp32

        self._plain_forward = self.model.forward
        self.model.forward = convert_outputs_to_fp32(self._autocast()(self.model.forward))

    def _autocast(self) -> Any:
        if not self._autocasts:
            return contextlib.nullcontext()
        dtype = getattr(torch, self.config.compute_dtype)
        return self._autocast_for(dtype) if self._autocast_for else torch.autocast(self.device.type, dtype=dtype)

    def batches(self, count: int, *, micro_batch_size: int | None = None) -> list[Batch]:
        """`count` micro batches of random tokens, all of them learned: see `batch_of`."""
        return self.batches_of((self.config.sequence_length,) * count, micro_batch_size=micro_batch_size)

    def batches_of(
        self, lengths: Sequence[int], *, micro_batch_size: int | None = None, padded: bool = False
    ) -> list[Batch]:
        """A micro batch of each of these lengths."""
        rows = micro_batch_size or self.config.micro_batch_size
        generator = torch.Generator(device="cpu").manual_seed(self._seed)
        made = []
        for length in lengths:
            tokens = torch.randint(0, self.vocab_size, (rows, length), generator=generator).to(self.device)
            made.append(batch_of(tokens, padding_free=self.config.is_padding_free, padded=padded))
        return made

    @staticmethod
    def items_in(batches: list[Batch]) -> torch.Tensor:
        """Learned tokens of these micro batches: the first token of a row is never a target."""
        return torch.stack([batch["labels"][:, 1:].ne(-100).sum() for batch in batches]).sum()

    def micro_batch(self, batch: Batch, items: torch.Tensor, *, phase: Callable[[str], None] | None = None) -> Any:
        """Forward and backward of one micro batch; gives its loss, (), detached. Gradients add up."""
        if phase:
            phase("forward")
        with self._loss_context():
            loss = self._loss(self.model, dict(batch), items)
        if phase:
            phase("backward")
        (self._scaler.scale(loss) if self._scaler else loss).backward()
        return loss.detach()

    @contextlib.contextmanager
    def _loss_context(self) -> Iterator[None]:
        # The wrapped forward covers what goes through `model(...)`; a head applied outside it needs autocast too.
        with self._autocast() if self._loss.__name__ == "chunked_loss" else contextlib.nullcontext():
            yield

    def optimizer_step(self) -> float:
        """Clip, step, zero; gives the gradient norm before clipping."""
        if self._scaler:
            self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, MAX_GRAD_NORM)
        if self._scaler:
            before = self._scaler.get_scale()
            self._scaler.step(self.optimizer)
            self._scaler.update()
            self.skipped_steps += self._scaler.get_scale() < before
        else:
            self.optimizer.step()
        self.model.zero_grad()
        self.optimizer_steps += 1
        return float(norm) if self.device.type != "meta" else 0.0

    def prime_optimizer(self) -> None:
        """Make the optimizer's state exist, which it else does only after the first step, and change no weight.

        With it, one micro batch shows the memory of every later step. Leaves zero gradients where accumulation
        will have gradients alive during its later micro batches, and none otherwise.
        """
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.config.gradient_accumulation_steps == 1:
            self.model.zero_grad()

    def optimizer_tensors(self) -> list[torch.Tensor]:
        return [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]

    @property
    def optimizer_state_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.optimizer_tensors())

    def evaluate(self, *, padded: bool = False) -> float:
        """One evaluation batch, as `Trainer.prediction_step` with prediction_loss_only; gives its loss."""
        size = self.config.eval_micro_batch_size or self.config.micro_batch_size
        (batch,) = self.batches_of([self.config.sequence_length], micro_batch_size=size, padded=padded)
        self.model.eval()
        try:
            with torch.no_grad(), self._loss_context():
                loss = self._loss(self.model, dict(batch), self.items_in([batch]))
        finally:
            self.model.train()
        return float(loss) if self.device.type != "meta" else 0.0

    def save(self, folder: str) -> int:
        """Adapters and optimizer state, as a Trainer checkpoint holds them; gives the bytes written."""
        self.model.save_pretrained(folder)
        torch.save(self.optimizer.state_dict(), os.path.join(folder, "optimizer.pt"))
        return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())

    def close(self) -> Any:
        """Take adapters, optimizer state and patches away; gives the bare base model back."""
        if self._autocasts:
            self.model.forward = self._plain_forward
        self.optimizer.state.clear()
        self.model.zero_grad()
        base = self.model.unload()
        base.__dict__.pop("forward", None)
        if getattr(base, "_require_grads_hooks", None) or hasattr(base, "_require_grads_hook"):
            base.disable_input_require_grads()  # set by checkpointing, and not taken back by switching it off
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        return base
