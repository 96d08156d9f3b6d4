"""Adapters on the attention projections alone: fewer trained parameters, so only with consent."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autotune.values import Device, FitRequest, ModelSource, Preserves, TrainingConfig

_SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")
_OUT_PROJ = ("q_proj", "k_proj", "v_proj", "out_proj")
_FUSED = ("query_key_value", "dense")
#: Attention projections by `model_type`, where transformers names them otherwise than Llama's.
_NAMES: dict[str, tuple[str, ...]] = {
    "bloom": _FUSED,
    "falcon": _FUSED,
    "gpt_neox": _FUSED,
    "gpt2": ("c_attn",),  # its c_proj is in the MLP too
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": _OUT_PROJ,
    "gptj": _OUT_PROJ,
    "opt": _OUT_PROJ,
    "mpt": ("Wqkv", "out_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense"),
    "phi3": ("qkv_proj", "o_proj"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FewerModules:
    """All linear layers, or a list with others in it → the attention projections."""

    name: str = "fewer_modules"
    preserves: Preserves = Preserves.CONSENT
    why: str = "saves the MLPs' adapters and what they keep for backward; costs what they can learn"

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        if not request.allow_fewer_modules:
            return None
        attention = attention_modules(request.model)
        if config.target_modules != ("all-linear",):
            attention = tuple(name for name in config.target_modules if name in attention)
        if not attention or attention == config.target_modules:
            return None
        return replace(config, target_modules=attention)

    def explains(self, before: TrainingConfig, after: TrainingConfig) -> bool:
        if before.target_modules == ("all-linear",):
            return after.target_modules != ("all-linear",)
        return set(after.target_modules) < set(before.target_modules)


def attention_modules(model: ModelSource) -> tuple[str, ...]:
    """Names of the attention's linear layers in this architecture."""
    text = model.config.get("text_config")
    kind = (text if isinstance(text, dict) else model.config).get("model_type")
    return _NAMES.get(str(kind), _SEPARATE)
