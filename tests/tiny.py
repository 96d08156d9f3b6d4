"""A model small enough for seconds of real training, and the requests that tests make of it."""

from __future__ import annotations

from typing import Any

from autotune.values import MIB, Environment, ModelSource, ProbeRequest, TrainingConfig, from_json, to_json

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
MODEL = ModelSource(name="tiny", config=CONFIG)
ENVIRONMENT = Environment(
    driver=None,
    torch="2.13.0",
    transformers="5.23.0",
    peft="0.21.2",
    bitsandbytes="0.50.2",
    accelerate="1.15.0",
    trl=None,
    python="3.11",
    os="Linux",
    threads=2,
)


def a_config(**changes: Any) -> TrainingConfig:
    """64 tokens, one sample twice; `changes` may be plain text where the field is an enum."""
    fields = {"sequence_length": 64, "micro_batch_size": 1, "gradient_accumulation_steps": 2, **changes}
    return from_json(TrainingConfig, to_json(fields))


def a_probe(*, limit_mib: int | None = 400, **changes: Any) -> ProbeRequest:
    fields: dict[str, Any] = {"model": MODEL, "config": a_config(), "device": "cpu"}
    return ProbeRequest(**{**fields, "memory_limit_bytes": limit_mib and limit_mib * MIB, **changes})
