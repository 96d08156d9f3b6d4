"""A landscape comes back as it was written, what is wrong with a file is one line, and a torn end costs one row."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import InvalidRequest
from autotune.landscape import (
    SCHEMA,
    Header,
    Landscape,
    LandscapeWriter,
    Row,
    limited,
    line_of,
    problems,
    read_begun,
    read_landscape,
)
from autotune.values import GIB, MIB, Attention, Prediction, TrainingConfig, Verdict, to_json
from tests.fakes import a_gpu
from tests.tiny import ENVIRONMENT, MODEL, a_config

PAGE = Path(__file__).parent.parent / "docs" / "landscapes.md"
DEVICE = a_gpu(24)
HEADER = Header(
    name="tiny on a card",
    origin="measured",
    device=DEVICE,
    model=MODEL,
    start=a_config(micro_batch_size=8, gradient_accumulation_steps=1),
    headroom_bytes=512 * MIB,
    installed=("flash_attn",),
    environment=ENVIRONMENT,
    fresh_start_s=11.5,
)


def a_row(needed_gib: float = 4.0, **config: Any) -> Row:
    return Row(
        config=a_config(**config),
        verdict=Verdict.FITS,
        needed_bytes=round(needed_gib * GIB),
        peak_allocated_bytes=3 * GIB,
        peak_reserved_bytes=7 * GIB // 2,
        micro_batch_times_s=(0.5, 0.51, 0.49),
        optimizer_times_s=(0.02,),
        startup_s=1.5,
        predicted=Prediction(peak_allocated_bytes=3 * GIB, step_time_s=1.0, seconds_by_kind={"matmul": 0.75}),
    )


OOM = Row(config=a_config(micro_batch_size=2), verdict=Verdict.DEVICE_OOM, tried_bytes=64 * MIB, startup_s=1.5)
LANDSCAPE = Landscape(header=HEADER, rows=(a_row(), OOM))


def written(path: Path, *values: Header | Row) -> Path:
    with LandscapeWriter(path) as file:
        for value in values:
            file.append(value)
    return path


def lines(path: Path, *documents: Any) -> Path:
    """A file of these; text is written as it is."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in documents]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def document(value: Header | Row, **changes: Any) -> dict[str, Any]:
    return {**json.loads(line_of(value)), **changes}


def without(value: Header | Row, name: str) -> dict[str, Any]:
    return {key: item for key, item in document(value).items() if key != name}


def test_a_landscape_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = written(tmp_path / "l.jsonl", HEADER, *LANDSCAPE.rows)
    assert read_landscape(path) == LANDSCAPE
    assert len(path.read_bytes().splitlines()) == 3


def test_a_devices_uuid_is_not_written(tmp_path: Path) -> None:
    header = replace(HEADER, device=replace(DEVICE, uuid="GPU-2d3f9f1c"))
    path = written(tmp_path / "l.jsonl", header, a_row())
    assert "2d3f9f1c" not in path.read_text()
    assert read_landscape(path).header.device.uuid is None


def test_fields_at_their_defaults_may_be_left_out(tmp_path: Path) -> None:
    start = {"sequence_length": 64, "micro_batch_size": 8}
    header = {
        "schema": SCHEMA,
        "name": "by hand",
        "origin": "simulated",
        "device": {"kind": "cuda", "index": 0, "name": "A card"},
        "model": {"name": "tiny", "config": MODEL.config},
        "start": start,
    }
    row = {
        "config": {**start, "attention": "eager"},
        "verdict": "fits",
        "micro_batch_times_s": [1],
        "optimizer_times_s": [0.1],
    }
    read = read_landscape(lines(tmp_path / "l.jsonl", header, row))
    assert read.rows[0].config == TrainingConfig(sequence_length=64, micro_batch_size=8, attention=Attention.EAGER)
    assert read.header.headroom_bytes == 0


def test_the_page_names_every_field() -> None:
    page = PAGE.read_text(encoding="utf-8")
    values = (HEADER, a_row(), HEADER.device, HEADER.model, HEADER.start, ENVIRONMENT, a_row().predicted)
    assert [name for value in values for name in to_json(value) if f"`{name}`" not in page] == []


def test_the_pages_example_is_a_landscape(tmp_path: Path) -> None:
    example = PAGE.read_text(encoding="utf-8").partition("```json\n")[2].partition("```")[0]
    path = tmp_path / "l.jsonl"
    path.write_text(example, encoding="utf-8")
    assert [row.verdict for row in read_landscape(path).rows] == [Verdict.FITS, Verdict.DEVICE_OOM]


