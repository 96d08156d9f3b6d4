"""The hook in processes without torch, and what a loop without transformers tells by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import InvalidRequest
from autotune.recover import apply
from autotune.recover.facts import PLAN_SCHEMA, PLAN_VARIABLE
from autotune.recover.progress import read_told
from autotune.recover.trainer import hook_environ
from autotune.recover.trainer.death import describe
from autotune.recover.trainer.environ import HOOK_FOLDER
from autotune.recover.trainer.events import Events
from autotune.recover.trainer.longest import longest_sample
from autotune.recover.trainer.report import Plan, Reporter, read_plan
from autotune.recover.trainer.settings import apply_to_arguments
from autotune.recover.trainer.stop import StopRequests

FAKE_TRAINER = """
class Trainer:
    def train(self): pass
    def training_step(self, model, inputs): pass
    def evaluate(self): pass
    def predict(self): pass
    def _save_checkpoint(self, model, trial): pass
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a plan, and a stand-in for transformers that imports at once."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("")
    (tmp_path / "transformers" / "trainer.py").write_text(FAKE_TRAINER)
    document = {"schema": PLAN_SCHEMA, "events": str(tmp_path / "events.jsonl")}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    return tmp_path


def python(place: Path, code: str, *, plan: str | None = "plan.json", **more: str) -> subprocess.CompletedProcess[str]:
    """Run `code` under the hook; nothing but the standard library and the stand-in can be imported."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(place), *more.pop("paths", "").split()])}
    environ = hook_environ(environ) | more
    if plan is not None:
        environ[PLAN_VARIABLE] = str(place / plan)
    return subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=place, capture_output=True, text=True, timeout=60
    )


def events(place: Path) -> list[dict[str, Any]]:
    path = place / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_hook_comes_first_and_the_rest_stays() -> None:
    environ = hook_environ({"PYTHONPATH": f"/a{os.pathsep}{os.pathsep}/b", "HOME": "/h"})
    assert environ == {"PYTHONPATH": os.pathsep.join([str(HOOK_FOLDER), "/a", "/b"]), "HOME": "/h"}
    assert hook_environ(environ) == environ
    assert hook_environ({})["PYTHONPATH"] == str(HOOK_FOLDER)


def test_the_sitecustomize_that_is_shadowed_still_runs(place: Path) -> None:
    other = place / "site"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import builtins; builtins.shadowed = __name__")
    code = "import sys, sitecustomize; print(shadowed, sitecustomize.__file__)"
    for plan in ("plan.json", None):
        done = python(place, code, plan=plan, paths=str(other))
        assert done.stdout.split() == ["sitecustomize", str(other / "sitecustomize.py")], done.stderr


def test_a_shadowed_sitecustomize_that_fails_leaves_the_hook_installed(place: Path) -> None:
    other = place / "site"
    other.mkdir()
    (other / "sitecustomize.py").write_text("raise RuntimeError('mine')")
    done = python(place, "import transformers.trainer", paths=str(other))
    assert done.returncode == 0
    assert "mine" in done.stderr
    assert [event["event"] for event in events(place)] == ["start", "phase"]


def test_nothing_is_loaded_until_transformers_is(place: Path) -> None:
    code = (
        "import sys, json; print([name for name in sys.modules if name.split('.')[0] in ('autotune', 'transformers')])"
    )
    assert python(place, code).stdout.strip() == "[]"


def test_the_hook_starts_with_the_import_of_the_trainer_and_needs_no_torch(place: Path) -> None:
    code = """
