"""The frozen base model from a config.json: NF4 codes and scales built directly, so no 16-bit weight ever exists.

Library calls stay the libraries' own (which layers are quantised, what a `QuantState` holds, how each class
initialises itself); only the loading of a checkpoint is left out. A test compares every tensor's size with what
`from_pretrained` makes.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from autotune.values import ModelSource, Quantization, TrainingConfig

BLOCKSIZE = 64  # bitsandbytes' default for NF4
NESTED_BLOCKSIZE = 256  # of the second quantisation, fixed in bitsandbytes' quantize_4bit
#: What transformers' config and model classes raise for a config.json that makes no sense.
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError, StrictDataclassError)
_CODE_STD = 0.5566  # standard deviation of the sixteen NF4 levels, drawn evenly


class UnsupportedModel(ValueError):
    """The config names a model that cannot be trained this way; the message says why.

    `lacks`: the setting of the config that another value would mend, where that is known.
    """

    def __init__(self, message: str, *, lacks: str | None = None) -> None:
        super().__init__(message)
        self.lacks = lacks


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A frozen model on its device, before dtype preparation and adapters."""

    model: Any  # transformers.PreTrainedModel
    device: torch.device
    unquantized_bytes: int  # weights of linear maps held as 3-D parameters, which bitsandbytes leaves in 16 bits
    parameters: int  # of the model as published: a 4-bit weight counts its elements


def build_base(source: ModelSource, config: TrainingConfig, device: torch.device, *, seed: int = 0) -> BaseModel:
    """The model of `source` on `device` ("meta" too), 4-bit unless `config.quantization` is none.

    Raises `UnsupportedModel` for an architecture that transformers does not know, one that is no causal language
    model, or one with no layer that can be quantised.
    """
    quantised = config.quantization is Quantization.NF4
    if source.weights == "real":
        model = _load(source, config, device)
        parameters = model.num_parameters()
    else:
        torch.manual_seed(seed)
        model = _skeleton(source, config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if quantised:
            _replace_linears(model, source.name, config)
        if device.type != "meta":
            _materialise(model, device)
        if quantised:
            _quantise_weights(model, device)
        model.is_loaded_in_4bit = quantised
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in _linears(model):
        # On the CPU an evaluation repacks the weights for inference, in place and for good, and fails for widths that
        # are no multiple of 64 (bitsandbytes 0.50.2, Linear4bit.forward): a rehearsal keeps them as they train.
        module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    return BaseModel(
        model=model,
        device=device,
        unquantized_bytes=_expert_bytes(model) if quantised else 0,
        parameters=parameters,
    )


def _skeleton(source: ModelSource, config: TrainingConfig) -> Any:
    from transformers import AutoModelForCausalLM

    hf_config = hf_config_of(source)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                hf_config,
                dtype=getattr(torch, config.compute_dtype),
                attn_implementation=config.attention.value,
            )
    except (ImportError, *_REFUSALS) as error:
        if "does not support an attention implementation" in str(error):
            raise UnsupportedModel(
                f"transformers has no attention {config.attention.value} for {source.name}: give --attention eager",
                lacks="attention",
            ) from error
        raise UnsupportedModel(f"transformers cannot build {source.name}: {_reason(error)}") from error


def hf_config_of(source: ModelSource) -> Any:
    """transformers' config object for `source`; of a multimodal model, its text tower. Runs no code of the model's."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = source.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModel(f"transformers does not know the architecture {kind!r} of {source.name}")
    try:
        hf_config = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(source.config))
    except _REFUSALS as error:
        raise UnsupportedModel(f"transformers refuses the config of {source.name}: {_reason(error)}") from error
    return hf_config.get_text_config(decoder=True)


def _load(source: ModelSource, config: TrainingConfig, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    quantised = config.quantization is Quantization.NF4
    return AutoModelForCausalLM.from_pretrained(
        source.folder,
        dtype=getattr(torch, config.compute_dtype),
        attn_implementation=config.attention.value,
        device_map={"": device},
        local_files_only=True,
        trust_remote_code=False,
        **({"quantization_config": quantization_config(config)} if quantised else {}),
    )


def quantization_config(config: TrainingConfig) -> Any:
    """transformers' `BitsAndBytesConfig` for this config."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, config.compute_dtype),
    )


