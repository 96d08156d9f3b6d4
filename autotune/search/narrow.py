"""How --fix, --exclude and --space narrow a search: read from text, checked, asked of a config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.configfile import field_value
from autotune.errors import InvalidRequest, UsageError
from autotune.search.dimensions import SEARCHED, samples_of_one_gpu, unasked
from autotune.values import Device, FitRequest

Pairs = tuple[tuple[str, Any], ...]  # (field of TrainingConfig, value as plain JSON data)

_FLAGS = {"true": True, "false": False}
#: Fields of TrainingConfig that something else decides.
_ELSEWHERE = {
    "sequence_length": "is changed by consent alone: use --sequence-length and --min-sequence-length",
    "lora_rank": "is changed by consent alone: use --lora-rank and --min-lora-rank",
    "target_modules": "is changed by consent alone: use --target-modules and --allow-fewer-modules",
    "gradient_accumulation_steps": "follows the micro batch: use micro_batch_size",
    "effective_batch_size": "is kept: use --effective-batch-size",
    "lora_alpha": "is not searched: use --lora-alpha",
    "lora_dropout": "is not searched: use --lora-dropout",
    "compute_dtype": "is not searched: use --compute-dtype",
    "trainer": "is not searched: use --trainer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrowing:
    """What may be tried, as a request has it."""

    fixed: Pairs = ()
    excluded: Pairs = ()


def read_narrowing(fix: Iterable[str], exclude: Iterable[str], space: Mapping[str, Any]) -> Narrowing:
    """From the texts of --fix and --exclude and the keys of a --space file.

    Raises `UsageError` for a wrong option and for what contradicts itself, `InvalidRequest` for a wrong file.
    """
    stated = [_pair(text, "--fix") for text in fix]
    _check_once(stated)
    try:
        of_file = _read_space(space)
    except UsageError as error:
        raise InvalidRequest(str(error)) from error
    _check_agree(stated, of_file.fixed)
    fields = dict(stated)
    fixed = [*stated, *(pair for pair in of_file.fixed if pair[0] not in fields)]
    excluded = [*(_pair(text, "--exclude") for text in exclude), *of_file.excluded]
    _check_something_left(fixed, excluded)
    return Narrowing(fixed=_sorted(fixed), excluded=_sorted(excluded))


def _read_space(data: Mapping[str, Any]) -> Narrowing:
    """`fix` and `exclude` with lists of "field=value", and fields with the values that they may have."""
    lists: dict[str, list[tuple[str, Any]]] = {"fix": [], "exclude": []}
    for name, values in data.items():
        each = values if isinstance(values, list) else [values]
        if name in lists:
            lists[name] += [_pair(str(text), f"--space, {name}") for text in each]
        else:
            lists["fix"] += _values(name, each, "--space")
    return Narrowing(fixed=tuple(lists["fix"]), excluded=tuple(lists["exclude"]))


def _values(field: str, values: list[Any], option: str) -> list[tuple[str, Any]]:
    if not values:
        raise UsageError(f"{option}: {field} has no values: name at least one, or leave the field out")
    return [(field, _value(field, one, option)) for one in values]


def _pair(text: str, option: str) -> tuple[str, Any]:
    field, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not field or not value:
        raise UsageError(f"{option} {text[:80]}: give a field and a value, such as attention=sdpa")
    field = field.replace("-", "_")
    return field, _value(field, _plain(value), option)


def _value(field: str, value: Any, option: str) -> Any:
    """One value as plain data. Raises `UsageError` for an unknown field and for a value that it cannot have."""
    if field in _ELSEWHERE:
        raise UsageError(f"{option}: {field} {_ELSEWHERE[field]}")
    if field not in SEARCHED:
        near = difflib.get_close_matches(field[:80], SEARCHED, n=1)
        which = f"did you mean {near[0]}?" if near else f"fields are {', '.join(SEARCHED)}"
        raise UsageError(f"{option}: {field[:80]!r} is no field of a search; {which}")
    try:
        return field_value(field, value)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


def _plain(text: str) -> Any:
    """A value of the command line as YAML would read it; off stays text."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else _FLAGS.get(text.lower(), text)