import sys, inspect
from transformers.trainer import Trainer
import transformers.trainer
assert Trainer._autotune_hooked and inspect.getsource(transformers.trainer)
print([name for name in ("torch", "numpy", "psutil", "click") if name in sys.modules])
"""
    done = python(place, code)
    assert done.stdout.strip() == "[]", done.stderr
    assert [event["event"] for event in events(place)] == ["start", "phase"]


def test_without_a_plan_the_trainer_is_untouched(place: Path) -> None:
    code = "from transformers.trainer import Trainer; print(hasattr(Trainer, '_autotune_hooked'))"
    assert python(place, code, plan=None).stdout.strip() == "False"


def test_an_exception_while_loading_is_told_with_its_phase(place: Path) -> None:
    done = python(place, "import transformers\nraise MemoryError('no room for the model')")
    assert done.returncode == 1
    assert "MemoryError" in done.stderr
    died = events(place)[-1]
    assert (died["event"], died["phase"], died["oom"]) == ("died", "load", True)
    assert (died["exception"], died["message"], died["saved"]) == ("MemoryError", "no room for the model", None)


def test_a_launcher_that_only_reports_its_ranks_death_is_no_death(place: Path) -> None:
    python(place, "import transformers\nclass ChildFailedError(Exception): pass\nraise ChildFailedError('rank 1')")
    assert events(place) == []


@pytest.mark.parametrize("content", ["", "[]", '{"schema": "autotune.plan/9"}', None])
def test_a_plan_that_cannot_be_read_is_one_line_and_no_obstacle(place: Path, content: str | None) -> None:
    if content is None:
        (place / "plan.json").unlink()
    else:
        (place / "plan.json").write_text(content)
    done = python(place, "from transformers.trainer import Trainer\nTrainer().train()\nprint('trained')")
    assert done.stdout.strip() == "trained"
    assert all("training runs without its hook" in line for line in done.stderr.splitlines())
    assert done.stderr


def test_a_rank_writes_under_its_number_and_only_rank_0_tells_phases(place: Path) -> None:
    python(place, "import transformers.trainer", RANK="3", LOCAL_RANK="1", WORLD_SIZE="4")
    assert [(event["event"], event["rank"]) for event in events(place)] == [("start", 3)]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_rank_dies_with_its_launcher_and_what_it_starts_does_not(place: Path) -> None:
    ask = "import ctypes; found = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(found))"
    ask = f"{ask}; print(found.value, flush=True)"
    code = f"{ask}\nimport subprocess, sys\nsubprocess.run([sys.executable, '-c', {ask!r}])"
    assert python(place, code, RANK="0").stdout.split() == [str(int(signal.SIGKILL)), "0"]


def test_apply_without_a_plan_gives_back_what_it_got(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLAN_VARIABLE, raising=False)
    anything = object()
    assert apply(anything) is anything


class Arguments:
    """The names that `TrainingArguments` has before transformers 5.23."""

    per_device_train_batch_size = 8
    gradient_accumulation_steps = 1
    per_device_eval_batch_size = 8
    dataloader_num_workers = 4
    dataloader_persistent_workers = True
    dataloader_prefetch_factor: int | None = 2
    gradient_checkpointing = False
    gradient_checkpointing_kwargs: dict[str, Any] | None = None


class NewArguments(Arguments):
    activation_checkpointing = False
    activation_checkpointing_kwargs: dict[str, Any] | None = None


@pytest.mark.parametrize(
    ("made", "changed", "expected", "left"),
    [
        (Arguments, {"micro_batch_size": 2}, {"per_device_train_batch_size": 2}, ()),
        (Arguments, {"eval_micro_batch_size": 1}, {"per_device_eval_batch_size": 1}, ()),
        (Arguments, {"dataloader_workers": 0}, {"dataloader_num_workers": 0, "dataloader_prefetch_factor": None}, ()),
        (
            Arguments,
            {"gradient_checkpointing": "full"},
            {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
            (),
        ),
        (
            Arguments,
            {"gradient_checkpointing": "every_2"},
            {"gradient_checkpointing": False},
            ("gradient_checkpointing",),
        ),
        (
            NewArguments,
            {"gradient_checkpointing": "every_2"},
            {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": 2},
            },
            (),
        ),
        (Arguments, {"optimizer": "paged_adamw_8bit"}, {"per_device_train_batch_size": 8}, ("optimizer",)),
    ],
)
def test_settings_go_to_their_arguments_and_what_has_no_place_is_named(
    made: type[Arguments], changed: Mapping[str, Any], expected: Mapping[str, Any], left: tuple[str, ...]
) -> None:
    arguments = made()
    assert apply_to_arguments(arguments, changed) == left
    assert {name: getattr(arguments, name) for name in expected} == expected


def test_a_users_reentrant_checkpointing_stays() -> None:
    arguments = Arguments()
    arguments.gradient_checkpointing_kwargs = {"use_reentrant": True}
    apply_to_arguments(arguments, {"gradient_checkpointing": "full"})
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": True}


def test_several_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    control, agreement = tmp_path / "control.json", str(tmp_path / "stop")
    ranks = [StopRequests(str(control), agreement, rank=rank, world_size=3) for rank in range(3)]
    stopped: dict[int, int] = {}
    for step in range(1, 9):
        if step == 4:
            control.write_text('{"do": "save_and_stop"}')
        for rank in (1, 2, 0):  # the one that decides is the last to look
            if rank not in stopped and ranks[rank].is_due(step):
                stopped[rank] = step
    assert stopped == {0: 6, 1: 6, 2: 6}


def test_a_control_file_that_asks_for_nothing_known_stops_nothing(tmp_path: Path) -> None:
    control = tmp_path / "control.json"
    requests = StopRequests(str(control), None, rank=0, world_size=1)
    for text in ("", "[1]", '{"do": "dance"}'):
        control.write_text(text)
        assert not requests.is_due(1)
    control.write_text('{"do": "save_and_stop"}')
    assert requests.is_due(2)


def test_sigterm_is_a_request_once_and_not_in_what_the_process_forks(place: Path) -> None:
    code = """