BAD: list[tuple[list[Any], str]] = [
    ([], "is empty"),
    ([document(HEADER)], "holds no rows"),
    ([document(HEADER, schema="autotune.fit/1")], 'line 1: its schema is "autotune.fit/1"'),
    ([without(HEADER, "schema"), document(OOM)], "line 1: it has no schema"),
    ([document(HEADER, nmae="x")], "line 1: unknown field nmae: did you mean name?"),
    ([without(HEADER, "model")], "line 1: model is missing"),
    ([document(HEADER, origin="guessed")], 'line 1: origin must be one of measured, simulated, not "guessed"'),
    ([document(HEADER, headroom_bytes=1.5)], "line 1: headroom_bytes must be a whole number, not 1.5"),
    ([document(HEADER, headroom_bytes=-1)], "line 1: headroom_bytes must not be below 0"),
    ([document(HEADER, installed="flash_attn")], "line 1: installed must be a list"),
    ([document(HEADER, device={"kind": "cuda", "index": 0})], "line 1: device.name is missing"),
    ([document(HEADER), "{"], "line 2 is not JSON"),
    ([document(HEADER), "[1]"], "line 2: must be a JSON object, not a list of 1"),
    ([document(HEADER), '{"verdict": "fits", "verdict": "fits"}'], 'line 2: "verdict" is there twice'),
    ([document(HEADER), "[" * 100_000], "line 2 is not JSON"),
    ([document(HEADER), without(OOM, "config")], "line 2: config is missing"),
    ([document(HEADER), without(OOM, "verdict")], "line 2: verdict is missing"),
    ([document(HEADER), document(OOM, verdict="slow")], "line 2: verdict must be one of fits, device_oom"),
    ([document(HEADER), document(OOM, verdict="timeout")], "line 2: verdict must be one of fits, device_oom"),
    ([document(HEADER), document(OOM, seconds=1)], "line 2: unknown field seconds: the fields are config,"),
    (
        [document(HEADER), document(OOM, config={"micro_batch_size": 1})],
        "line 2: config.sequence_length is missing",
    ),
    (
        [document(HEADER), document(OOM, config={"sequence_length": 64, "micro_batch_size": True})],
        "line 2: config.micro_batch_size must be a whole number, not true",
    ),
    (
        [document(HEADER), document(OOM, config={"sequence_length": 64, "micro_batch_size": 0})],
        "line 2: micro_batch_size must be a positive integer, not 0",
    ),
    (
        [
            document(HEADER),
            document(OOM, config={"sequence_length": 64, "micro_batch_size": 1, "attn": "sdpa"}),
        ],
        "line 2: unknown field config.attn: did you mean attention?",
    ),
    (
        [document(HEADER), document(a_row(), micro_batch_times_s=[0.5, "1"])],
        'line 2: micro_batch_times_s[1] must be a number, not "1"',
    ),
    ([document(HEADER), document(a_row(), micro_batch_times_s=[])], "line 2: micro_batch_times_s is missing"),
    ([document(HEADER), document(a_row(), micro_batch_times_s=[0])], "line 2: micro_batch_times_s must hold"),
    ([document(HEADER), document(OOM, micro_batch_times_s=[1.0])], "line 2: micro_batch_times_s must be empty"),
    (
        [document(HEADER), document(a_row(), startup_s=float("nan"))],
        "line 2: startup_s must be a finite number of use, not NaN",
    ),
    (
        [document(HEADER), document(a_row(), startup_s=1e20)],
        "line 2: startup_s must be a finite number of use, not 1e+20",
    ),
    (
        [
            document(HEADER),
            document(a_row(), predicted={"peak_allocated_bytes": 1, "seconds_by_kind": {"a": "b"}}),
        ],
        'line 2: predicted.seconds_by_kind.a must be a number, not "b"',
    ),
    ([document(HEADER), document(a_row(), true_step_time_s=0)], "line 2: true_step_time_s must be above 0"),
    (
        [document(HEADER), document(a_row(), predicted={"peak_allocated_bytes": 1, "seconds_by_kind": {"a": 0}})],
        "line 2: predicted.seconds_by_kind must add up to more than 0",
    ),
    (
        [document(replace(HEADER, start=replace(HEADER.start, micro_batch_size=10**9)))],
        "line 1: start has more than 1,048,576 samples to an optimizer step",
    ),
    (
        [document(HEADER), document(OOM), document(a_row()), document(OOM)],
        "line 4: config is the same as in line 2",
    ),
]


