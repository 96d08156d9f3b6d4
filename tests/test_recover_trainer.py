"""A real Trainer under a plan: what it is told, what it tells, and what it saves before it dies.

AUTOTUNE_TRAINER_PYTHON names another interpreter, with another transformers, to train with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.recover.facts import PLAN_SCHEMA
from autotune.recover.trainer import hook_environ

PYTHON = os.environ.get("AUTOTUNE_TRAINER_PYTHON", sys.executable)
SCRIPT = Path(__file__).with_name("trainer_scenarios.py")
SMALLER = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}
LARGER = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
STEPS = range(1, 17)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the scenarios are forks of one process"),
]


class Scenarios:
    """The scenarios' folders, written before they run and read after."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.order: list[str] = []

    def add(self, name: str, *, plan: dict[str, Any] | None = None, **told: Any) -> None:
        place = self.folder / name
        place.mkdir()
        told.setdefault("output_dir", str(place / "out"))
        if plan is not None:
            document = {
                "schema": PLAN_SCHEMA,
                "config": {},
                "changed": {},
                "events": str(place / "events.jsonl"),
                "control": str(place / "control.json"),
                **plan,
            }
            (place / "plan.json").write_text(json.dumps(document))
        (place / "scenario.json").write_text(json.dumps({"plan": plan is not None, **told}))
        self.order.append(name)

    def run(self) -> None:
        (self.folder / "order.json").write_text(json.dumps(self.order))
        with (self.folder / "log").open("w") as log:
            subprocess.run(
                [PYTHON, str(SCRIPT), str(self.folder)], check=True, stdout=log, stderr=log, timeout=240, env=_environ()
            )

    def result(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.folder / name / "result.json").read_text())
        for key in ("losses", "rates", "seen"):
            result[key] = {int(step): value for step, value in result[key].items()}
        return result

    def status(self, name: str) -> int:
        return int((self.folder / name / "status").read_text())

    def events(self, name: str, kind: str | None = None) -> list[dict[str, Any]]:
        return read_events(self.folder / name / "events.jsonl", kind)

    def checkpoints(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.folder / name / "out").glob("checkpoint-*"))


