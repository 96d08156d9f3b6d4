"""Lines of a trainer's events become its progress, and of several deaths the one that came first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotune.recover.facts import Batch, Phase
from autotune.recover.progress import Event, EventsTail, Told, fold, fold_all, read_told

OOM = "CUDA out of memory. Tried to allocate 2.00 GiB."


def event(kind: str, rank: int = 0, pid: int = 100, time: float = 1.0, **fields: Any) -> Event:
    return {"event": kind, "time": time, "pid": pid, "rank": rank, **fields}


def begin(step: int = 0, **fields: Any) -> Event:
    return event("begin", step=step, max_steps=10, micro_batch_size=4, gradient_accumulation_steps=2, **fields)


def steps(count: int, seconds: float = 2.0, first: int = 1, **fields: Any) -> list[Event]:
    return [event("step", step=first + n, seconds=seconds, tokens=100, **fields) for n in range(count)]


def died(rank: int, time: float, message: str, exception: str = "RuntimeError", **fields: Any) -> Event:
    return event("died", rank=rank, pid=100 + rank, time=time, exception=exception, message=message, **fields)


def test_nothing_told_is_nothing_known() -> None:
    assert not Told().progress.reporting
    assert Told().death is None


def test_steps_are_counted_from_where_the_attempt_began() -> None:
    progress = fold_all(Told(), [event("start"), begin(step=40), *steps(3, first=41)]).progress
    assert (progress.first_step, progress.step, progress.steps, progress.max_steps) == (40, 43, 3, 10)
    assert progress.phase is Phase.TRAIN


def test_pace_is_the_median_of_the_newest_fifty() -> None:
    told = fold_all(Told(), [begin(world_size=2), *steps(60, seconds=9.0), *steps(50, seconds=2.0, first=61)])
    assert told.progress.step_time_s == 2.0
    assert told.progress.tokens_per_second == 100.0  # 100 tokens a rank in 2 s, two ranks


def test_steps_without_tokens_have_no_tokens_per_second() -> None:
    told = fold_all(Told(), [begin(), event("step", step=1, seconds=1.0)])
    assert told.progress.step_time_s == 1.0
    assert told.progress.tokens_per_second is None


def test_a_step_told_twice_counts_once() -> None:
    told = fold_all(Told(), [begin(), *steps(3), *steps(3)])
    assert told.progress.steps == 3


def test_other_ranks_steps_do_not_count_but_their_memory_does() -> None:
    other = event("step", rank=1, step=1, seconds=1.0, allocated=70, reserved=90)
    progress = fold_all(Told(), [begin(), *steps(1, allocated=50, reserved=60), other]).progress
    assert progress.steps == 1
    assert (progress.peak_allocated_bytes, progress.peak_reserved_bytes) == (70, 90)


def test_longest_micro_batch_is_kept() -> None:
    shapes = [(2, 300), (8, 100), (4, 300)]
    told = fold_all(
        Told(),
        [begin()]
        + [event("step", step=n, longest={"samples": s, "tokens": t}) for n, (s, t) in enumerate(shapes, start=1)],
    )
    assert told.progress.longest_seen == Batch(samples=4, tokens=300)


def test_evaluation_and_saving_are_phases_and_a_checkpoint_is_kept() -> None:
    told = fold_all(Told(), [begin(), event("phase", phase="evaluate"), event("saved", path="/out/c-2", step=2)])
    assert told.progress.phase is Phase.EVALUATE
    assert (told.progress.checkpoint, told.progress.checkpoint_step) == ("/out/c-2", 2)
    assert fold(told, event("phase", rank=1, phase="load")).progress.phase is Phase.EVALUATE


def test_training_that_begins_anew_after_its_own_death_has_not_died() -> None:
    told = fold_all(Told(), [begin(), *steps(5), died(0, 5.0, OOM)])
    assert told.death is not None
    again = fold(told, begin())
    assert again.death is None
    assert (again.progress.step, again.progress.steps, again.progress.step_time_s) == (0, 0, None)


def test_a_rank_that_died_while_loading_stays_dead_when_another_begins() -> None:
    told = fold_all(Told(), [died(1, 5.0, OOM), begin()])
    assert told.death is not None
    assert told.death.rank == 1


@pytest.mark.parametrize(
    ("deaths", "rank"),
    [
        ([died(0, 5.0, OOM)], 0),
        ([died(1, 6.0, OOM), died(0, 5.0, OOM)], 0),  # the earlier, whatever the order of the lines
        (
            [
                died(0, 5.0, "NCCL error: unhandled system error", "torch.distributed.DistBackendError"),
                died(1, 6.0, OOM),
            ],
            1,
        ),
        ([died(0, 5.0, "[gloo] Connection closed by peer [127.0.0.1]:2"), died(3, 5.1, "index out of range")], 3),
        ([died(0, 5.0, "received SIGTERM", "SystemExit"), died(2, 6.0, OOM)], 2),
        ([died(0, 5.0, "Connection reset by peer"), died(1, 6.0, "Connection reset by peer")], 0),  # nothing better
        (
            [died(0, 6.0, "Connection reset by peer"), died(1, 7.0, "NCCL out of memory", oom=True)],
            1,
        ),  # memory is a cause
    ],
)
def test_the_cause_is_the_earliest_death_that_is_no_consequence(deaths: list[Event], rank: int) -> None:
    death = fold_all(Told(), deaths).death
    assert death is not None
    assert death.rank == rank


def test_a_death_keeps_what_it_said() -> None:
    death = fold_all(
        Told(),
        [died(0, 5.0, OOM, phase="train", batch={"samples": 4, "tokens": 9}, step=7, part="optimizer", saved="/c")],
    ).death
    assert death is not None
    assert (death.phase, death.batch, death.step) == (Phase.TRAIN, Batch(samples=4, tokens=9), 7)
    assert (death.part, death.saved, death.message) == ("optimizer", "/c", OOM)


def test_data_workers_of_one_rank_do_not_make_it_distributed() -> None:
    told = fold_all(Told(), [event("start", pid=1), event("start", pid=2), event("start", pid=3)])
    assert not told.is_distributed
    assert told.pids == ((0, 1), (0, 2), (0, 3))
    assert fold(told, event("start", rank=1, pid=4)).is_distributed


def test_pids_of_many_data_workers_are_not_kept_for_ever() -> None:
    told = fold_all(Told(), [event("start", pid=pid) for pid in range(1, 100)])
    assert len(told.pids) == 16
    assert told.pids[0] == (0, 1)
    assert told.pids[-1] == (0, 99)


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"event": None},
        {"event": "step"},
        {"event": "step", "step": "seven", "seconds": None},
        {"event": "step", "step": True},
        {"event": "step", "step": 10**400},
        {"event": "step", "step": 5, "seconds": float("nan")},
        {"event": "step", "step": 5, "seconds": float("inf")},
        {"event": "step", "step": 5, "micro_batches": ["x", None]},
        {"event": "phase", "phase": "dancing"},
        {"event": "phase", "phase": []},
        {"event": "died"},
        {"event": "died", "batch": 3, "message": 7},
        {"event": "start", "versions": "2.0"},
        {"event": "saved"},
        {"event": "begin", "rank": "first", "pid": {}},
    ],
)
def test_an_odd_event_breaks_nothing(odd: Event) -> None:
    told = fold_all(Told(), [begin(), *steps(2), odd, *steps(2, first=11)])
    assert told.progress.step == 12
    assert told.progress.step_time_s == 2.0


def lines(*events: Event) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in events)


def test_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventsTail(path)
    assert tail.read() == []  # not there yet
    whole = lines(begin())
    path.write_bytes(whole + whole[:20])
    assert len(tail.read()) == 1
    assert tail.read() == []
    with path.open("ab") as file:
        file.write(whole[20:])
    assert len(tail.read()) == 1
    assert tail.garbage_lines == 0


def test_garbage_is_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\xff\xfe\n[1]\n\n{broken\n" + b"[" * 100_000 + b"\n" + lines(begin()))
    tail = EventsTail(path)
    assert [one["event"] for one in tail.read()] == ["begin"]
    assert tail.garbage_lines == 4


def test_a_file_that_was_cut_short_or_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(lines(begin(), *steps(3)))
    tail = EventsTail(path)
    assert len(tail.read()) == 4
    path.write_bytes(lines(begin()))
    assert len(tail.read()) == 1
    (tmp_path / "other").write_bytes(lines(begin(), *steps(3)))
    (tmp_path / "other").replace(path)
    assert len(tail.read()) == 4


def test_a_whole_file_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(lines(begin(), *steps(3), event("end", step=3)))
    told = read_told(path)
    assert told.progress.step == 3
    assert told.ended
