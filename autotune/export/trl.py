"""A fitted config in the words of trl's SFTTrainer."""

from __future__ import annotations

from typing import Any

from autotune.errors import InvalidRequest
from autotune.export import common
from autotune.export.common import Versions
from autotune.export.script import script
from autotune.values import Attention, LossPath, Quantization, Trainer, TrainingConfig, Upcast


def to_trl(
    config: TrainingConfig,
    model_name: str,
    *,
    trl_version: str | None = None,
    transformers_version: str | None = None,
    torch_version: str | None = None,
) -> dict[str, Any]:
    """Arguments of SFTConfig, BitsAndBytesConfig, LoraConfig and from_pretrained, and the steps between.

    Versions are the installed ones unless given. Raises InvalidRequest for what this trl cannot do.
    """
    versions = Versions(
        transformers=common.version_of("transformers", transformers_version),
        torch=common.version_of("torch", torch_version),
        trl=common.version_of("trl", trl_version),
    )
    return {
        "trainer": "trl",
        "model": model_name,
        "versions": {"trl": versions.trl, "transformers": versions.transformers, "torch": versions.torch},
        "sft_config": {
            **_length(config, versions),
            **common.batch(config),
            "optim": config.optimizer,
            **common.precision(config),
            **common.checkpointing(config, versions),
            **_loss(config, versions),
        },
        "quantization_config": common.quantization_config(config),
        "lora_config": common.lora_config(config),
        "model_kwargs": common.model_kwargs(config),
        "environment": common.environment(config, versions),
        "steps": [
            *common.launch_steps(config, Trainer.TRL),
            *_upcast_steps(config, versions),
            *common.adapter_steps(config, _native_adapter_dtype(config, versions), model="trainer.model"),
        ],
    }


def to_python(document: dict[str, Any]) -> str:
    """A script that makes the SFTTrainer; data and learning rate are the user's."""
    return script(
        document,
        arguments="sft_config",
        imports=["from peft import LoraConfig", "from trl import SFTConfig, SFTTrainer"],
        make="SFTConfig",
        trainer=[
            "trainer = SFTTrainer(model=load_model(), args=arguments, peft_config=LoraConfig(**LORA_CONFIG), **more)",
            *common.code_of(document, "adapters").splitlines(),
            "return trainer",
        ],
    )


def _length(config: TrainingConfig, versions: Versions) -> dict[str, Any]:
    """trl 0.16 renamed max_seq_length. Packing by best fit needs FlashAttention, so others pack by cutting."""
    name = "max_length" if versions.release("trl") >= (0, 16) else "max_seq_length"
    length: dict[str, Any] = {name: config.sequence_length, "packing": config.packing}
    if config.packing and versions.release("trl") >= (0, 20):
        length["packing_strategy"] = "bfd" if config.attention is Attention.FLASH_ATTENTION_2 else "wrapped"
    return length


def _loss(config: TrainingConfig, versions: Versions) -> dict[str, Any]:
    """trl 1.4 brought `chunked_nll`, its default from 1.9; from 1.15 `nll` itself is chunked and nothing else is."""
    release, trl = versions.release("trl"), f"trl {versions.trl}"
    if config.loss is LossPath.LIGER:
        if release >= (1, 15):
            raise InvalidRequest(
                f"{trl} keeps its own chunked loss where Liger's is asked for, with other memory than was measured;"
                " fit again with --trainer trl, or export with --to transformers"
            )
        return {"use_liger_kernel": True}
    if release >= (1, 15):
        if config.loss is LossPath.FULL:
            raise InvalidRequest(
                f"{trl} has no loss over the full logits, with which this was measured; fit again with"
                " --trainer trl, or export with --to transformers"
            )
        return {"loss_type": "nll"}
    if release >= (1, 4):
        return {"loss_type": "chunked_nll" if config.loss is LossPath.CHUNKED else "nll"}
    if config.loss is LossPath.CHUNKED:
        raise InvalidRequest(
            f"{trl} has no chunked loss; upgrade trl to 1.4 or newer, or export with --to transformers"
        )
    return {}


def _upcast_steps(config: TrainingConfig, versions: Versions) -> list[common.Step]:
    """Before 0.26 trl itself prepared a quantised model: norms float32, the rest back to 16 bits."""
    prepares = versions.release("trl") < (0, 26) and config.quantization is Quantization.NF4
    if not prepares:
        return common.upcast_steps(config)
    if config.upcast is not Upcast.NORMS:
        raise InvalidRequest(
            f"trl {versions.trl} upcasts the norms of a quantised model to float32 whatever it is told, and this was"
            f" measured with upcast {config.upcast.value}; upgrade trl to 0.26 or newer"
        )
    return []


def _native_adapter_dtype(config: TrainingConfig, versions: Versions) -> str:
    """From 0.26 trl casts the adapters of a quantised model to bfloat16; peft's own choice is float32."""
    casts = versions.release("trl") >= (0, 26) and config.quantization is Quantization.NF4
    return "bfloat16" if casts else "float32"
