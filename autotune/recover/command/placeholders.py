"""Placeholders such as {micro_batch_size} in a command's words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from autotune.errors import InvalidRequest
from autotune.recover.command.dialect import FIELDS

RESUME = "resume_from_checkpoint"
_NAME = re.compile(r"(?<!\{)\{(" + "|".join(sorted(FIELDS)) + r")\}(?!\})")
_CHECKPOINTING = re.compile(r"--(no[-_])?(gradient|activation)[-_]checkpointing", re.ASCII)


def names_in(words: Sequence[str]) -> frozenset[str]:
    """The settings that have a placeholder. Other words in braces are the command's own."""
    return frozenset(name for word in words for name in _NAME.findall(word))


def fill(words: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """The words with their placeholders filled. Nothing to resume from: the word is left empty, or out with its option.

    Raises InvalidRequest, saying what to give, for a setting without a value.
    """
    filled: list[str] = []
    for at, word in enumerate(words):
        before = words[at - 1] if at else ""
        if RESUME in _NAME.findall(word) and values.get(RESUME) is None:
            if re.fullmatch(r"-[^=]*=\{" + RESUME + r"\}", word):
                continue
            if word == f"{{{RESUME}}}" and before.startswith("-") and "=" not in before:
                filled.pop()
                continue
        option = word.partition("=")[0] if "=" in word else before
        filled.append(_substituted(word, values, option))
    return filled


def _substituted(word: str, values: Mapping[str, Any], option: str) -> str:
    return _NAME.sub(lambda match: _text(match[1], values, option), word)


def _text(name: str, values: Mapping[str, Any], option: str) -> str:
    value = values.get(name)
    if name == "eval_micro_batch_size" and value is None:
        value = values.get("micro_batch_size")
    if value is None:
        if name == RESUME:
            return ""
        raise InvalidRequest(
            f"{{{name}}} in the command has no value to start with: give --plan with a fit file, or write the value"
        )
    if name == "gradient_checkpointing" and _CHECKPOINTING.fullmatch(option):
        return str(value != "off")  # the option itself takes true or false
    if isinstance(value, tuple | list):
        return ",".join(str(one) for one in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
