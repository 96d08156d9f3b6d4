"""A dataset is counted as it is, and a broken one is named with its line."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.dataset import DatasetFacts, describe_dataset, training_hours
from autotune.errors import InvalidRequest

ROW = '{"text": "a"}'


@pytest.mark.parametrize(
    ("name", "content", "samples", "format"),
    [
        ("a.jsonl", f"{ROW}\n{ROW}\n", 2, "jsonl"),
        ("a.jsonl", f"\ufeff{ROW}\n\n  \n{ROW}", 2, "jsonl"),
        ("a.JSONL", f"{ROW}\r\n{ROW}\r\n", 2, "jsonl"),
        ("a.ndjson", ROW, 1, "jsonl"),
        ("a.json", f"[{ROW},\n{ROW}, {ROW}]", 3, "json"),
        ("a.json", f'{{"version": 1, "data": [{ROW}]}}', 1, "json"),
        ("a.json", f"{ROW}\n{ROW}\n", 2, "json"),
        ("a.txt", "one\n\ntwo\n   \nthrée", 3, "txt"),
        ("a.csv", 'text,label\n"two\nlines",1\nb,2\n\n', 2, "csv"),
        ("a.csv", "text\n" + "x" * 200_000 + "\n", 1, "csv"),
    ],
)
def test_samples_are_counted(tmp_path: Path, name: str, content: str, samples: int, format: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert describe_dataset(path) == DatasetFacts(samples=samples, bytes=len(content.encode()), format=format)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", f"{ROW}\n\n{{oops\n".encode(), r"a\.jsonl, line 3: is not JSON"),
        ("a.jsonl", f"{ROW}\n[1]\n".encode(), "line 2: must be a JSON object, not list"),
        ("a.jsonl", ROW.encode() + b"\n\xff\xfe", "line 2: is not UTF-8"),
        ("a.jsonl", b"[" * 200_000, "line 1: is n"),  # not JSON, or too deep, by Python's version
        ("a.jsonl", b"\n \n", "holds no samples"),
        ("a.jsonl", b"", "holds no samples"),
        ("a.json", b"", "holds no samples"),
        ("a.json", b"[]", "holds no samples"),
        ("a.json", b"[1, 2]", "item 1: must be a JSON object, not int"),
        ("a.json", b'{"rows": []}', "must hold a list of objects"),
        ("a.json", b'[{"a": ', "is not JSON"),
        ("a.txt", b"\xff\xff", "line 1: is not UTF-8"),
        ("a.csv", b"text\n", "holds no samples"),
        ("a.csv", b'text\n"open', "is not CSV"),
        ("a.csv", b"text\n\xff", "is not UTF-8"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: holds a number without end"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "holds a number without end"),
        ("a.parquet", b"PAR1", "is not a parquet file"),
        ("a.arrow", b"ARROW1", "is not an arrow file"),
        ("a.xlsx", b"x", r"give one of \.arrow, \.csv, \.json, \.jsonl"),
        ("a", b"x", "cannot read this format"),
    ],
)
def test_what_cannot_be_counted_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if path.suffix in (".parquet", ".arrow"):
        pytest.importorskip("pyarrow")
    with pytest.raises(InvalidRequest, match=message):
        describe_dataset(path)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none\.jsonl: no such file"):
        describe_dataset(tmp_path / "none.jsonl")
    with pytest.raises(InvalidRequest, match=r"a folder without \.arrow files"):
        describe_dataset(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InvalidRequest, match=r"pipe\.jsonl: is no regular file; write what it gives to one"):
        describe_dataset(tmp_path / "pipe.jsonl")


@pytest.mark.parametrize("where", ["a.arrow", "train/data-00000-of-00002.arrow"])
@pytest.mark.parametrize("kind", ["new_stream", "new_file"])
def test_arrow_files_and_folders_are_counted(tmp_path: Path, where: str, kind: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    table = arrow.table({"text": [str(number) for number in range(1000)]})
    with getattr(arrow.ipc, kind)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    facts = describe_dataset(path)
    assert facts == describe_dataset(tmp_path)
    assert (facts.samples, facts.bytes, facts.format) == (1000, path.stat().st_size, "arrow")


def test_parquet_is_counted_from_its_footer(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    assert describe_dataset(tmp_path / "a.parquet").samples == 3


def test_without_pyarrow_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(InvalidRequest, match=r"needs pyarrow; .*give a \.jsonl file"):
        describe_dataset(tmp_path / "a.parquet")


def test_a_large_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    path.write_text(line * 1000)
    tracemalloc.start()
    assert describe_dataset(path).samples == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 20


@pytest.mark.parametrize(
    ("samples", "epochs", "batch", "step_time_s", "steps", "hours"),
    [
        (1600, 1, 16, 3.6, 100, 0.1),
        (1601, 1, 16, 3.6, 101, 0.101),
        (1601, 3, 16, 3.6, 303, 0.303),
        (1, 1, 16, 3600, 1, 1.0),
        (1600, 0.5, 16, 3.6, 50, 0.05),
        (1600, 0.001, 16, 3600, 1, 1.0),
    ],
)
def test_steps_and_hours_of_a_run(
    samples: int, epochs: float, batch: int, step_time_s: float, steps: int, hours: float
) -> None:
    counted, taken = training_hours(samples, epochs, batch, step_time_s)
    assert (counted, taken) == (steps, pytest.approx(hours))


@given(samples=st.integers(1, 10**9), epochs=st.floats(0.01, 100), batch=st.integers(1, 4096))
def test_every_sample_has_its_step(samples: int, epochs: float, batch: int) -> None:
    steps, _ = training_hours(samples, epochs, batch, 1.0)
    assert steps * batch >= samples * epochs * (1 - 1e-9)
    assert training_hours(samples, 1, batch, 1.0)[0] * batch < samples + batch


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"epochs": -1}, {"epochs": float("nan")}, {"epochs": float("inf")}])
@pytest.mark.parametrize("other", [{}, {"samples": 0}, {"step_time_s": 0.0}])
def test_numbers_that_make_no_run_are_refused(bad: dict[str, Any], other: dict[str, Any]) -> None:
    numbers = {"samples": 10, "epochs": 1.0, "effective_batch_size": 2, "step_time_s": 1.0}
    with pytest.raises(InvalidRequest, match="must be a number above 0"):
        training_hours(**(numbers | bad | other))
