from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import StoreError
from autotune.protocols import TrialStore
from autotune.values import (
    Device,
    Environment,
    Failure,
    FitRequest,
    Judgement,
    ModelSource,
    Origin,
    Prediction,
    ProbeLimits,
    ProbeReport,
    Tenant,
    TrainingConfig,
    TrialRecord,
    from_json,
    to_json,
)
from gpu_db.anonymous import anonymous_text, public_model_name
from gpu_db.migrations import SCHEMA_VERSION, STEPS, migrate, schema_version
from gpu_db.store import GpuStore, database_path, default_home, open_store
from tests.fakes import a_cpu, a_gpu, a_model, a_request
from tests.trial_records import DEVICE, out_of_memory_trial, report, trial

CONFIGS = st.builds(
    TrainingConfig,
    sequence_length=st.integers(1, 2**20),
    micro_batch_size=st.integers(1, 64),
    gradient_accumulation_steps=st.integers(1, 64),
    world_size=st.integers(1, 8),
    gradient_checkpointing=st.sampled_from(["off", "full", "offload", "every_2"]),
    compute_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    adapter_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    lora_rank=st.integers(1, 256),
    lora_dropout=st.floats(0, 0.9),
    target_modules=st.lists(st.text(min_size=1), min_size=1).map(tuple),
    eval_micro_batch_size=st.none() | st.integers(1, 64),
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
MODELS = st.builds(ModelSource, config=st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
st.register_type_strategy(TrainingConfig, CONFIGS)
st.register_type_strategy(ModelSource, MODELS)
st.register_type_strategy(float, FLOATS)
REQUESTS = st.builds(FitRequest, min_sequence_length=st.none(), min_lora_rank=st.none())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def path(home: Path) -> Path:
    """Where the store of `DEVICE` will be; not there yet."""
    return database_path(home, DEVICE)


@pytest.fixture
def store(home: Path) -> Iterator[GpuStore]:
    with open_store(home, DEVICE) as opened:
        yield opened


@contextlib.contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    """The file as any other program would open it; committed at the end."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        yield connection


def stored(home: Path, *trials: TrialRecord) -> Path:
    """The path of a closed database that holds `trials`."""
    with open_store(home, DEVICE) as store:
        for record in trials:
            store.append(record)
        return store.path


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_a_value_read_back_from_json_text_is_the_value(data: st.DataObject) -> None:
    kinds = [Environment, Failure, Judgement, Prediction, ProbeLimits, ProbeReport, Tenant, Device, TrialRecord]
    kind = data.draw(st.sampled_from([*kinds, TrainingConfig, ModelSource, FitRequest]))
    value = data.draw(REQUESTS if kind is FitRequest else st.from_type(kind))
    assert from_json(kind, json.loads(json.dumps(to_json(value)))) == value


@pytest.mark.parametrize(
    "record",
    [
        trial(),
        out_of_memory_trial(),
        trial(prediction=None, moves=(), memory_limit_bytes=None, report=ProbeReport()),
        trial(model_name="組織/模型", report=report(log_tail="naïve \x00 � \udcff 'quoted' \"double\"\n")),
        trial(report=report(loss=0.5, tenants=(Tenant(pid=7, name="blender", used_bytes=None),))),
        trial(origin=Origin.PROOF, target_modules=("q_proj", "v_proj"), eval_micro_batch_size=2),
    ],
    ids=["fits", "out of memory", "all unknown", "odd text", "a tenant", "proof"],
)
def test_a_trial_comes_back_as_it_was_appended(store: GpuStore, record: TrialRecord) -> None:
    assert store.append(record) == replace(record, id=1)
    assert store.trials() == [replace(record, id=1)]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_kept_as_unknown(store: GpuStore, loss: float) -> None:
    store.append(trial(report=report(loss=loss)))
    assert store.trials()[0].report.loss is None


def test_trials_are_found_by_what_identifies_them_in_the_order_they_were_appended(store: GpuStore) -> None:
    seam: TrialStore = store
    other = replace(trial().environment, torch="2.4.0")
    for record in (
        trial(),
        trial(request_id="other"),
        trial(model_fingerprint="other"),
        trial(environment=other),
        trial(),
    ):
        seam.append(record)
    assert [record.id for record in seam.trials()] == [1, 2, 3, 4, 5]
    assert [record.id for record in seam.trials(request_id="other")] == [2]
    assert [record.id for record in seam.trials(model_fingerprint="other")] == [3]
    assert [record.id for record in store.trials(environment_fingerprint=other.fingerprint)] == [4]
    assert [record.id for record in seam.trials(request_id="other", model_fingerprint="other")] == []


def test_facts_are_in_columns_for_other_programs(home: Path) -> None:
    path = stored(home, out_of_memory_trial(micro_batch_size=4))
    with raw(path) as connection:
        row = connection.execute(
            "SELECT verdict, origin, micro_batch_size, attention, json_extract(config, '$.lora_rank') FROM trials"
        ).fetchone()
        assert row == ("device_oom", "probe", 4, "sdpa", 16)
        assert connection.execute("SELECT * FROM meta").fetchall() == [(DEVICE.name, "cuda", DEVICE.total_bytes, None)]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE trials SET verdict = 'fits'",
        "DELETE FROM trials",
        "INSERT OR REPLACE INTO trials SELECT * FROM trials",
        "UPDATE requests SET request = '{}'",
        "DELETE FROM requests",
    ],
)
def test_what_is_stored_cannot_be_changed(store: GpuStore, statement: str) -> None:
    store.append(trial())
    store.add_request("asked", a_request())
    with raw(store.path) as connection, pytest.raises(sqlite3.IntegrityError, match="append only"):
        connection.execute(statement)
    assert store.trials() == [trial(id=1)]
    assert store.request("asked") == a_request()


@pytest.mark.parametrize(
    ("column", "damaged"),
    [
        ("config", "'{'"),
        ("config", "'[]'"),
        ("config", """'{"sequence_length": "many", "micro_batch_size": 1}'"""),
        ("report", "'null'"),
        ("report", """'{"failure": []}'"""),
        ("judgement", """'{"verdict": "melted"}'"""),
        ("environment", "CAST(x'7bff7d' AS TEXT)"),
        ("origin", "'hearsay'"),
        ("moves", "NULL"),
        ("model_name", "CAST(x'ff' AS TEXT)"),
        ("memory_limit_bytes", "'lots'"),
    ],
)
def test_a_row_that_cannot_be_understood_is_skipped_with_a_warning(
    store: GpuStore, caplog: pytest.LogCaptureFixture, column: str, damaged: str
) -> None:
    store.append(trial())
    with raw(store.path) as connection:
        names = [row[1] for row in connection.execute("PRAGMA table_info(trials)") if row[1] != "id"]
        values = [damaged if name == column else name for name in names]
        connection.execute(f"INSERT INTO trials ({', '.join(names)}) SELECT {', '.join(values)} FROM trials")
    store.append(trial())
    with caplog.at_level(logging.WARNING):
        assert [record.id for record in store.trials()] == [1, 3]
    assert "trial 2 cannot be read" in caplog.text


def test_a_trial_of_another_device_is_refused(store: GpuStore) -> None:
    with pytest.raises(StoreError, match="some-card does not belong"):
        store.append(trial(device_slug="some-card"))
    assert store.trials() == []


def test_each_model_and_memory_size_has_its_own_file(home: Path) -> None:
    devices = [a_gpu(8), a_gpu(12), a_gpu(24, name="Other Card"), a_cpu()]
    assert len({database_path(home, device) for device in devices}) == 4
    assert database_path(home, a_gpu(12, uuid="GPU-1")) == database_path(home, a_gpu(12, uuid="GPU-2"))


def test_the_default_home_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path))
    assert database_path(None, DEVICE) == tmp_path / "gpus" / f"{DEVICE.slug}.db"
    monkeypatch.setenv("AUTOTUNE_HOME", "")
    assert default_home().name == "autotune"


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_new_files_are_for_their_owner_alone(store: GpuStore) -> None:
    store.append(trial())
    files = [store.path, store.path.with_name(f"{store.path.name}-wal"), store.path.parent / ".lock"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert {folder.stat().st_mode & 0o777 for folder in list(store.path.parents)[:2]} == {0o700}


def test_a_closed_database_is_one_file(home: Path, tmp_path: Path) -> None:
    path = stored(home, trial())
    assert [file.name for file in path.parent.glob(f"{path.name}*")] == [path.name]


def test_close_moves_the_log_into_the_file_while_another_process_has_it_open(home: Path) -> None:
    with open_store(home, DEVICE):
        copy = stored(home, trial()).read_bytes()
    elsewhere = database_path(home / "copied", DEVICE)
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_bytes(copy)
    with open_store(home / "copied", DEVICE) as store:
        assert store.trials() == [trial(id=1)]


def test_a_store_can_be_closed_twice_and_then_says_that_it_is_closed(store: GpuStore) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed database"):
        store.trials()


def test_the_first_request_under_an_id_is_kept(store: GpuStore) -> None:
    store.add_request("asked", a_request())
    store.add_request("asked", a_request(allow_near=True))
    assert store.request("asked") == a_request()
    assert store.request("unknown") is None


def test_a_request_loses_its_local_paths_and_keeps_its_model(store: GpuStore) -> None:
    model = replace(a_model("/home/alice/llama/config.json", _name_or_path="/home/alice/llama"), folder="/home/alice")
    store.add_request("asked", a_request(model=model))
    kept = store.request("asked")
    assert kept is not None
    assert (kept.model.name, kept.model.folder) == ("llama", None)
    assert kept.model.fingerprint == model.fingerprint
    assert "alice" not in json.dumps(to_json(kept))


def test_nothing_in_the_file_names_a_person_or_a_machine(home: Path) -> None:
    uuid = "GPU-3f9a2b1c-1111-2222-3333-444455556666"
    host, user_home = socket.gethostname(), str(Path.home())
    text = f'File "/home/alice/proj/site-packages/torch/x.py" on {uuid} at {user_home}/data/mine.txt'
    failure = Failure(phase="forward", chain=(text,), message=text, traceback=text)
    judgement = Judgement(verdict=trial().judgement.verdict, evidence=(text,), action=text)
    record = trial(
        model_name="/home/alice/models/llama/config.json",
        judgement=judgement,
        report=report(failure=failure, log_tail=text, tenants=(Tenant(pid=1, name="/home/alice/run", used_bytes=1),)),
    )
    with open_store(home, a_gpu(uuid=uuid)) as store:
        store.append(record)
        store.add_request("asked", a_request(model=replace(a_model(), folder="/home/alice/models")))
        kept = store.trials()[0]
    content = store.path.read_bytes()
    for secret in ("alice", uuid[4:], user_home + "/", *([host] if len(host) > 2 else [])):
        assert secret.encode() not in content, secret
    assert kept.model_name == "llama"
    assert kept.report.failure is not None
    assert kept.report.failure.message.startswith('File "…/torch/x.py" on GPU-…')


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('File "/home/alice/my proj/site-packages/torch/nn/linear.py", line 3', 'File "…/torch/nn/linear.py", line 3'),
        ("No such file: '/home/al ice/x.py'", "No such file: '…/x.py'"),
        ("PYTHONPATH=/a/b:/home/alice/q", "PYTHONPATH=…/b:…/q"),
        ("file:///home/alice/f.txt", "…/f.txt"),
        ("~/clients/acme/train.py", "…/train.py"),
        ("/home/alice", "~"),
        ("/Users/alice/", "~"),
        (r"C:\Users\alice\train.py failed", "…/train.py failed"),
        ("MIG-3f9a2b1c-1111-2222-3333-444455556666", "MIG-…"),
        ("see https://pytorch.org/docs/stable/notes.html", "see https://pytorch.org/docs/stable/notes.html"),
        ("1.96 GiB/s and/or 3/4, n/a", "1.96 GiB/s and/or 3/4, n/a"),
        ("CUDA out of memory. Tried to allocate 1.96 GiB.", "CUDA out of memory. Tried to allocate 1.96 GiB."),
    ],
)
def test_text_keeps_what_happened_and_loses_where(text: str, kept: str) -> None:
    assert anonymous_text(text) == kept


@given(st.text(alphabet="/\\:~\"' ab.CU-\n"))
@settings(deadline=None)
def test_any_text_can_be_made_anonymous(text: str) -> None:
    assert "/home/a/" not in anonymous_text(f"{text} /home/a/{text}")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("meta-llama/Llama-3-8B", "meta-llama/Llama-3-8B"),
        ("gpt2", "gpt2"),
        ("/data/alice/llama/config.json", "llama"),
        ("./llama/", "llama"),
        (r"C:\models\llama", "llama"),
        ("~/llama.json", "llama.json"),
        ("config.json", "model"),
        ("/data/\udcff", "?"),
    ],
)
def test_a_model_keeps_its_public_name_and_loses_its_folder(name: str, kept: str) -> None:
    assert public_model_name(name) == kept


def add_a_column(db: Any) -> None:
    db["trials"].add_column("note", str)


def fail_half_way(db: Any) -> None:
    db["trials"].add_column("half", str)
    db.execute("INSERT INTO nowhere VALUES (1)")


def test_an_older_database_is_upgraded_and_keeps_its_trials(home: Path) -> None:
    path = stored(home, trial())
    with raw(path) as connection:
        connection.isolation_level = None
        migrate(connection, (*STEPS, add_a_column))
        migrate(connection, (*STEPS, add_a_column))
        assert schema_version(connection) == SCHEMA_VERSION + 1
        assert connection.execute("SELECT id, note FROM trials").fetchall() == [(1, None)]


def test_an_upgrade_that_fails_leaves_the_database_as_it_was(home: Path) -> None:
    path = stored(home, trial())
    with raw(path) as connection:
        connection.isolation_level = None
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            migrate(connection, (*STEPS, add_a_column, fail_half_way))
        columns = {row[1] for row in connection.execute("PRAGMA table_info(trials)")}
        assert not {"note", "half"} & columns
    with open_store(home, DEVICE) as store:
        assert store.trials() == [trial(id=1)]


@pytest.mark.parametrize("writable", [True, False])
def test_a_database_of_a_newer_version_is_left_alone(home: Path, writable: bool) -> None:
    path = stored(home, trial())
    with raw(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"newer autotune.*: upgrade autotune"):
        open_store(home, DEVICE, writable=writable)
    assert path.read_bytes() == before


def a_text_file(path: Path) -> None:
    path.write_text("these are not the rows you are looking for\n" * 200)


def another_programs_database(path: Path) -> None:
    with raw(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")


def a_database_with_its_head_cut_off(path: Path) -> None:
    stored(path.parent.parent, trial())
    path.write_bytes(path.read_bytes()[100:])


@pytest.mark.parametrize("writable", [True, False])
@pytest.mark.parametrize("make", [a_text_file, another_programs_database, a_database_with_its_head_cut_off])
def test_a_file_that_is_not_ours_is_kept_and_said_to_be_moved_away(
    home: Path, path: Path, make: Any, writable: bool
) -> None:
    path.parent.mkdir(parents=True)
    make(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"move it .*away") as caught:
        open_store(home, DEVICE, writable=writable)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_a_damaged_page_is_an_error_that_says_what_to_do_and_keeps_the_file(home: Path) -> None:
    path = stored(home, *[trial()] * 50)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    with open_store(home, DEVICE) as store, pytest.raises(StoreError, match="is damaged: move it"):
        store.trials()
    assert path.read_bytes() == content


def test_a_missing_table_is_damage(home: Path) -> None:
    path = stored(home)
    with raw(path) as connection:
        connection.execute("DROP TABLE trials")
    with open_store(home, DEVICE) as store, pytest.raises(StoreError, match="is damaged"):
        store.append(trial())


def test_after_moving_a_database_away_its_log_does_not_reach_the_new_one(home: Path) -> None:
    with open_store(home, DEVICE) as opened:
        opened.append(trial())
        log = opened.path.with_name(f"{opened.path.name}-wal")
        content = log.read_bytes()
    opened.path.rename(opened.path.with_suffix(".away"))
    log.write_bytes(content)
    with open_store(home, DEVICE) as store:
        assert store.trials() == []
        assert store.append(trial()).id == 1
    assert log.with_name(f"{log.name}.old").read_bytes() == content


def test_a_creation_that_was_cut_off_is_begun_again(home: Path, path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.touch()
    path.with_name(f"{path.name}.new").write_text("half")
    with open_store(home, DEVICE) as store:
        assert store.append(trial()).id == 1


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for home in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="point AUTOTUNE_HOME at a folder of yours"):
            open_store(home, DEVICE)


def test_a_folder_in_the_files_place_is_an_error(home: Path, path: Path) -> None:
    path.mkdir(parents=True)
    for writable in (True, False):
        with pytest.raises(StoreError, match="is not a GPU database of autotune: move it away"):
            open_store(home, DEVICE, writable=writable)


def test_reading_what_does_not_exist_makes_nothing(home: Path) -> None:
    with pytest.raises(StoreError, match=r"nothing is stored about .*: run autotune fit"):
        open_store(home, DEVICE, writable=False)
    assert not home.exists()


def test_a_store_opened_to_read_does_not_write(home: Path) -> None:
    stored(home, trial())
    with open_store(home, DEVICE, writable=False) as store:
        with pytest.raises(StoreError, match="cannot be opened or written"):
            store.append(trial())
        assert store.trials() == [trial(id=1)]


def test_a_reader_sees_what_a_writer_has_just_committed(store: GpuStore, home: Path) -> None:
    with open_store(home, DEVICE, writable=False) as reader:
        store.append(trial())
        assert reader.trials() == [trial(id=1)]


@pytest.fixture
def read_only_home() -> Iterator[Path]:
    """A home with one trial that this process can read and not write, root or not."""
    with tempfile.TemporaryDirectory() as folder:
        path = stored(Path(folder), trial())
        stored(Path(folder) / "imports")  # all modules are loaded: root's may be out of reach below
        places = [(path, 0o444), (path.parent / ".lock", 0o444), (path.parent, 0o555), (Path(folder), 0o555)]
        for place, mode in places:
            place.chmod(mode)
        as_root = os.geteuid() == 0
        try:
            if as_root:
                os.seteuid(65534)
            yield Path(folder)
        finally:
            if as_root:
                os.seteuid(0)
            for place, _ in reversed(places):
                place.chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_a_read_only_folder_can_be_read(read_only_home: Path) -> None:
    with open_store(read_only_home, DEVICE, writable=False) as store:
        assert store.trials() == [trial(id=1)]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
@pytest.mark.parametrize("device", [DEVICE, a_gpu(80, name="New Card")], ids=["stored", "new"])
def test_writing_to_a_read_only_folder_fails_when_it_is_opened(read_only_home: Path, device: Device) -> None:
    with pytest.raises(StoreError, match="make it writable, or point AUTOTUNE_HOME"):
        open_store(read_only_home, device)


def test_a_database_locked_for_too_long_is_an_error_and_still_readable(home: Path) -> None:
    path = stored(home, trial())
    with open_store(home, DEVICE, busy_timeout_s=0.05) as store, raw(path) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="in use by another process: wait for it"):
            store.append(trial())
        with pytest.raises(StoreError, match="in use by another process"):
            open_store(home, DEVICE, busy_timeout_s=0.05)
        assert store.trials() == [trial(id=1)]
        other.rollback()
        assert store.append(trial()).id == 2


def test_a_full_disk_is_an_error_that_loses_nothing(home: Path) -> None:
    path = stored(home, trial())
    connection = sqlite3.connect(path, isolation_level=None)
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with GpuStore(connection, path) as store:
        with pytest.raises(StoreError, match="is full; what was stored is safe: free some space"):
            store.append(trial(report=report(log_tail="x" * 100_000)))
        assert store.trials() == [trial(id=1)]
        connection.execute(f"PRAGMA max_page_count = {pages + 100}")
        assert store.append(trial()).id == 2