def _replace_linears(model: Any, name: str, config: TrainingConfig) -> None:
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    replace_with_bnb_linear(
        model,
        modules_to_not_convert=_kept_in_16_bits(model),
        quantization_config=quantization_config(config),
    )
    if not _linears(model):
        raise UnsupportedModel(f"{name} has no linear layer that can be quantised to 4 bits: QLoRA has nothing to do")


def _kept_in_16_bits(model: Any) -> list[str]:
    try:
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError:  # transformers < 5
        from transformers.integrations.bitsandbytes import get_keys_to_not_convert
    return list(get_keys_to_not_convert(model)) + list(getattr(model, "_keep_in_fp32_modules", None) or [])


def _linears(model: Any) -> list[Any]:
    import bitsandbytes as bnb

    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def _materialise(model: Any, device: torch.device) -> None:
    """Give every meta tensor real memory on `device`, then let each class initialise itself.

    Weights to be quantised stay on meta: there, what GPT-2's or Mamba's classes do to them does nothing.
    """
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    quantised = {id(module) for module in _linears(model)}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.device.type != "meta" or (id(module) in quantised and name == "weight"):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.zeros_like(buffer, device=device)
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if id(module) not in quantised:
                model._init_weights(module)
                _rebuild_empty_rotary(model, name, module, device)
            elif module.bias is not None:
                module.bias.zero_()
    model.tie_weights()


def _rebuild_empty_rotary(model: Any, name: str, module: nn.Module, device: torch.device) -> None:
    """Rotary classes of transformers < 5 compute their frequencies only when they are made."""
    frequency = getattr(module, "inv_freq", None)
    if isinstance(frequency, torch.Tensor) and not bool(frequency.any()):
        arguments: dict[str, Any] = {"config": module.config}
        if "device" in inspect.signature(type(module).__init__).parameters:
            arguments["device"] = device
        model.set_submodule(name, type(module)(**arguments).to(device))


def _quantise_weights(model: Any, device: torch.device) -> None:
    std = float(getattr(model.config, "initializer_range", None) or 0.02)
    for module in _linears(model):
        module.weight = nf4_weight(module, device=device, std=std)


def nf4_weight(module: Any, *, device: torch.device, std: float) -> Any:
    """Random NF4 codes with scales that give weights of standard deviation `std`, for one `Linear4bit`.

    Bytes: n/2 codes, and per 64 weights either a float32 scale or, double-quantised, one byte with a float32 per 256
    of them (bitsandbytes.functional.quantize_4bit).
    """
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    shape = torch.Size((module.out_features, module.in_features))
    blocks = -(-shape.numel() // BLOCKSIZE)
    scale = std / _CODE_STD
    nested: dict[str, Any] = {"absmax": torch.full((blocks,), scale, dtype=torch.float32, device=device)}
    if module.weight.compress_statistics:
        nested = {
            "absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
            "offset": torch.full((), scale, dtype=torch.float32, device=device),
            "state2": QuantState(
                absmax=torch.full((-(-blocks // NESTED_BLOCKSIZE),), scale / 8, dtype=torch.float32, device=device),
                code=create_dynamic_map().to(device),
                blocksize=NESTED_BLOCKSIZE,
                dtype=torch.float32,
            ),
        }
    state = QuantState(
        shape=shape,
        dtype=module.compute_dtype or torch.bfloat16,
        blocksize=BLOCKSIZE,
        code=get_4bit_type("nf4", device="cpu").to(device),
        quant_type="nf4",
        **nested,
    )
    module.quant_state = state
    return bnb.nn.Params4bit(
        torch.randint(0, 256, (-(-shape.numel() // 2), 1), dtype=torch.uint8, device=device),
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCKSIZE,
        compress_statistics=module.weight.compress_statistics,
        quant_type="nf4",
        quant_storage=torch.uint8,
        module=module,
        bnb_quantized=True,
    )


def _expert_bytes(model: Any) -> int:
    """Bytes of floating-point parameters with three dimensions or more: stacked linear maps that stay 16-bit."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.ndim >= 3 and p.is_floating_point())


def _reason(error: BaseException) -> str:
    """What it says as one line: the first line of transformers' refusals often names only the check that failed."""
    return " ".join(str(error)[:2000].split())[:300] or type(error).__name__
