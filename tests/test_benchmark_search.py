"""What the benchmark of searches says of results, and its command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from autotune.landscape import Landscape
from autotune.values import to_json
from benchmarks.search import main, tasks_of
from benchmarks.search_report import NEAR, bars, numbers, ratios, report, summaries, svg_of, where_nothing_fits
from benchmarks.searchers import LABELS, OURS, Result
from tests.fakes import Law
from tests.made_landscape import START, a_landscape

# The report


def a_result(searcher: str = OURS, landscape: str = "one", **changes: object) -> Result:
    made = Result(
        searcher=searcher,
        landscape=landscape,
        seed=0,
        anything_fits=True,
        probes=4,
        out_of_memory=0,
        seconds=30.0,
        returned=START,
        runs=True,
        was_run=True,
        regret=0.0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_seconds_are_held_against_the_quickest_baseline_that_is_near_else_against_exhaustive() -> None:
    results = [
        a_result(),
        a_result("accelerate", seconds=20.0, regret=0.2),
        a_result("tpe", seconds=60.0, regret=0.02),
        a_result("exhaustive", seconds=600.0),
        a_result(landscape="two"),
        a_result("accelerate", "two", seconds=20.0, regret=0.2),
        a_result("tpe", "two", seconds=60.0, regret=NEAR + 0.01),
        a_result("exhaustive", "two", seconds=300.0),
    ]
    found = ratios(results)
    assert found is not None
    assert found.against_first == pytest.approx(((0.5 + 0.1) / 2, 0.5))
    assert found.firsts == {"tpe": 1, "exhaustive": 1}
    assert found.overall == "tpe"
    assert found.against_overall == pytest.approx((0.5, 0.5))


def test_what_does_not_run_is_the_worst_regret_and_null_in_the_record() -> None:
    results = [a_result(), a_result(landscape="two", runs=False, was_run=False, regret=None)]
    (summary,) = summaries(results)
    assert math.isinf(summary.regret[1])
    assert (summary.runs, summary.unrun) == (0.5, 0.5)
    assert "nothing ran" in report(results)
    assert to_json(numbers(results))["summaries"][0]["regret"][1] is None
    assert [bar.name for bar in bars(results) if not bar.passed] == ["regret, median", "regret, worst"]


def test_every_bar_passes_and_fails() -> None:
    good = [a_result(), a_result("exhaustive", seconds=600.0)]
    assert all(bar.passed for bar in bars(good))
    bad = [a_result(probes=11, out_of_memory=1, regret=0.1, seconds=300.0), *good[1:]]
    assert not any(bar.passed for bar in bars(bad))


def test_landscapes_where_nothing_fits_are_counted_apart() -> None:
    nothing = a_result(landscape="two", anything_fits=False, returned=None, runs=False, was_run=False, regret=None)
    results = [a_result(), nothing]
    assert summaries(results)[0].landscapes == 1
    assert where_nothing_fits(results)[0].said_so == 1.0


def test_the_plot_names_every_searcher() -> None:
    picture = svg_of(summaries([a_result(), a_result("tpe", seconds=100.0, runs=False, regret=None)]))
    assert picture.startswith("<svg")
    assert LABELS["tpe"] in picture
    assert "nan" not in picture


# The command


def a_file(folder: Path, landscape: Landscape) -> Path:
    path = folder / "made.jsonl"
    lines = [json.dumps(to_json(line)) for line in (landscape.header, *landscape.rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_command_writes_a_table_raw_results_and_a_plot(tmp_path: Path) -> None:
    path = a_file(tmp_path, a_landscape())
    options = [
        "--landscape",
        str(path),
        "--searcher",
        "autotune,accelerate,exhaustive",
        "--output",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    assert "| autotune |" in done.stdout
    record = json.loads(next((tmp_path / "out").glob("search-*.json")).read_text(encoding="utf-8"))
    assert {result["searcher"] for result in record["results"]} == {"autotune", "accelerate", "exhaustive"}
    assert record["landscapes"][0]["tools_settings_differ_from_defaults"] == ["upcast"]
    assert list((tmp_path / "out").glob("search-*.svg"))


def test_the_command_replays_several_files_under_several_limits(tmp_path: Path) -> None:
    path = str(a_file(tmp_path, a_landscape(4000)))
    options = [
        "--landscape",
        path,
        path,
        "--limit",
        "1GiB",
        "--limit",
        "card",
        "--searcher",
        "accelerate",
        "--jobs",
        "1",
    ]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == [
        "made up under 1.0 GiB",
        "made up",
        "made up under 1.0 GiB (2)",
        "made up (2)",
    ]


def test_each_sequence_length_of_a_file_is_replayed_by_itself(tmp_path: Path) -> None:
    path = a_file(tmp_path, a_landscape(lengths=(256, 512)))
    done = CliRunner().invoke(main, ["--landscape", str(path), "--searcher", "accelerate"])
    assert [line.split(" ", 1)[1] for line in done.stderr.splitlines()] == [
        "made up at 256 tokens",
        "made up at 512 tokens",
    ]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--searcher", "magic"], 2, "magic is none of autotune"),
        (["--landscape", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["--limit", "much"], 2, "is not a memory size"),
    ],
)
def test_bad_input_is_one_line(options: list[str], code: int, words: str) -> None:
    done = CliRunner().invoke(main, options)
    assert done.exit_code == code
    assert words in done.stderr
    said = [line for line in done.stderr.strip().splitlines() if "needs scipy" not in line]
    assert len(said) == 1


def test_a_missed_bar_fails_the_check_and_not_the_run(tmp_path: Path) -> None:
    path = a_file(tmp_path, a_landscape(law=Law(tokens_per_second=1e6), noise=0.0))
    options = ["--landscape", str(path), "--searcher", "autotune,accelerate,halving,exhaustive"]
    plain, checked = CliRunner().invoke(main, options), CliRunner().invoke(main, [*options, "--check"])
    assert "FAIL" in plain.stdout
    assert (plain.exit_code, checked.exit_code) == (0, 1)


def test_the_slow_sampler_searches_some_landscapes_evenly() -> None:
    landscapes = [a_landscape(name=f"number {i}") for i in range(6)]
    tasks = tasks_of(landscapes, ["gp", "tpe"], seeds=2, gp_landscapes=2)
    assert [sum(name == "gp" for name, _ in task.searches) for task in tasks] == [2, 0, 0, 2, 0, 0]
    assert all(sum(name == "tpe" for name, _ in task.searches) == 2 for task in tasks)