@pytest.mark.parametrize(("made", "said"), BAD, ids=[said for _, said in BAD])
def test_what_is_wrong_is_one_line_with_file_line_and_field(tmp_path: Path, made: list[Any], said: str) -> None:
    path = lines(tmp_path / "l.jsonl", *made)
    with pytest.raises(InvalidRequest) as caught:
        read_landscape(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert said in message
    assert "\n" not in message
    assert len(message) < 800


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            read_landscape(path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a file without end")
@pytest.mark.parametrize("read", [read_landscape, read_begun])
def test_a_device_is_not_read_without_end(read: Callable[[Path], object]) -> None:
    with pytest.raises(InvalidRequest, match="/dev/zero is no regular file"):
        read(Path("/dev/zero"))


@pytest.mark.parametrize("kept", [1, 2])
def test_a_torn_last_line_costs_its_row_alone(tmp_path: Path, kept: int) -> None:
    whole = [line_of(value) for value in (HEADER, a_row(), OOM)]
    for cut in (1, len(whole[kept]) // 2, len(whole[kept]) - 1):
        path = tmp_path / f"{kept}-{cut}.jsonl"
        path.write_bytes(b"".join(whole[:kept]) + whole[kept][:cut])
        begun = read_begun(path)
        assert begun is not None
        assert begun.rows == LANDSCAPE.rows[: kept - 1]
        rest = LANDSCAPE.rows[kept - 1 :]
        assert read_landscape(written(path, *rest)) == LANDSCAPE


def test_a_torn_header_is_a_landscape_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    assert read_begun(path) is None
    for cut in (1, 20, len(line_of(HEADER)) - 1):
        path.write_bytes(line_of(HEADER)[:cut])
        assert read_begun(path) is None
    assert read_landscape(written(path, HEADER, *LANDSCAPE.rows)) == LANDSCAPE


@pytest.mark.parametrize("text", ["notes", '{"a": 1}', '{"schema": "autotune.fit/1"}'])
def test_another_file_is_not_cut_off(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    for take in (read_begun, LandscapeWriter):
        with pytest.raises(InvalidRequest, match="no landscape"):
            take(path)
    assert path.read_text() == text


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    with LandscapeWriter(path) as file:
        file.append(HEADER)
        with pytest.raises(InvalidRequest, match="written by another process"):
            LandscapeWriter(path)
        file.append(OOM)
    assert len(read_landscape(written(path, a_row())).rows) == 2


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be written"):
        LandscapeWriter(tmp_path / "no folder" / "l.jsonl")


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_disk_that_fills_up_is_one_line_and_costs_its_row_alone(tmp_path: Path) -> None:
    import resource

    path, before = tmp_path / "l.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    written(path, HEADER)

    def write_on() -> None:
        with LandscapeWriter(path) as file:
            file.append(OOM)

    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        with pytest.raises(InvalidRequest, match=r"l\.jsonl cannot be written .*make room"):
            write_on()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    begun = read_begun(path)
    assert begun is not None
    assert begun == replace(LANDSCAPE, rows=())


def test_each_length_is_a_problem_of_its_own() -> None:
    rows = (a_row(), a_row(sequence_length=32), a_row(sequence_length=32, micro_batch_size=2))
    short, long = problems(Landscape(header=HEADER, rows=rows))
    assert [one.header.start.sequence_length for one in (short, long)] == [32, 64]
    assert short.header.start == replace(HEADER.start, sequence_length=32)
    assert (short.rows, long.rows) == (rows[1:], rows[:1])
    assert short.header.name == "tiny on a card at 32 tokens"


def test_a_problem_of_one_length_keeps_its_name() -> None:
    assert problems(LANDSCAPE) == [LANDSCAPE]


def test_under_a_smaller_limit_what_needed_more_runs_out() -> None:
    rows = (a_row(4.0), a_row(4.5, micro_batch_size=2), OOM)
    found = limited(Landscape(header=HEADER, rows=rows), 9 * GIB // 2)  # with half a GiB of headroom: 4 may be used
    assert found.header.memory_limit_bytes == 9 * GIB // 2
    assert found.rows[0] == rows[0]
    gone = found.rows[1]
    assert gone == Row(
        config=rows[1].config, verdict=Verdict.DEVICE_OOM, startup_s=rows[1].startup_s, predicted=rows[1].predicted
    )
    assert found.rows[2].verdict is Verdict.DEVICE_OOM
    assert found.rows[2].tried_bytes is None


def test_of_a_larger_limit_nothing_is_known() -> None:
    with pytest.raises(InvalidRequest, match="says nothing of"):
        limited(LANDSCAPE, 25 * GIB)
    with pytest.raises(InvalidRequest, match="says nothing of"):
        limited(limited(LANDSCAPE, 8 * GIB), 9 * GIB)


def test_what_does_not_say_its_need_cannot_be_limited() -> None:
    silent = Landscape(header=HEADER, rows=(replace(a_row(), needed_bytes=None),))
    with pytest.raises(InvalidRequest, match="needed_bytes"):
        limited(silent, GIB)
