"""How --fix, --exclude and --space narrow a search: read from text, checked, asked of a config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.errors import InvalidRequest, UsageError
from autotune.search.dimensions import SEARCHED, samples_of_one_gpu, unasked
from autotune.values import AllocatorSetting, Attention, Device, FitRequest, LossPath, TrainingConfig, Upcast

Pairs = tuple[tuple[str, Any], ...]  # (field of TrainingConfig, value as plain JSON data)

_LARGEST = 2**20  # micro batch size, as --effective-batch-size has it
_CHOICES: dict[str, type[Attention] | type[LossPath] | type[Upcast] | type[AllocatorSetting]] = {
    "attention": Attention,
    "loss": LossPath,
    "upcast": Upcast,
    "allocator": AllocatorSetting,
}
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


def read_narrowing(fix: Iterable[str], exclude: Iterable[str], space: Any = None) -> Narrowing:
    """From the texts of --fix and --exclude and the data of a --space file (None: there is none).

    Raises `UsageError` for what contradicts itself on the command line, `InvalidRequest` for a wrong file.
    """
    fixed = [_pair(text, "--fix") for text in fix]
    excluded = [_pair(text, "--exclude") for text in exclude]
    _check_once(fixed)
    from_file = read_space(space) if space is not None else Narrowing()
    narrowing = Narrowing(
        fixed=tuple(dict.fromkeys([*fixed, *from_file.fixed])),
        excluded=tuple(dict.fromkeys([*excluded, *from_file.excluded])),
    )
    _check_agree(fixed, from_file.fixed)
    _check_something_left(narrowing)
    return _only_stated(narrowing, fixed)


def read_space(data: Any) -> Narrowing:
    """A --space file: `fix:` and `exclude:` of fields, or a field with the values it may have.

    Raises `InvalidRequest`.
    """
    if not isinstance(data, Mapping):
        raise InvalidRequest("--space: the file holds no fields: write lines such as attention: [sdpa, eager]")
    fixed: list[tuple[str, Any]] = []
    excluded: list[tuple[str, Any]] = []
    for name, values in data.items():
        try:
            if name in ("fix", "exclude"):
                (fixed if name == "fix" else excluded).extend(_section(values, name))
            else:
                fixed.extend(_values(str(name), values, "--space"))
        except UsageError as error:
            raise InvalidRequest(str(error)) from error
    return Narrowing(fixed=tuple(dict.fromkeys(fixed)), excluded=tuple(dict.fromkeys(excluded)))


def _section(values: Any, name: str) -> Iterable[tuple[str, Any]]:
    """`fix:` or `exclude:` as fields with values, or as a list of "field=value"."""
    if isinstance(values, Mapping):
        return [pair for field, each in values.items() for pair in _values(str(field), each, "--space")]
    if isinstance(values, list) and all(isinstance(one, str) for one in values):
        return [_pair(one, "--space") for one in values]
    raise UsageError(f"--space: {name} holds no fields: write lines such as attention: sdpa below it")


def _values(field: str, values: Any, option: str) -> list[tuple[str, Any]]:
    each = values if isinstance(values, list) else [values]
    if not each:
        raise UsageError(f"{option}: {field} has no values: name at least one, or leave the field out")
    return [(field, _value(field, one, option)) for one in each]


def _pair(text: str, option: str) -> tuple[str, Any]:
    field, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not field or not value:
        raise UsageError(f"{option} {text[:80]}: give a field and a value, such as attention=sdpa")
    field = field.replace("-", "_")
    return field, _value(field, value, option)


def _value(field: str, value: Any, option: str) -> Any:
    """One value as plain data. Raises `UsageError` for an unknown field and for a value that it cannot have."""
    if field in _ELSEWHERE:
        raise UsageError(f"{option}: {field} {_ELSEWHERE[field]}")
    if field not in SEARCHED:
        near = difflib.get_close_matches(field[:80], SEARCHED, n=1)
        which = f"did you mean {near[0]}?" if near else f"fields are {', '.join(SEARCHED)}"
        raise UsageError(f"{option}: {field[:80]!r} is no field of a search; {which}")
    found = _parsed(field, value)
    if found is None:
        raise UsageError(f"{option}: {field} cannot be {str(value)[:80]}: give {_legal(field)}")
    return found


def _parsed(field: str, value: Any) -> Any:
    """None where the field cannot have it. YAML reads off, true and 4 as what they look like."""
    if field == "micro_batch_size":
        text = "" if isinstance(value, bool) else str(value)
        return int(text) if re.fullmatch("[0-9]{1,7}", text) and 0 < int(text) <= _LARGEST else None
    if field in ("double_quant", "packing"):
        return _FLAGS.get(str(value).lower())
    if field == "gradient_checkpointing" and value is False:
        return "off"
    if not isinstance(value, str):
        return None
    if field == "gradient_checkpointing":
        return value if _is_checkpointing(value) else None
    if field in _CHOICES:
        return value if value in list(_CHOICES[field]) else None
    return value


def _is_checkpointing(value: str) -> bool:
    try:
        TrainingConfig(sequence_length=1, micro_batch_size=1, gradient_checkpointing=value)
    except ValueError:
        return False
    return True


def _legal(field: str) -> str:
    if field in _CHOICES:
        return f"one of {', '.join(_CHOICES[field])}"
    return {
        "micro_batch_size": "a whole number, 1 or more",
        "gradient_checkpointing": "off, full, offload or every_N, such as every_2",
        "optimizer": "one of transformers' names",
    }.get(field, "true or false")


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


def _only_stated(narrowing: Narrowing, fixed: Sequence[tuple[str, Any]]) -> Narrowing:
    """Of a field that --fix names only that value; in an order that does not depend on how it was given."""
    stated = dict(fixed)
    pairs = [pair for pair in narrowing.fixed if stated.get(pair[0], pair[1]) == pair[1]]
    return Narrowing(fixed=_sorted(pairs), excluded=_sorted(narrowing.excluded))


def _check_something_left(narrowing: Narrowing) -> None:
    """A field whose every fixed value is excluded."""
    for field in dict(narrowing.fixed):
        values = [value for name, value in narrowing.fixed if name == field]
        if all((field, value) in narrowing.excluded for value in values):
            raise UsageError(f"{field}={_list(values)} is fixed and excluded: leave one of the two out")


def _sorted(pairs: Iterable[tuple[str, Any]]) -> Pairs:
    return tuple(sorted(pairs, key=lambda pair: (pair[0], str(pair[1]).rjust(8))))


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
    if any(size in near for size in fixed) and not request.allow_near:
        near_too = f", or --allow near: {_list(fixed)} then takes nearly as many samples"
    else:
        near_too = ""
    raise InvalidRequest(
        f"nothing is left to try: {name} is fixed to {_list(fixed)}, which does not divide the {samples} samples of an"
        f" optimizer step: give one of {_few(exact)}{near_too}"
    )


def _few(sizes: Sequence[int]) -> str:
    shown = [*sizes[:12], "…"] if len(sizes) > 12 else sizes
    return ", ".join(map(str, shown))


def _fixed_values(request: FitRequest, name: str) -> list[Any]:
    """The values that a field is fixed to; none: it is free."""
    return [value for field, value in request.fixed if field == name]
