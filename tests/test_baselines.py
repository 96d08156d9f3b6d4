"""Other tools' searches against the runs and results reckoned by hand from their code.

The largest batch that runs is C, memory is a line from 45 % up to 98 % there, and speed always rises.
"""

from __future__ import annotations

import pytest

from benchmarks.baselines import (
    Finding,
    Run,
    Tries,
    accelerate,
    composer,
    deepspeed_fast,
    follow,
    halving,
    lightning_binsearch,
    lightning_power,
    neuracore,
    otx,
)

#: C: (runs, result) of each tool, None where it gives up. Binary search: its result is after the 5 % it takes off.
GOLDEN: dict[int, dict[str, tuple[int, int | None]]] = {
    1: {
        "accelerate": (30, 1), "halving": (8, 1), "power": (3, 1), "binsearch": (1, 1), "composer": (8, 1),
        "deepspeed": (3, 1), "deepspeed_high": (3, 1), "deepspeed_low": (3, 1), "neuracore": (8, 1), "otx": (4, None),
    },
    2: {
        "accelerate": (29, 2), "halving": (7, 2), "power": (2, 2), "binsearch": (3, 1), "composer": (7, 2),
        "deepspeed": (4, 2), "deepspeed_high": (5, 2), "deepspeed_low": (3, 2), "neuracore": (8, 1), "otx": (4, 2),
    },
    3: {
        "accelerate": (28, 3), "halving": (7, 2), "power": (2, 2), "binsearch": (3, 2), "composer": (7, 2),
        "deepspeed": (5, 3), "deepspeed_high": (6, 3), "deepspeed_low": (4, 3), "neuracore": (7, 2), "otx": (4, 2),
    },
    5: {
        "accelerate": (26, 5), "halving": (6, 4), "power": (3, 4), "binsearch": (5, 4), "composer": (6, 4),
        "deepspeed": (6, 5), "deepspeed_high": (8, 5), "deepspeed_low": (5, 4), "neuracore": (5, 3), "otx": (3, 4),
    },
    7: {
        "accelerate": (24, 7), "halving": (6, 4), "power": (3, 4), "binsearch": (5, 6), "composer": (6, 4),
        "deepspeed": (6, 7), "deepspeed_high": (10, 7), "deepspeed_low": (5, 5), "neuracore": (3, 4), "otx": (3, 4),
    },
    12: {
        "accelerate": (21, 11), "halving": (5, 8), "power": (4, 8), "binsearch": (7, 11), "composer": (5, 8),
        "deepspeed": (6, 12), "deepspeed_high": (11, 12), "deepspeed_low": (5, 9), "neuracore": (3, 7), "otx": (2, 8),
    },
    20: {
        "accelerate": (17, 19), "halving": (4, 16), "power": (5, 16), "binsearch": (9, 19), "composer": (4, 16),
        "deepspeed": (6, 20), "deepspeed_high": (12, 20), "deepspeed_low": (5, 15), "neuracore": (3, 11),
        "otx": (3, 14),
    },
    33: {
        "accelerate": (13, 32), "halving": (3, 32), "power": (6, 32), "binsearch": (11, 31), "composer": (3, 32),
        "deepspeed": (6, 33), "deepspeed_high": (12, 33), "deepspeed_low": (5, 25), "neuracore": (4, 19),
        "otx": (3, 24),
    },
    64: {
        "accelerate": (8, 58), "halving": (2, 64), "power": (7, 64), "binsearch": (13, 60), "composer": (2, 64),
        "deepspeed": (6, 64), "deepspeed_high": (13, 64), "deepspeed_low": (5, 47), "neuracore": (4, 37),
        "otx": (3, 46),
    },
    100: {
        "accelerate": (4, 92), "halving": (2, 64), "power": (7, 64), "binsearch": (13, 95), "composer": (2, 64),
        "deepspeed": (6, 100), "deepspeed_high": (14, 100), "deepspeed_low": (5, 74), "neuracore": (4, 59),
        "otx": (3, 70),
    },
}  # fmt: skip


def searched(tries: Tries, largest: int) -> Finding:
    """A tool on a card where `largest` is the largest batch that runs."""

    def answer(batch: int) -> Run:
        memory = 0.45 + 0.53 * batch / (largest + 0.5)
        return Run(fits=batch <= largest, memory=memory, speed=2.0**batch)

    return follow(tries, answer)


def tool(name: str, largest: int) -> Tries:
    estimates = {"deepspeed": 1.0, "deepspeed_high": 1.5, "deepspeed_low": 0.7}
    if name in estimates:
        return deepspeed_fast(estimate=max(1, int(estimates[name] * largest)))
    plain = {
        "accelerate": accelerate,
        "halving": halving,
        "power": lightning_power,
        "binsearch": lightning_binsearch,
        "composer": composer,
        "neuracore": neuracore,
        "otx": otx,
    }
    return plain[name]()


