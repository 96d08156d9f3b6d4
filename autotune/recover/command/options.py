"""Options among a command's words: read as the trainer's parser reads them, and rewritten where they stand."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.recover.command.stated import Stated, is_truth
from autotune.recover.command.words import Parts

_SHORTEST = len("gradient_accumul")  # an abbreviation with fewer letters is not taken for a name
_FLAGS = ("gradient_checkpointing", "activation_checkpointing", "disable_gradient_checkpointing")  # value or none
_LISTS = ("lora_target_modules",)  # one value or more


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option with its value."""

    key: str  # the trainer's name, with underscores
    at: int  # its word
    name: str  # as spelled, with its dashes; without a value
    values: tuple[str, ...]  # none: a bare flag
    joined: bool  # name=value in one word
    negated: bool = False  # --no_name

    @property
    def stated(self) -> Stated:
        value: Any = self.values[0] if len(self.values) == 1 else list(self.values)
        return Stated(value if self.values else not self.negated, self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How this program's options are spelled."""

    assignments: bool = False  # name=value without dashes (OmegaConf)
    dashes: bool = False  # --with-dashes
    lower: bool = False  # true and false, not True and False
    bare: bool = False  # a flag takes no value


def scan(words: Sequence[str], parts: Parts, known: Collection[str], style: Style) -> dict[str, Option]:
    """The options of `known` names in the arguments, by name; of one that is repeated, the last."""
    found: dict[str, Option] = {}
    for at in range(parts.begin, parts.end):
        name, equals, value = words[at].partition("=")
        if not name.startswith("--") and not (style.assignments and equals):
            continue
        key, negated = _key(name, known)
        if key is None:
            continue
        values = (value,) if equals else _values(words, at + 1, parts.end)
        if not equals and key not in _LISTS:
            values = values[:1]
        if not equals and key in _FLAGS and not (values and is_truth(values[0])):
            values = ()
        option = Option(key=key, at=at, name=name, values=values, joined=bool(equals), negated=negated)
        found.pop(key, None)
        found[key] = option
    return found


def rewrite(
    words: Sequence[str], parts: Parts, options: Mapping[str, Option], edits: Mapping[str, Any], style: Style
) -> tuple[list[str], list[str]]:
    """The words with `edits` (name → value) made, and a line for each. Nothing else changes, nor its order."""
    changed: dict[int, list[str]] = {}
    added: list[str] = []
    shown: list[str] = []
    for key, value in edits.items():
        option = options.get(key)
        if option is None:
            new = _added(key, value, style)
            added += new
            shown.append(f"{' '.join(new)} (added)")
        elif (new_words := _replaced(words, parts, option, value, style)) is not None:
            before = [words[at] for at in sorted(new_words)]
            after = [word for at in sorted(new_words) for word in new_words[at]]
            changed |= new_words
            shown.append(_change(before, after))
    result = [word for at, old in enumerate(words) for word in changed.get(at, [old])]
    end = parts.end + len(result) - len(words)
    return [*result[:end], *added, *result[end:]], [line for line in shown if line]


def _key(name: str, known: Collection[str]) -> tuple[str | None, bool]:
    """The option that a name stands for, and whether it denies it. Long enough abbreviations count, as in argparse."""
    key = name.lstrip("-").replace("-", "_")
    if key in known:
        return key, False
    if key.startswith("no_") and key[3:] in known:
        return key[3:], True
    longer = [one for one in known if len(key) >= _SHORTEST and one.startswith(key)]
    return (longer[0] if len(longer) == 1 else None), False


def _values(words: Sequence[str], begin: int, end: int) -> tuple[str, ...]:
    stop = begin
    while stop < end and (not words[stop].startswith("-") or words[stop][1:2].isdigit()):
        stop += 1
    return tuple(words[begin:stop])


def _replaced(
    words: Sequence[str], parts: Parts, option: Option, value: Any, style: Style
) -> dict[int, list[str]] | None:
    """New words by place; None where it says so already."""
    if option.joined:
        old = option.values[0]
        return {option.at: [f"{option.name}={_like(value, old, style)}"]}
    if option.values:
        return {option.at: [option.name], option.at + 1: [_like(value, option.values[0], style)]}
    if value is (not option.negated):
        return None
    if style.bare and not option.negated:
        return {option.at: []}
    name = option.name.replace("--no_", "--", 1).replace("--no-", "--", 1) if option.negated else option.name
    alone = value is True and not _values(words, option.at + 1, parts.end)
    return {option.at: [name if alone else f"{name}={_text(value, style)}"]}


def _change(before: list[str], after: list[str]) -> str:
    """A line for a change, with the name once; empty where there is none."""
    if before == after:
        return ""
    if len(before) == len(after) == 2 and before[0] == after[0]:
        return f"{before[0]} {before[1]} → {after[1]}"
    return f"{' '.join(before)} → {' '.join(after) or '(left out)'}"


def _added(key: str, value: Any, style: Style) -> list[str]:
    if style.assignments:
        return [f"{key}={_text(value, style)}"]
    name = f"--{key.replace('_', '-') if style.dashes else key}"
    return [name] if style.bare and value is True else [name, _text(value, style)]


def _like(value: Any, old: str, style: Style) -> str:
    """Text of a value, written as the old one was."""
    text = _text(value, style)
    if not isinstance(value, bool) or not is_truth(old):
        return text
    pairs = {"yes": "no", "y": "n", "t": "f", "1": "0", "true": "false"}
    for yes, no in pairs.items():
        if old.lower() in (yes, no):
            word = yes if value else no
            return word.capitalize() if old[:1].isupper() else word
    return text


def _text(value: Any, style: Style) -> str:
    if isinstance(value, bool):
        return str(value).lower() if style.lower else str(value)
    return json.dumps(value) if isinstance(value, dict) else str(value)
