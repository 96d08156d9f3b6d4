"""The loss paths: how a batch becomes a loss decides how long the logits live, and they are often the peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from autotune.values import LossPath, Trainer, TrainingConfig

Batch = dict[str, Any]  # input_ids, attention_mask, labels: (B, T) int64; padding-free: see `step.batch_of`
LossFunction = Callable[[Any, Batch, torch.Tensor], torch.Tensor]

IGNORED = -100  # label of a token that is not learned
CHUNK_TOKENS = 256  # as trl's chunked loss before 1.15 took


def prepare_loss(model: Any, config: TrainingConfig) -> LossFunction:
    """The function (model, batch, items in batch) → loss for this config; patches the model where its trainer does.

    `items` is the number of learned tokens of the whole optimizer step, () int64: the sum over its micro batches is
    divided by it (transformers' `num_items_in_batch`).
    """
    if config.loss is LossPath.CHUNKED and config.trainer is Trainer.TRL and _add_trl_head(model):
        return trl_loss
    if config.loss is LossPath.CHUNKED:
        return chunked_loss
    if config.loss is LossPath.LIGER:
        apply_liger(model.get_base_model())
        if config.trainer is not Trainer.LOOP:
            return liger_loss
    return loop_loss if config.trainer is Trainer.LOOP else model_loss


def apply_liger(model: Any) -> None:
    """All that Liger has for this architecture, as `use_liger_kernel=True` puts it in place."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)


def loop_loss(model: Any, batch: Batch, items: torch.Tensor) -> torch.Tensor:
    """As a plain loop's `outputs = model(**batch); outputs.loss.backward()`: the logits live as long as the loss."""
    outputs = model(**batch)
    loss: torch.Tensor = outputs["loss"]
    loss.logits = outputs.get("logits")  # type: ignore[attr-defined]  # not the outputs: they hold the loss
    return loss


def model_loss(model: Any, batch: Batch, items: torch.Tensor) -> torch.Tensor:
    """The model's own forward with labels, as `Trainer.compute_loss` calls it: all logits at once."""
    outputs = model(**batch, num_items_in_batch=items)
    loss: torch.Tensor = outputs["loss"]
    return loss


def liger_loss(model: Any, batch: Batch, items: torch.Tensor) -> torch.Tensor:
    """The same with Liger's forward: no logits, and none in an evaluation, as `Trainer.prediction_step` asks it."""
    asked = {} if model.training else {"skip_logits": True}
    outputs = model(**batch, num_items_in_batch=items, **asked)
    loss: torch.Tensor = outputs["loss"]
    return loss


def _add_trl_head(model: Any) -> bool:
    """Patch in trl's fused head as `SFTTrainer` (1.16) does; False where this trl is missing or older."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return False
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    return True


def trl_loss(model: Any, batch: Batch, items: torch.Tensor) -> torch.Tensor:
    """`SFTTrainer.compute_loss` for loss_type nll, its metrics included (they live as long as the outputs)."""
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    loss: torch.Tensor = -outputs.log_probs.sum() / items.clamp(min=1)
    outputs.entropy.detach().sum(), outputs.is_top1.sum()
    return loss


def chunked_loss(model: Any, batch: Batch, items: torch.Tensor) -> torch.Tensor:
    """Head and cross-entropy over blocks of `CHUNK_TOKENS` tokens, each recomputed in backward: no (B·T, V) logits."""
    causal = model.get_base_model()
    config = causal.config.get_text_config()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state  # (B, T, H)
    head = causal.get_output_embeddings()
    labels = functional.pad(batch["labels"], (0, 1), value=IGNORED)[..., 1:].reshape(-1)  # token < n predicts n
    hidden = hidden.reshape(-1, hidden.size(-1))

    def block(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = scale_logits(head(part).float(), config)
        return functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):
        total = total + checkpoint(block, part, target, use_reentrant=False)
    loss: torch.Tensor = total / items
    return loss


def scale_logits(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """What some architectures do to the head's output: Granite divides, Cohere multiplies, Gemma 2 caps softly."""
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits
