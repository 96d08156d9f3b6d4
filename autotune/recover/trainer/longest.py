"""The longest sample of a training set, where the set tells it at once."""

from __future__ import annotations

import importlib
import time
from typing import Any

LIMIT_S = 1.0
_ENTRIES = 50_000  # of a list that is looked through
_LENGTHS = ("length", "lengths")
_TOKENS = "input_ids"


def longest_sample(dataset: Any, limit_s: float = LIMIT_S) -> int | None:
    """Tokens of the longest sample; None where finding out could take longer than about `limit_s`."""
    try:
        return _longest(dataset, limit_s)
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        NotImplementedError,
        OSError,
        TypeError,
        ValueError,
    ):
        return None  # a set of another kind than it looks like


def _longest(dataset: Any, limit_s: float) -> int | None:
    columns = getattr(dataset, "column_names", None)
    table = getattr(dataset, "data", None)
    if isinstance(columns, list) and table is not None and hasattr(table, "column"):
        return _of_arrow(table, columns, getattr(dataset, "_indices", None), limit_s)
    if isinstance(dataset, list | tuple) and len(dataset) <= _ENTRIES:
        return _of_list(dataset, limit_s)
    return None


def _of_arrow(table: Any, columns: list[str], indices: Any, limit_s: float) -> int | None:
    name = next((name for name in (_TOKENS, *_LENGTHS) if name in columns), None)
    if name is None:
        return None
    types, compute = importlib.import_module("pyarrow.types"), importlib.import_module("pyarrow.compute")
    column, end = table.column(name), time.monotonic() + limit_s
    kept = None if indices is None else indices.column(0).combine_chunks()
    longest, start = None, 0
    for chunk in column.chunks:  # memory-mapped: only the offsets of the lists are read
        if time.monotonic() > end:
            return None
        if types.is_integer(chunk.type):
            lengths = chunk
        elif types.is_list(chunk.type) or types.is_large_list(chunk.type):
            lengths = compute.list_value_length(chunk)
        else:
            return None
        if kept is not None:
            inside = compute.and_(compute.greater_equal(kept, start), compute.less(kept, start + len(chunk)))
            lengths = lengths.take(compute.subtract(kept.filter(inside).cast("int64"), start))
        start += len(chunk)
        best = compute.max(lengths).as_py()
        longest = best if longest is None or (best is not None and best > longest) else longest
    return longest


def _of_list(samples: Any, limit_s: float) -> int | None:
    end, longest = time.monotonic() + limit_s, 0
    for number, sample in enumerate(samples):
        if number % 1000 == 0 and time.monotonic() > end:
            return None
        if not isinstance(sample, dict) or not hasattr(sample.get(_TOKENS), "__len__"):
            return None
        longest = max(longest, len(sample[_TOKENS]))
    return longest or None
