from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sqlite_utils  # noqa: F401 - so that each new queue is made here and not in a process of its own

from autotune.errors import InvalidRequest, StoreError
from autotune.recover.facts import Action, Decision, EndedBy, Incident, Phase
from autotune.recover.identity import ProcessId, own_process_id, process_id
from autotune.recover.job import NewJob, State
from autotune.recover.jobs import JobStore, open_jobs
from autotune.recover.private import kept_environ, masked, secret_words
from autotune.values import Judgement, Verdict

ROOT = Path(__file__).parent.parent
SECRET = "hf_" + "A" * 30

CLAIM_ALL = """
import sys
from pathlib import Path
from autotune.recover.jobs import open_jobs
with open_jobs(Path(sys.argv[1])) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    while waiting := store.waiting():
        for one in waiting:
            if store.claim(one.id, "cpu") is not None:
                print(one.id)
"""

SUBMIT_UNTIL_FULL = """
import resource, sys
from pathlib import Path
from autotune.errors import StoreError
from autotune.recover.job import NewJob
from autotune.recover.jobs import open_jobs
with open_jobs(Path(sys.argv[1])) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    try:
        while True:
            print(store.submit(NewJob(command=("x" * 5000,), cwd="/")).id, flush=True)
    except StoreError as error:
        print(error, file=sys.stderr)
"""


def job(**changes: object) -> NewJob:
    return replace(NewJob(command=("python", "train.py"), cwd="/tmp"), **changes)  # type: ignore[arg-type]


def incident(**changes: object) -> Incident:
    found = Incident(
        run_id="r",
        number=1,
        attempt=1,
        time_utc="2026-01-01T00:00:00+00:00",
        judgement=Judgement(verdict=Verdict.DEVICE_OOM, evidence=("CUDA out of memory",)),
        phase=Phase.TRAIN,
        ended_by=EndedBy.ITSELF,
        exit_code=1,
        signal=None,
        step=120,
        batch=None,
        decision=Decision(action=Action.STEP_DOWN, why="less fits", change={"micro_batch_size": 1}),
        steps_lost=20,
    )
    return replace(found, **changes)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    with open_jobs(tmp_path / "home") as opened:
        yield opened  # type: ignore[misc]


def live(store: JobStore) -> int:
    """A job with this process as its supervisor."""
    job_id = store.submit(job()).id
    assert store.claim(job_id, "cpu") is not None
    assert store.attach(job_id, own_process_id())
    return job_id


def dead_process() -> ProcessId:
    return replace(own_process_id(), started=1.0)


def test_a_job_comes_back_as_it_was_submitted(store: JobStore) -> None:
    new = job(
        name="first",
        options=("--fit", "--memory-limit", "1GiB"),
        environ={"PATH": "/bin"},
        hooks={"finished": ("echo", "a b")},
        gpu="cuda:1",
    )
    found = store.job(store.submit(new).id)
    assert all(getattr(found, name) == getattr(new, name) for name in NewJob.__dataclass_fields__)
    assert (found.state, found.kind, found.id) == (State.QUEUED, "job", 1)


def test_files_are_private(store: JobStore) -> None:
    store.submit(job())
    assert stat.S_IMODE(store.home.stat().st_mode) == 0o700
    for path in store.home.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_the_queue_is_in_order_of_submission_with_interrupted_ones_first(store: JobStore) -> None:
    ids = [store.submit(job()).id for _ in range(4)]
    store.claim(ids[2], "cpu")
    store.interrupt(ids[2], "died")
    assert [one.id for one in store.waiting()] == [ids[2], ids[0], ids[1], ids[3]]


def test_each_job_is_claimed_once_across_four_processes(store: JobStore) -> None:
    ids = [store.submit(job()).id for _ in range(40)]
    claimers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM_ALL, str(store.home)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for claimer in claimers:
        assert claimer.stdout is not None
        assert claimer.stdout.readline() == "ready\n"
    claimed = [int(word) for one in claimers for word in _go(one).split()]
    assert sorted(claimed) == ids


