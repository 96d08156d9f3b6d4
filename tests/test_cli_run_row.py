"""A run's row: what its end is called, and that a run whose supervisor was killed goes on in the row it had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from autotune.cli.run_row import Row
from autotune.recover.facts import Ended, EndedBy
from autotune.recover.job import NewJob, State
from autotune.recover.jobs import open_jobs
from autotune.recover.plan import RunState
from autotune.recover.stop import StopRequests

HOOKS = {"on_finished": None, "on_recovered": None, "on_failed": None}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("AUTOTUNE_HOME", str(home))
    return home


def asked(folder: Path, **changes: Any) -> Any:
    options = {"gpu": "cpu", **HOOKS}
    device = SimpleNamespace(id="cpu")
    said = {"words": ("train",), "cwd": folder, "options": options, "device": device, "limit_bytes": None, "job": None}
    return cast(Any, SimpleNamespace(**{**said, **changes}))


def ended(exit_code: int, by: EndedBy = EndedBy.ITSELF) -> Ended:
    return Ended(exit_code=exit_code, ended_by=by)


@pytest.mark.parametrize(
    ("end", "cancelling", "state"),
    [
        (ended(0), False, State.FINISHED),
        (ended(3), False, State.FAILED),
        (ended(143, EndedBy.USER), False, State.INTERRUPTED),
        (ended(143, EndedBy.USER), True, State.CANCELLED),
        (ended(0), True, State.FINISHED),  # it was faster than the cancel
    ],
)
def test_a_jobs_end_is_named_after_what_happened(tmp_path: Path, end: Ended, cancelling: bool, state: State) -> None:
    with open_jobs() as store:
        job = store.submit(NewJob(command=("train",), cwd=str(tmp_path)))
        store.claim(job.id, "cpu")
        with Row(asked(tmp_path, job=job.id), tmp_path, StopRequests()) as row:
            if cancelling:
                store.cancel(job.id)
            state_at_end = RunState(run_id="r", argv=("train",), cwd="/", exit_code=end.exit_code)
            row.ends(state_at_end, end, "ended")
        assert store.job(job.id).state is state


@pytest.mark.parametrize("seen_by_a_daemon", [False, True])
def test_a_run_goes_on_in_the_row_of_its_killed_supervisor(tmp_path: Path, seen_by_a_daemon: bool) -> None:
    with open_jobs() as store:
        with Row(asked(tmp_path), tmp_path / "run", StopRequests()):
            pass  # nothing said how it ended
        if seen_by_a_daemon:
            store.interrupt(1, "its supervisor died")
        with Row(asked(tmp_path), tmp_path / "run", StopRequests()) as row:
            assert row.job is not None
            assert (row.job.id, row.job.state) == (1, State.RUNNING)
        with Row(asked(tmp_path), tmp_path / "another", StopRequests()) as row:
            assert row.job is not None
            assert row.job.id == 2