import os, signal
from autotune.recover.trainer.stop import StopSignal
stop = StopSignal()
stop.install()
child = os.fork()
os.kill(os.getpid(), signal.SIGTERM) if child == 0 else None
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop.is_requested, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print(stop.is_requested, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("lives on", flush=True)
"""
    done = python(place, code, paths=str(Path(__file__).parent.parent))
    assert done.stdout.split() == [str(-signal.SIGTERM), "False", "True"], done.stderr
    assert done.returncode == -signal.SIGTERM


def test_somebody_elses_sigterm_handler_stays(place: Path) -> None:
    code = """
import signal
from autotune.recover.trainer.stop import StopSignal
def mine(*_): pass
signal.signal(signal.SIGTERM, mine)
stop = StopSignal()
stop.install()
stop.remove()
print(signal.getsignal(signal.SIGTERM) is mine)
"""
    assert python(place, code, paths=str(Path(__file__).parent.parent)).stdout.strip() == "True"


def test_events_that_cannot_be_written_are_counted(tmp_path: Path) -> None:
    lost = Events(str(tmp_path / "no" / "events.jsonl"))
    lost.write("step", step=1)
    (tmp_path / "no").mkdir()
    lost.write("step", step=2)
    lost.close()
    assert lost.lost == 1
    assert json.loads((tmp_path / "no" / "events.jsonl").read_text())["step"] == 2
    assert (tmp_path / "no" / "events.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("error", "oom"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), True),
        (ValueError("expected sequence of length 8"), False),
    ],
)
def test_a_lack_of_memory_is_known_by_class_or_words(error: Exception, oom: bool) -> None:
    assert describe(error)["oom"] is oom


def test_the_longest_sample_is_read_where_it_costs_little(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    samples = [{"input_ids": [1] * count} for count in (3, 9, 5, 7)]
    made = datasets.Dataset.from_list(samples)
    assert longest_sample(samples) == 9
    assert longest_sample(made) == 9
    assert longest_sample(made.select([0, 2])) == 5
    assert longest_sample(made.filter(lambda sample: len(sample["input_ids"]) < 8)) == 7
    assert longest_sample(datasets.concatenate_datasets([made, made.select([3])])) == 9
    assert longest_sample(datasets.Dataset.from_dict({"length": [4, 6], "text": ["a", "b"]})) == 6
    assert longest_sample(datasets.Dataset.from_dict({"text": ["a", "b"]})) is None
    assert longest_sample(["text"]) is None
    assert longest_sample([]) is None
    assert longest_sample(made.to_iterable_dataset()) is None


def test_a_plain_loop_tells_the_same_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with pytest.raises(MemoryError):
        a_loop_that_dies(tmp_path, path)
    told = read_told(path)
    assert (told.progress.first_step, told.progress.step, told.progress.checkpoint_step) == (4, 5, 5)
    assert told.progress.loss == 1.5
    assert told.death is not None
    assert told.death.batch is not None
    assert (told.death.exception, told.death.part, told.death.batch.tokens) == ("MemoryError", "forward_backward", 512)


def a_loop_that_dies(folder: Path, path: Path) -> None:
    with Reporter(Plan(events=str(path))) as report:
        report.begin(step=4, max_steps=8, micro_batch_size=2, gradient_accumulation_steps=1)
        report.step(5, samples=2, tokens=128, loss=1.5)
        report.saved(str(folder / "checkpoint-5"), 5)
        report.batch_begins(2, 512)
        raise MemoryError("no more")


def test_a_plan_is_read_from_where_the_environment_says(place: Path) -> None:
    plan = read_plan({PLAN_VARIABLE: str(place / "plan.json")})
    assert plan is not None
    assert (plan.events, plan.changed, plan.emergency) == (str(place / "events.jsonl"), {}, False)
    assert read_plan({}) is None
    with pytest.raises(InvalidRequest, match=r"nowhere.*unset AUTOTUNE_PLAN"):
        read_plan({PLAN_VARIABLE: str(place / "nowhere")})