def _go(claimer: subprocess.Popen[str]) -> str:
    assert claimer.stdin is not None
    claimer.stdin.write("go\n")
    claimer.stdin.flush()
    return claimer.communicate(timeout=60)[0]


def test_a_job_with_a_living_supervisor_takes_no_second_one(store: JobStore) -> None:
    job_id = live(store)
    assert not store.attach(job_id, dead_process())
    assert store.attach(job_id, own_process_id())


def test_a_dead_supervisor_is_replaced(store: JobStore) -> None:
    job_id = store.submit(job()).id
    store.claim(job_id, "cpu")
    assert store.attach(job_id, dead_process())
    assert store.attach(job_id, own_process_id())
    assert store.job(job_id).supervisor == own_process_id()


@pytest.mark.parametrize("state", [State.QUEUED, State.FINISHED])
def test_what_was_not_claimed_cannot_be_supervised(store: JobStore, state: State) -> None:
    job_id = store.submit(job()).id
    if state is State.FINISHED:
        store.finish(job_id, state)
    assert not store.attach(job_id, own_process_id())


def test_what_is_judged_of_one_supervisor_does_not_touch_another(store: JobStore) -> None:
    job_id = store.submit(job()).id
    seen = store.claim(job_id, "cpu")
    assert store.attach(job_id, own_process_id())
    store.interrupt(job_id, "no supervisor", seen=seen)
    store.finish(job_id, State.FAILED, seen=seen)
    assert store.job(job_id).state is State.RUNNING


def test_a_process_does_not_end_the_job_of_another_one_that_lives(store: JobStore) -> None:
    job_id = store.submit(job()).id
    store.claim(job_id, "cpu")
    with subprocess.Popen(["sleep", "60"]) as child:
        supervisor = process_id(child.pid)
        assert supervisor is not None
        assert store.attach(job_id, supervisor)
        assert store.finish(job_id, State.FAILED).state is State.RUNNING
        assert store.interrupt(job_id, "died").state is State.RUNNING
        child.kill()
    assert store.interrupt(job_id, "died").state is State.INTERRUPTED


def test_progress_is_kept_and_none_changes_nothing(store: JobStore) -> None:
    job_id = live(store)
    store.update(job_id, step=3, max_steps=10, tokens_per_second=1.5, memory_bytes=2**33, run_folder="/r")
    assert store.update(job_id, state=State.RECOVERING, step=None, attempts=2) is State.RECOVERING
    found = store.job(job_id)
    assert (found.step, found.max_steps, found.memory_bytes, found.attempts) == (3, 10, 2**33, 2)


def test_only_what_a_supervisor_knows_is_updated(store: JobStore) -> None:
    with pytest.raises(ValueError, match="command"):
        store.update(live(store), command="rm")


def test_a_cancel_is_not_overwritten_by_progress(store: JobStore) -> None:
    job_id = live(store)
    assert store.cancel(job_id).state is State.CANCELLING
    assert store.update(job_id, state=State.RUNNING, step=1) is State.CANCELLING
    assert store.job(job_id).step == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [(State.CANCELLING, State.CANCELLED), (State.RUNNING, State.INTERRUPTED), (State.FINISHED, State.FINISHED)],
)
def test_an_interrupted_job_is_resumed_unless_it_was_to_be_cancelled(
    store: JobStore, before: State, after: State
) -> None:
    job_id = live(store)
    if before is State.CANCELLING:
        store.cancel(job_id)
    if before is State.FINISHED:
        store.finish(job_id, before)
    assert store.interrupt(job_id, "died").state is after


def test_an_end_is_said_once(store: JobStore) -> None:
    job_id = live(store)
    store.finish(job_id, State.FINISHED, exit_code=0, message="done")
    found = store.finish(job_id, State.FAILED, exit_code=9, message="no")
    assert (found.state, found.exit_code, found.message, found.supervisor) == (State.FINISHED, 0, "done", None)


def test_a_queued_job_is_cancelled_at_once_and_only_once(store: JobStore) -> None:
    job_id = store.submit(job()).id
    assert store.cancel(job_id).state is State.CANCELLED
    assert store.waiting() == []
    with pytest.raises(InvalidRequest, match="cancelled already: there is nothing to cancel"):
        store.cancel(job_id)


