"""A fitted config in the words of transformers' Trainer, with peft and bitsandbytes."""

from __future__ import annotations

from typing import Any

from autotune.errors import InvalidRequest
from autotune.export import common
from autotune.export.common import Step, Versions
from autotune.export.script import script
from autotune.values import LossPath, Trainer, TrainingConfig

_CHUNKED_LOSS = '''
from autotune.workload.loss import chunked_loss


class ChunkedLossTrainer(Trainer):
    """Computes the loss as it was measured: head and cross-entropy over blocks of tokens."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        items = num_items_in_batch
        if items is None:
            items = inputs["labels"][:, 1:].ne(-100).sum()
        with self.accelerator.autocast():
            loss = chunked_loss(self.model, inputs, items)
        return (loss, {}) if return_outputs else loss
'''.strip()


def to_transformers(
    config: TrainingConfig,
    model_name: str,
    *,
    transformers_version: str | None = None,
    torch_version: str | None = None,
) -> dict[str, Any]:
    """Arguments of TrainingArguments, BitsAndBytesConfig, LoraConfig and from_pretrained, and the steps between.

    Versions are the installed ones unless given. Raises InvalidRequest for what this transformers cannot do.
    """
    versions = Versions(
        transformers=common.version_of("transformers", transformers_version),
        torch=common.version_of("torch", torch_version),
    )
    liger = {"use_liger_kernel": True} if config.loss is LossPath.LIGER else {}
    return {
        "trainer": "transformers",
        "model": model_name,
        "versions": {"transformers": versions.transformers, "torch": versions.torch},
        "training_arguments": {
            **common.batch(config),
            "optim": config.optimizer,
            **common.precision(config),
            **common.checkpointing(config, versions),
            **liger,
        },
        "quantization_config": common.quantization_config(config),
        "lora_config": common.lora_config(config),
        "model_kwargs": common.model_kwargs(config),
        "environment": common.environment(config, versions),
        "steps": [
            *common.launch_steps(config, Trainer.TRANSFORMERS),
            *_data_steps(config),
            *common.upcast_steps(config),
            *common.adapter_steps(config, "float32"),  # peft's autocast_adapter_dtype
            *_reentrant_steps(config, versions),
            *_loss_steps(config),
        ],
    }


def to_python(document: dict[str, Any]) -> str:
    """A script that makes the Trainer; data and learning rate are the user's."""
    made = "ChunkedLossTrainer" if common.code_of(document, "trainer") else "Trainer"
    return script(
        document,
        arguments="training_arguments",
        imports=["from transformers import Trainer, TrainingArguments", "from peft import LoraConfig, get_peft_model"],
        make="TrainingArguments",
        trainer=[
            "model = get_peft_model(load_model(), LoraConfig(**LORA_CONFIG))",
            *common.code_of(document, "adapters").splitlines(),
            f"return {made}(model=model, args=arguments, **more)",
        ],
    )


def _data_steps(config: TrainingConfig) -> list[Step]:
    code = f"tokenizer(text, truncation=True, max_length={config.sequence_length})"
    why = f"Trainer does not cut samples: {config.sequence_length} tokens is the longest that was measured"
    if config.packing:
        why += "; it does not pack either: join tokenised samples into rows of that length"
    return [{"when": "data", "why": why, "code": code}]


def _reentrant_steps(config: TrainingConfig, versions: Versions) -> list[Step]:
    """Reentrant checkpointing passes no gradient where its input has none, and frozen embeddings give none."""
    if config.gradient_checkpointing == "off" or not config.reentrant or versions.release("transformers") >= (5, 23):
        return []
    why = "reentrant checkpointing needs inputs that require gradients"
    return [{"when": "adapters", "why": why, "code": "model.enable_input_require_grads()"}]


def _loss_steps(config: TrainingConfig) -> list[Step]:
    if config.loss is not LossPath.CHUNKED:
        return []
    if config.world_size > 1:
        raise InvalidRequest(
            "transformers' Trainer has no chunked loss, and the one that was measured passes DistributedDataParallel"
            " by; export with --to trl, or set loss to liger or full in the fit file"
        )
    why = "Trainer has no chunked loss: use this class, or trl (--to trl), whose loss is chunked"
    return [{"when": "trainer", "why": why, "code": _CHUNKED_LOSS}]
