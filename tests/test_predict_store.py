"""Kept traces: found again, never under other versions or by other code, and cleared away."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import pytest

import autotune.predict.store as stores
from autotune.cli.bench import predictor_of
from autotune.predict.kernels import CPU, KernelSet
from autotune.predict.store import TraceStore, library_versions, sources_hash
from autotune.predict.trace import FORMAT
from autotune.values import LIBRARIES
from gpu_db.store import open_store
from tests.fakes import a_cpu, a_model, a_request, an_environment
from tests.test_predict_plot import CONFIG, a_trace

KERNELS = KernelSet()
VERSIONS: dict[str, str | None] = {"torch": "2.13.0"}
DAY_S = 24 * 3600


def keep(folder: Path, versions: dict[str, str | None] = VERSIONS) -> Path:
    """Where a trace now lies."""
    store = TraceStore(folder, versions)
    store.keep(a_model(), CONFIG, KERNELS, a_trace())
    return store.path(a_model(), CONFIG, KERNELS, own_point=False)


def is_found(folder: Path, versions: dict[str, str | None] = VERSIONS) -> bool:
    return TraceStore(folder, versions).find(a_model(), CONFIG, KERNELS) is not None


def test_a_trace_is_found_again_under_its_own_versions_alone(tmp_path: Path) -> None:
    keep(tmp_path)
    assert is_found(tmp_path)
    assert not is_found(tmp_path, {"torch": "2.9.0"})


def test_versions_are_those_of_the_shared_libraries() -> None:
    assert list(library_versions()) == list(LIBRARIES)


@pytest.mark.parametrize(("torch", "is_known"), [("2.9.0", True), ("2.10.0", False)])
def test_a_fits_traces_are_of_its_interpreters_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, is_known: bool
) -> None:
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path))
    kept = an_environment(torch="2.9.0")
    versions = {name: getattr(kept, name) for name in LIBRARIES}
    TraceStore(tmp_path / "traces", versions).keep(a_model(), CONFIG, CPU, a_trace())
    python = str(tmp_path / "none")  # starts nothing: what is not known has no prediction
    environment = an_environment(torch=torch)
    with open_store(tmp_path, a_cpu()) as store:
        predictor = predictor_of(a_request(), a_cpu(), 0, environment, store, python=python, stop=lambda: False)
        assert (predictor.predict(CONFIG) is not None) == is_known


def test_a_trace_that_other_code_made_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path)
    monkeypatch.setattr(stores, "sources_hash", lambda: "of other code")
    assert not is_found(tmp_path)


@pytest.mark.parametrize(
    ("name", "matters"), [("predict/tracing.py", True), ("workload/step.py", True), ("predict/memory.py", False)]
)
def test_code_that_makes_traces_is_in_the_hash_and_code_that_reads_them_is_not(
    tmp_path: Path, name: str, matters: bool
) -> None:
    hashes = []
    for text in ("before", "after"):
        package = tmp_path / text
        for file in ("predict/tracing.py", "predict/memory.py", "workload/step.py"):
            (package / file).parent.mkdir(parents=True, exist_ok=True)
            (package / file).write_text("the same")
        (package / name).write_text(text)
        hashes.append(sources_hash(package))
    assert (hashes[0] != hashes[1]) == matters


def test_every_module_that_is_left_out_of_the_hash_exists() -> None:
    assert {path.name for path in Path(stores.__file__).parent.glob("*.py")} >= stores._READERS


def test_a_trace_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    path = TraceStore(tmp_path, VERSIONS).path(a_model(), CONFIG, KERNELS, own_point=False)
    path.mkdir()
    keep(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert keep(tmp_path).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_what_nobody_read_for_long_goes_and_nothing_else(tmp_path: Path) -> None:
    now = time.time()
    unread = keep(tmp_path, {"torch": "2.1.0"})
    kept = keep(tmp_path, {"torch": "2.2.0"})
    ages = {unread: 91, kept: 89}
    for name, days in (("tmpabcd_123", 2), ("tmpefgh_456", 0), (f"{kept.name}.12.part", 2), ("a-users-own.gz", 400)):
        (tmp_path / name).touch()
        ages[tmp_path / name] = days
    for path, days in ages.items():
        os.utime(path, (now - days * DAY_S, now - days * DAY_S))
    new = keep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {kept.name, new.name, "tmpefgh_456", "a-users-own.gz"}


def test_reading_a_trace_keeps_it(tmp_path: Path) -> None:
    path = keep(tmp_path)
    os.utime(path, (time.time() - 91 * DAY_S,) * 2)
    assert is_found(tmp_path)
    keep(tmp_path, {"torch": "2.2.0"})
    assert path.exists()


@pytest.mark.parametrize("cut", [0, 1, 30, -1])
def test_a_file_that_is_cut_off_is_made_again(tmp_path: Path, cut: int) -> None:
    path = keep(tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    assert not is_found(tmp_path)


def test_a_file_with_a_broken_stream_is_made_again(tmp_path: Path) -> None:
    path = keep(tmp_path)
    data = bytearray(path.read_bytes())
    data[12:40] = b"\xff" * 28  # zlib.error, which is no OSError
    path.write_bytes(bytes(data))
    assert not is_found(tmp_path)


SHAPES = ["[]", '"x"', "{}", "[" * 100_000, json.dumps({"format": FORMAT, "programs": {"first": []}})]


@pytest.mark.parametrize("text", SHAPES, ids=lambda text: text[:9])
def test_a_file_of_another_shape_is_made_again(tmp_path: Path, text: str) -> None:
    keep(tmp_path).write_bytes(gzip.compress(text.encode()))
    assert not is_found(tmp_path)
    keep(tmp_path)
    assert is_found(tmp_path)