def test_an_unknown_job_is_one_line(store: JobStore) -> None:
    for call in (store.job, store.cancel):
        with pytest.raises(InvalidRequest, match="there is no job 5"):
            call(5)


def test_incidents_come_back_with_their_job(store: JobStore) -> None:
    first, second = live(store), live(store)
    kept = [incident(number=number) for number in (1, 2)]
    store.add_incident(first, kept[0])
    store.add_incident(second, incident(number=7))
    store.add_incident(first, kept[1])
    assert store.incidents(first) == [(first, kept[0]), (first, kept[1])]
    assert [(of, one.number) for of, one in store.incidents(limit=2)] == [(second, 7), (first, 2)]
    assert store.incident_counts() == {first: 2, second: 1}


def test_a_run_of_its_own_is_shown_and_never_started_by_the_daemon(store: JobStore) -> None:
    found = store.register(job())
    assert (found.kind, found.state, found.supervisor) == ("run", State.RUNNING, own_process_id())
    store.interrupt(found.id, "died")
    assert store.waiting() == []


def test_the_newest_jobs_are_listed_oldest_first(store: JobStore) -> None:
    ids = [store.submit(job()).id for _ in range(5)]
    store.cancel(ids[4])
    assert [one.id for one in store.jobs(limit=2)] == ids[3:]
    assert [one.id for one in store.jobs(states=[State.QUEUED], limit=2)] == ids[2:4]
    assert store.counts() == {State.QUEUED: 4, State.CANCELLED: 1}


def test_a_row_that_cannot_be_read_costs_itself_only(store: JobStore) -> None:
    ids = [store.submit(job()).id for _ in range(3)]
    with sqlite3.connect(store.path) as other:
        other.execute("UPDATE jobs SET command = '{' WHERE id = ?", (ids[1],))
    other.close()
    assert [one.id for one in store.jobs()] == [ids[0], ids[2]]


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_database_or_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    open_jobs(tmp_path).close()
    for path, before in ((tmp_path / "jobs.db", 0o600), (tmp_path, 0o700)):
        for bit in (stat.S_IWGRP, stat.S_IWOTH):
            path.chmod(before | bit)
            with pytest.raises(StoreError, match=f"can be written by others.*chmod go-w {path}$"):
                open_jobs(tmp_path)
        path.chmod(before)
    open_jobs(tmp_path).close()


def test_a_database_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_jobs(tmp_path).close()
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StoreError, match="belongs to another user"):
        open_jobs(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"SQLite format 3\0" + b"\xff" * 4096, "is damaged"), (b"text" * 3000, "is damaged")],
)
def test_a_damaged_database_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "jobs.db"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StoreError, match=message):
        open_jobs(tmp_path)


def test_a_queue_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from autotune.errors import StoreError
from autotune.recover.jobs import open_jobs
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
try:
    open_jobs(Path(sys.argv[1]))
except StoreError as error:
    print(error)