CELLS = [(largest, name, *cell) for largest, row in GOLDEN.items() for name, cell in row.items()]


@pytest.mark.parametrize(("largest", "name", "runs", "result"), CELLS)
def test_a_tool_takes_the_runs_and_ends_with_the_batch_that_its_code_says(
    largest: int, name: str, runs: int, result: int | None
) -> None:
    found = searched(tool(name, largest), largest)
    assert (len(found.runs), found.batch) == (runs, result)


def test_every_tool_is_held_against_every_size() -> None:
    assert len(CELLS) == 10 * 10


@pytest.mark.parametrize(("largest", "runs"), [(1, 8), (2, 7), (3, 6), (5, 4), (7, 2)])
def test_the_trainer_starts_at_eight(largest: int, runs: int) -> None:
    found = searched(accelerate(start=8), largest)
    assert (len(found.runs), found.batch) == (runs, largest)


@pytest.mark.parametrize(("largest", "raw"), [(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (12, 12), (64, 64), (100, 100)])
def test_lightnings_binary_search_finds_the_largest_before_it_takes_five_percent_off(largest: int, raw: int) -> None:
    assert searched(lightning_binsearch(margin=0.0), largest).batch == raw


def test_lightning_returns_one_without_running_it_where_two_fail() -> None:
    found = searched(lightning_binsearch(), 1)
    assert [batch for batch, _ in found.runs] == [2]
    assert not found.was_run


def test_lightnings_doubling_returns_a_batch_that_fails_where_the_data_set_is_smaller() -> None:
    found = searched(lightning_power(dataset=100), 64)
    assert found.batch == 128
    assert not found.was_run


def test_lightnings_doubling_passes_its_largest_value_and_returns_that_unrun() -> None:
    found = searched(lightning_power(max_value=100), 1000)
    assert found.batch == 128
    assert not found.was_run


@pytest.mark.parametrize(("estimate", "tried"), [(16, [1, 1, 16, 8]), (3, [1, 1, 4, 2, 3])])
def test_deepspeed_looks_among_the_sizes_that_change_accumulation_of_the_batch_it_is_told(
    estimate: int, tried: list[int]
) -> None:
    found = follow(deepspeed_fast(16, estimate=estimate), lambda batch: Run(fits=True, speed=2.0**batch))
    assert [batch for batch, _ in found.runs][: len(tried)] == tried


def test_deepspeed_stops_growing_where_speed_does_not() -> None:
    flat = follow(deepspeed_fast(estimate=150), lambda batch: Run(fits=batch <= 100, speed=1.0))
    rising = searched(deepspeed_fast(estimate=150), 100)
    assert flat.batch is not None
    assert len(flat.runs) < len(rising.runs)


@pytest.mark.parametrize("name", ["accelerate", "halving", "power", "composer"])
def test_a_tool_that_is_told_the_effective_batch_tries_nothing_above_it_and_can_return_it(name: str) -> None:
    tries = {"accelerate": accelerate, "halving": halving, "power": lightning_power, "composer": composer}[name](24)
    found = searched(tries, 1000)
    assert max(batch for batch, _ in found.runs) == 24
    assert found.batch == 24
    assert found.was_run


@pytest.mark.parametrize("name", ["binsearch", "neuracore", "otx", "deepspeed"])
def test_no_tool_tries_more_than_the_effective_batch(name: str) -> None:
    tries: dict[str, Tries] = {
        "binsearch": lightning_binsearch(24),
        "neuracore": neuracore(24),
        "otx": otx(24),
        "deepspeed": deepspeed_fast(24, estimate=500),
    }
    found = searched(tries[name], 1000)
    assert max(batch for batch, _ in found.runs) <= 24
    assert found.batch is not None


@pytest.mark.parametrize("name", ["accelerate", "halving", "power", "composer", "deepspeed", "neuracore", "otx"])
def test_a_tool_gives_up_where_nothing_runs(name: str) -> None:
    assert follow(tool(name, 1), lambda batch: Run(fits=False)).batch is None


def test_neuracore_goes_towards_eight_where_its_third_size_fails() -> None:
    """Memory bends upwards: the line through 1 and 8 promises too much."""

    def answer(batch: int) -> Run:
        memory = 0.1 + 0.001 * batch + 0.0004 * max(0, batch - 8) ** 2
        return Run(fits=memory <= 0.98, memory=memory, speed=1.0)

    found = follow(neuracore(), answer)
    tried = [batch for batch, _ in found.runs]
    assert tried[:2] == [1, 8]
    assert tried[2] > tried[3] > 8
    assert found.batch is not None
