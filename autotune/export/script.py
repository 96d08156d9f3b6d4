"""A document of arguments and steps as a Python script that makes the trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from autotune.export.common import code_of


def script(
    document: dict[str, Any], *, arguments: str, imports: Sequence[str], make: str, trainer: Sequence[str]
) -> str:
    """Python source with `arguments(output_dir, **more)`, `load_model()` and `make_trainer(arguments, **more)`.

    `arguments` names the section of `document` and the function, `make` the class it calls; `trainer` is the body of
    `make_trainer`.
    """
    quantised = document["quantization_config"] is not None
    sections = [arguments, "quantization_config", "lora_config", "model_kwargs"]
    constants = [_constant(name, document[name]) for name in sections if document[name] is not None]
    names = "AutoModelForCausalLM, BitsAndBytesConfig" if quantised else "AutoModelForCausalLM"
    head = [
        _docstring(document, arguments),
        *_environment(document["environment"]),
        "\n".join([f"from transformers import {names}", *imports]),
        "\n".join([f"MODEL = {_literal(document['model'])}", *constants]),
    ]
    call = f"return {make}(output_dir=output_dir, **({arguments.upper()} | more))"
    definitions = [
        *([code] if (code := code_of(document, "trainer")) else []),
        _function(f"{arguments}(output_dir, **more)", [call]),
        _function("load_model()", [*_load(quantised), *code_of(document, "model").splitlines(), "return model"]),
        _function("make_trainer(arguments, **more)", trainer),
    ]
    return "\n\n\n".join(["\n\n".join(head), *definitions]) + "\n"


def _docstring(document: dict[str, Any], arguments: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines = [
        f"QLoRA with {document['trainer']}, as autotune fitted it. Written for {versions}.",
        "",
        "Add your data and your learning rate, then train:",
        "",
        f'    make_trainer({arguments}("output", learning_rate=2e-4), train_dataset=...).train()',
        "",
        *(f"- {step['when']}: {step['why']}{_command(step)}" for step in document["steps"]),
    ]
    text = "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{text}\n"""'


def _command(step: dict[str, str]) -> str:
    """What the script does not do itself."""
    return f": {step['code']}" if step["when"] in ("launch", "data") else ""


def _environment(variables: dict[str, str]) -> list[str]:
    lines = [f"os.environ[{_literal(name)}] = {_literal(value)}" for name, value in variables.items()]
    return ["import os", "# torch reads it when it starts\n" + "\n".join(lines)] if lines else []


def _constant(name: str, value: dict[str, Any]) -> str:
    lines = [f"    {json.dumps(key)}: {_literal(item)}," for key, item in value.items()]
    return "\n".join([f"{name.upper()} = {{", *lines, "}"])


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _function(signature: str, body: Sequence[str]) -> str:
    return "\n".join([f"def {signature}:", *(f"    {line}" for line in body)])


def _load(quantised: bool) -> list[str]:
    if not quantised:
        return ["model = AutoModelForCausalLM.from_pretrained(MODEL, **MODEL_KWARGS)"]
    return [
        "quantization = BitsAndBytesConfig(**QUANTIZATION_CONFIG)",
        "model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=quantization, **MODEL_KWARGS)",
    ]