"""
    words = [sys.executable, "-B", "-c", script, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    assert f"the disk of {tmp_path / 'jobs.db'}" in done.stdout or "look for a full disk" in done.stdout
    open_jobs(tmp_path).close()


@pytest.mark.parametrize(
    ("pragma", "message"),
    [("user_version = 99", "written by a newer autotune"), ("application_id = 7", "no queue of autotune's")],
)
def test_a_database_of_a_newer_version_or_of_another_program_is_refused(
    tmp_path: Path, pragma: str, message: str
) -> None:
    open_jobs(tmp_path).close()
    other = sqlite3.connect(tmp_path / "jobs.db")
    other.execute(f"PRAGMA {pragma}")
    other.close()
    with pytest.raises(StoreError, match=message):
        open_jobs(tmp_path)


def test_a_full_disk_is_one_line_and_what_was_queued_stays(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT_UNTIL_FULL, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr.count("\n") == 1
    assert "disk" in done.stderr
    with open_jobs(tmp_path) as store:
        assert [str(one.id) for one in store.waiting()] == done.stdout.split()


@pytest.mark.parametrize("opening", ["first", "second"])
def test_opening_imports_nothing_heavy(tmp_path: Path, opening: str) -> None:
    if opening == "second":
        open_jobs(tmp_path).close()
    script = "import sys; from autotune.recover.jobs import open_jobs; open_jobs().close(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "AUTOTUNE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "transformers", "sqlite_utils", "pandas", "rich", "optuna"} & set(done.stdout.split())


# Secrets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "secret"),
    [
        (["train", "--hub_token", "x"], [2]),
        (["train", "--hub-token=x"], [1]),
        (["train", "--api_key", "x", "--lr", "1"], [2]),
        (["env", "WANDB_API_KEY=x", "train"], [1]),
        (["env", "DB_PASSWORD=x", "train"], [1]),
        (["train", "--token", "x"], [2]),
        (["train", SECRET], [1]),
        (["train", "--url=https://me:pass@host/x"], [1]),
        (["curl", "https://hooks.slack.com/services/T0/B0/x"], [1]),
        (["train", "--eos_token", "</s>", "--pad_token=x", "--max_tokens", "5"], []),
        (["train", "--tokenizer_name", "gpt2", "--push_to_hub", "--hub_token"], []),
        (["train", "--use_auth_token", "--lr", "1"], []),
        (["train", "--dataset_key", "x", "s3://bucket/key@1"], []),
    ],
)
def test_words_that_carry_a_secret(words: list[str], secret: list[int]) -> None:
    assert list(secret_words(words)) == secret


def test_a_command_with_a_secret_is_not_queued(store: JobStore) -> None:
    with pytest.raises(InvalidRequest, match=r"carries a secret \(near --hub_token\)"):
        store.submit(job(command=("train", "--hub_token", "x")))
    with pytest.raises(InvalidRequest, match="carries a secret"):
        store.submit(job(hooks={"failed": ("curl", f"https://x/{SECRET}")}))
    assert store.jobs() == []


def test_masking_keeps_what_is_no_secret() -> None:
    assert masked(["t", "--hub_token", "x", "--api-key=y", "z"]) == ("t", "--hub_token", "…", "--api-key=…", "z")


def test_only_harmless_variables_are_kept() -> None:
    environ = {
        "PATH": "/bin",
        "CONDA_PREFIX": "/c",
        "HF_HOME": "/h",
        "TOKENIZERS_PARALLELISM": "false",
        "AUTOTUNE_HOME": "/a",
        "HF_TOKEN": "s",
        "WANDB_API_KEY": "s",
        "AUTOTUNE_SECRET": "s",
        "CONDA_AUTH": "s",
        "HF_ENDPOINT": "https://u:p@host/",
        "EDITOR": "vi",
    }
    assert set(kept_environ(environ)) == {"PATH", "CONDA_PREFIX", "HF_HOME", "TOKENIZERS_PARALLELISM"}


def test_no_file_of_the_queue_holds_a_secret(store: JobStore) -> None:
    found = store.register(
        job(command=("train", "--hub_token", SECRET), environ={"HF_TOKEN": SECRET}, hooks={"failed": ("x", SECRET)})
    )
    store.update(found.id, message=f"401 for {SECRET}")
    store.add_incident(
        found.id, incident(message=SECRET, judgement=Judgement(verdict=Verdict.NOT_OOM, evidence=(SECRET,)))
    )
    store.finish(found.id, State.FAILED, message=f"died with {SECRET}")
    assert store.job(found.id).message == "died with …"
    for path in store.home.iterdir():
        assert SECRET.encode() not in path.read_bytes(), path


# Identity ------------------------------------------------------------------------------------------------------------


def test_a_process_is_itself_until_it_ends() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = process_id(child.pid)
    assert known is not None
    assert known.is_alive
    assert not replace(known, started=known.started + 1).is_alive
    assert not replace(known, boot="another").is_alive
    child.kill()
    assert known.wait(10)  # a zombie counts as ended
    assert not known.send(0)
    child.communicate()