def read_events(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def _environ(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("AUTOTUNE_")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Scenarios:
    """All scenarios, run once."""
    found = Scenarios(tmp_path_factory.mktemp("scenarios"))
    at = found.folder
    found.add("plain")
    found.add("told", arguments=LARGER, plan={"changed": SMALLER, "config": {**SMALLER, "eval_micro_batch_size": 3}})
    found.add("checkpointing", plan={"changed": {"gradient_checkpointing": "full"}})
    found.add(
        "checkpointing_off",
        arguments={"gradient_checkpointing": True},
        plan={"changed": {"gradient_checkpointing": "off"}},
    )
    found.add("forward", plan={}, oom="forward", at=7)
    found.add(
        "forward_again",
        arguments=LARGER,
        plan={"changed": SMALLER, "resume_from_checkpoint": str(at / "forward/out/checkpoint-7")},
        output_dir=str(at / "forward/out"),
    )
    found.add(
        "smaller_still",
        arguments=LARGER,
        resume=True,
        plan={
            "changed": {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
            "resume_from_checkpoint": str(at / "forward/out/checkpoint-7"),
        },
    )
    found.add("new_epoch", plan={}, oom="forward", at=8, call=1)
    found.add("new_epoch_again", plan={"resume_from_checkpoint": str(at / "new_epoch/out/checkpoint-8")})
    for name, step in (("fetch", 6), ("fetch_epoch", 8)):
        found.add(name, plan={}, oom="fetch", at=step)
        found.add(f"{name}_again", plan={"resume_from_checkpoint": str(at / f"{name}/out/checkpoint-{step}")})
    found.add("nothing_to_load", plan={"resume_from_checkpoint": str(at / "no-checkpoint")})
    found.add("optimizer", plan={}, oom="optimizer", at=7)
    found.add("evaluate", arguments={"eval_strategy": "steps", "eval_steps": 3}, plan={}, oom="evaluate")
    found.add("right_after_save", plan={}, oom="forward", at=5)
    found.add("saves_nothing", arguments={"save_strategy": "no"}, plan={}, oom="forward", at=7)
    found.add("asked_to_save", arguments={"save_strategy": "no"}, plan={"emergency": True}, oom="forward", at=7)
    found.add("limited", arguments={"save_total_limit": 1}, plan={}, oom="forward", at=7)
    found.add("terminated", plan={}, signal_at=4)
    found.add("stopped", plan={}, control_at=3)
    found.add("full_disk", plan={"events": "/dev/full"})
    found.run()
    return found


def test_a_run_tells_its_begin_every_step_every_checkpoint_and_its_end(ran: Scenarios) -> None:
    kinds = [event["event"] for event in ran.events("told") if event["event"] not in ("step", "phase")]
    assert kinds == ["start", "begin", "saved", "saved", "saved", "saved", "end"]
    begin = ran.events("told", "begin")[0]
    assert (begin["step"], begin["max_steps"], begin["world_size"], begin["resumed"]) == (0, 16, 1, False)
    assert (begin["device"], begin["save_strategy"], begin["save_steps"]) == ("cpu", "steps", 5)
    assert begin["dataset_longest"] == 24
    assert begin["device_total_bytes"] > 0
    steps = ran.events("told", "step")
    assert [step["step"] for step in steps] == list(STEPS)
    assert all(step["samples"] == 4 and len(step["micro_batches"]) == 2 for step in steps)
    assert all(0 < sum(step["micro_batches"]) <= step["seconds"] for step in steps)
    assert steps[-1]["longest"] == {"samples": 2, "tokens": 24}
    assert {step["step"]: step["loss"] for step in steps} == ran.result("told")["losses"]
    assert {step["step"]: step["learning_rate"] for step in steps} == pytest.approx(ran.result("told")["rates"])
    assert steps[-1]["allocated"] > 0
    saved = ran.events("told", "saved")
    assert [(Path(event["path"]).name, event["step"]) for event in saved] == [
        ("checkpoint-5", 5), ("checkpoint-10", 10), ("checkpoint-15", 15), ("checkpoint-16", 16),
    ]  # fmt: skip
    assert all(event["seconds"] > 0 and not event["emergency"] for event in saved)
    assert ran.events("told", "end")[0]["stopped"] is False


def test_phases_follow_what_the_trainer_does(ran: Scenarios) -> None:
    phases = [event["phase"] for event in ran.events("told", "phase")]
    assert phases[:4] == ["load", "train", "save", "train"]
    assert phases[-1] == "done"


def test_a_changed_micro_batch_trains_as_if_the_arguments_had_said_so(ran: Scenarios) -> None:
    begin = ran.events("told", "begin")[0]
    assert (begin["micro_batch_size"], begin["gradient_accumulation_steps"]) == (2, 2)
    assert ran.result("told")["losses"] == ran.result("plain")["losses"]
    assert ran.result("told")["seen"] == ran.result("plain")["seen"]


def test_apply_changes_arguments_before_a_trainer_is_made(ran: Scenarios) -> None:
    assert (ran.result("told")["applied"], ran.result("plain")["applied"]) == (2, 2)
    assert ran.result("smaller_still")["applied"] == 1


def test_what_the_plan_says_and_the_trainer_does_not_do_is_told(ran: Scenarios) -> None:
    assert ran.events("told", "begin")[0]["differences"] == {"eval_micro_batch_size": [3, 8]}


def test_checkpointing_is_switched_and_changes_no_loss(ran: Scenarios) -> None:
    for name, is_on in (("checkpointing", True), ("checkpointing_off", False)):
        assert ran.events(name, "begin")[0]["gradient_checkpointing"] is is_on
        assert ran.result(name)["losses"] == pytest.approx(ran.result("plain")["losses"], rel=1e-5)


@pytest.mark.parametrize(("name", "step"), [("forward", 7), ("new_epoch", 8), ("asked_to_save", 7)])
def test_out_of_memory_in_forward_leaves_a_complete_checkpoint(ran: Scenarios, name: str, step: int) -> None:
    assert ran.result(name)["error"] == "OutOfMemoryError"
    died = ran.events(name, "died")[0]
    assert (died["exception"], died["oom"], died["phase"]) == ("torch.OutOfMemoryError", True, "train")
    assert (died["step"], died["part"]) == (step, "forward_backward")
    assert died["batch"]["samples"] == 2
    assert "simulated" in died["traceback"]
    checkpoint = Path(died["saved"])
    assert checkpoint.name == f"checkpoint-{step}"
    assert not (checkpoint / "checkpoint-is-incomplete.txt").exists()
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
    saved = ran.events(name, "saved")[-1]
    assert (saved["emergency"], saved["path"]) == (True, died["saved"])


@pytest.mark.parametrize(("name", "step"), [("fetch", 6), ("fetch_epoch", 8)])
def test_a_death_while_a_batch_is_fetched_saves_the_step_before(ran: Scenarios, name: str, step: int) -> None:
    died = ran.events(name, "died")[0]
    assert (died["exception"], died["oom"], died["part"], died["batch"]) == ("MemoryError", True, None, None)
    assert (died["step"], Path(died["saved"]).name) == (step, f"checkpoint-{step}")


@pytest.mark.parametrize(
    ("again", "step"), [("forward_again", 7), ("new_epoch_again", 8), ("fetch_again", 6), ("fetch_epoch_again", 8)]
)
def test_a_run_resumed_from_it_has_the_losses_of_an_undisturbed_one(ran: Scenarios, again: str, step: int) -> None:
    begin = ran.events(again, "begin")[0]
    assert (begin["step"], begin["resumed"], begin["max_steps"]) == (step, True, 16)
    plain, result = ran.result("plain"), ran.result(again)
    after = [number for number in STEPS if number > step]
    assert result["losses"] == pytest.approx({number: plain["losses"][number] for number in after}, rel=1e-6)
    assert result["rates"] == pytest.approx({number: plain["rates"][number] for number in after})
    assert result["seen"] == {number: plain["seen"][number] for number in after}


def test_the_plans_micro_batch_wins_over_the_checkpoints(ran: Scenarios) -> None:
    begin, plain = ran.events("smaller_still", "begin")[0], ran.result("plain")
    assert (begin["micro_batch_size"], begin["gradient_accumulation_steps"], begin["max_steps"]) == (1, 4, 16)
    result = ran.result("smaller_still")
    assert result["seen"] == {number: plain["seen"][number] for number in STEPS if number > 7}
    assert result["rates"] == pytest.approx({number: plain["rates"][number] for number in STEPS if number > 7})


def test_out_of_memory_in_the_optimizer_saves_nothing(ran: Scenarios) -> None:
    died = ran.events("optimizer", "died")[0]
    assert (died["part"], died["step"], died["saved"], died["oom"]) == ("optimizer", 7, None, True)
    assert ran.checkpoints("optimizer") == ["checkpoint-5"]


def test_a_death_while_the_checkpoint_is_loaded_is_told_as_that(ran: Scenarios) -> None:
    died = ran.events("nothing_to_load", "died")[0]
    assert (died["phase"], died["step"], died["oom"], died["saved"]) == ("load", None, False, None)
    assert ran.events("nothing_to_load", "begin") == []


def test_out_of_memory_in_evaluation_is_told_as_that_and_saves_the_step(ran: Scenarios) -> None:
    died = ran.events("evaluate", "died")[0]
    assert (died["phase"], died["part"], died["step"]) == ("evaluate", None, 3)
    assert Path(died["saved"]).name == "checkpoint-3"


def test_a_checkpoint_that_is_there_is_left_alone(ran: Scenarios) -> None:
    assert ran.events("right_after_save", "died")[0]["saved"] is None
    assert ran.checkpoints("right_after_save") == ["checkpoint-5"]
    assert [event["emergency"] for event in ran.events("right_after_save", "saved")] == [False]


def test_a_trainer_that_saves_nothing_saves_nothing_in_an_emergency(ran: Scenarios) -> None:
    assert ran.events("saves_nothing", "died")[0]["saved"] is None
    assert ran.checkpoints("saves_nothing") == []


def test_an_emergency_checkpoint_removes_no_other(ran: Scenarios) -> None:
    assert ran.checkpoints("limited") == ["checkpoint-5", "checkpoint-7"]


def test_sigterm_ends_the_step_saves_and_dies_of_the_signal(ran: Scenarios) -> None:
    assert ran.status("terminated") == -signal.SIGTERM
    assert ran.checkpoints("terminated") == ["checkpoint-4"]
    end = ran.events("terminated", "end")[0]
    assert (end["step"], end["stopped"]) == (4, True)


def test_a_request_to_stop_saves_and_ends_well(ran: Scenarios) -> None:
    assert (ran.status("stopped"), ran.result("stopped")["error"]) == (0, None)
    assert ran.checkpoints("stopped") == ["checkpoint-3"]
    assert ran.events("stopped", "end")[0]["stopped"] is True


def test_a_full_disk_for_events_does_not_hurt_training(ran: Scenarios) -> None:
    assert ran.result("full_disk")["losses"] == ran.result("plain")["losses"]


def test_the_hook_alone_applies_the_plan_and_tells_the_run(tmp_path: Path) -> None:
    """The script knows nothing of autotune, and the interpreter need not have it installed."""
    script = tmp_path / "train.py"
    script.write_text(HOOKED_SCRIPT)
    plan = write_plan(tmp_path, changed={"micro_batch_size": 1, "gradient_accumulation_steps": 4})
    done = run_python(script, plan, str(tmp_path / "out"))
    assert done.returncode == 1, done.stderr
    assert "autotune" not in done.stderr
    events = read_events(tmp_path / "events.jsonl")
    assert [event["event"] for event in events if event["event"] != "phase"] == [
        "start", "begin", "step", "step", "step", "saved", "end", "died",
    ]  # fmt: skip
    assert {"python", "torch", "transformers"} <= events[0]["versions"].keys()
    begin = next(event for event in events if event["event"] == "begin")
    assert (begin["micro_batch_size"], begin["gradient_accumulation_steps"], begin["max_steps"]) == (1, 4, 3)
    assert events[-1]["exception"] == "ValueError"
    assert events[-1]["phase"] == "done"


HOOKED_SCRIPT = """
import sys, torch
from transformers import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
    def forward(self, values=None):
        return {"loss": (values @ self.weight).square().mean()}

class Mine(Trainer):
    def training_step(self, *arguments, **named):
        return super().training_step(*arguments, **named)

arguments = TrainingArguments(
    output_dir=sys.argv[1], per_device_train_batch_size=4, num_train_epochs=1, report_to="none", use_cpu=True,
    disable_tqdm=True, save_strategy="epoch", remove_unused_columns=False,
)
Mine(model=Model(), args=arguments, train_dataset=[{"values": torch.ones(3)}] * 12).train()
raise ValueError("after training")
"""


def write_plan(folder: Path, **plan: Any) -> Path:
    document = {"schema": PLAN_SCHEMA, "events": str(folder / "events.jsonl"), **plan}
    path = folder / "plan.json"
    path.write_text(json.dumps(document))
    return path


def run_python(script: Path, plan: Path | None, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environ = hook_environ(_environ(**more))
    if plan is not None:
        environ["AUTOTUNE_PLAN"] = str(plan)
    return subprocess.run(
        [PYTHON, str(script), *arguments], env=environ, cwd=script.parent, capture_output=True, text=True, timeout=120
    )