def _check_once(fixed: Sequence[tuple[str, Any]]) -> None:
    """A field fixed twice to different values."""
    first: dict[str, Any] = {}
    for field, value in fixed:
        if first.setdefault(field, value) != value:
            raise UsageError(
                f"--fix {field}={_shown(first[field])} and --fix {field}={_shown(value)} contradict each other: give"
                f" one, or both in a --space file ({field}: [{_shown(first[field])}, {_shown(value)}])"
            )


def _check_agree(fixed: Sequence[tuple[str, Any]], from_file: Pairs) -> None:
    """--fix chooses among the values that the file has."""
    for field, value in fixed:
        allowed = [other for name, other in from_file if name == field]
        if allowed and value not in allowed:
            raise UsageError(
                f"--fix {field}={_shown(value)} contradicts --space, which allows {_list(allowed)}: change one of them"
            )


def _check_something_left(fixed: Sequence[tuple[str, Any]], excluded: Sequence[tuple[str, Any]]) -> None:
    """A field whose every fixed value is excluded."""
    for field in dict(fixed):
        values = [value for name, value in fixed if name == field]
        if all((field, value) in excluded for value in values):
            raise UsageError(f"{field}={_list(values)} is fixed and excluded: leave one of the two out")


def _sorted(pairs: Iterable[tuple[str, Any]]) -> Pairs:
    """Each once, in an order that does not depend on how they were given: equal requests are answered alike."""
    return tuple(sorted(dict.fromkeys(pairs), key=lambda pair: (pair[0], str(pair[1]).rjust(20))))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _list(values: Iterable[Any]) -> str:
    return " or ".join(map(_shown, values))


def kept(request: FitRequest, name: str, value: Any) -> bool:
    """Whether the request's narrowing leaves this value of a field in."""
    return refusal(request, name, value) is None


def refusal(request: FitRequest, name: str, value: Any) -> str | None:
    """Why the request's narrowing leaves this value out; None where it is in."""
    fixed = _fixed_values(request, name)
    if fixed and value not in fixed:
        return f"{name} is fixed to {_list(fixed)}"
    return f"{name}={_shown(value)} is excluded" if (name, value) in request.excluded else None


def check_left(request: FitRequest, device: Device, name: str, left: Sequence[Any], reasons: Mapping[str, str]) -> None:
    """`left` are the values of a setting after narrowing, `reasons` say of "field=value" why it cannot run.

    Raises `InvalidRequest` where none is left.
    """
    if left:
        return
    fixed = [value for value in _fixed_values(request, name) if (name, value) not in request.excluded]
    if not fixed:
        raise InvalidRequest(
            f"nothing is left to try: every value of {name} that can run here is excluded: leave one in"
        )
    why = [reasons.get(f"{name}={value}") or unasked(request, device, name, value) for value in fixed]
    raise InvalidRequest(
        f"nothing is left to try: {name} is fixed to {_list(fixed)}, but {'; '.join(why)}."
        f" Fix another value, or leave {name} free"
    )


def check_sizes_left(request: FitRequest, left: Sequence[int], exact: Sequence[int], near: Sequence[int]) -> None:
    """`left` are the micro batch sizes after narrowing, `exact` and `near` those before.

    Raises `InvalidRequest` where none is left.
    """
    if left:
        return
    name, samples = "micro_batch_size", samples_of_one_gpu(request.start)
    fixed = _fixed_values(request, name)
    if not fixed:
        raise InvalidRequest(f"nothing is left to try: every {name} is excluded: leave one of {_few(exact)} in")
    known = sorted([*exact, *near]) if request.allow_near else exact
    nearly = [size for size in fixed if size in near]
    offer = f", or --allow near: {_list(nearly)} then takes nearly as many samples" if nearly else ""
    raise InvalidRequest(
        f"nothing is left to try: {name} is fixed to {_list(fixed)}, which does not divide the {samples} samples of an"
        f" optimizer step{' nearly' * request.allow_near}: give one of {_few(known)}{offer}"
    )


def _few(sizes: Sequence[int]) -> str:
    shown = [*sizes[:12], "…"] if len(sizes) > 12 else sizes
    return ", ".join(map(str, shown))


def _fixed_values(request: FitRequest, name: str) -> list[Any]:
    """The values that a field is fixed to; none: it is free."""
    return [value for field, value in request.fixed if field == name]
