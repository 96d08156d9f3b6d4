"""A run that meets a longer batch: what is read of it and promised, by hand, and a rehearsal on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotune.recover.facts import Action, Decision, EndedBy, Incident, Phase
from autotune.recover.plan import RunState
from autotune.values import GIB, MIB, Device, Judgement, ModelSource, Verdict
from benchmarks import gpu_run, gpu_run_one
from benchmarks.gpu_run_facts import Asked, Attempt, Ran, Step, attempts_of, compare, promises, recovery_s
from benchmarks.gpu_run_plan import Plan
from tests.tiny import CONFIG, MODEL

CARD = Device(kind="cuda", index=0, name="Example 24", total_bytes=24 * GIB)
STEPS, LONG_AT = 4, 3
ASKED = Asked(
    steps=STEPS, long_at_step=LONG_AT, effective_batch_size=8, limit_bytes=12 * GIB, loss_bound=1e-2, is_card=True
)


def a_plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "device": CARD,
        "source": MODEL,
        "model": "tiny",
        "steps": STEPS,
        "long_at_step": LONG_AT,
        "short_length": 64,
        "long_length": 256,
        "effective_batch_size": 8,
        "micro_batch_size": 4,
        "compute_dtype": "bfloat16",
        "save_steps": 2,
    }
    return Plan(**{**fields, **changes})


def a_step(number: int, **changes: Any) -> Step:
    """A second each; the first begins at 10."""
    fields: dict[str, Any] = {
        "attempt": 1,
        "step": number,
        "began": 9.0 + number,
        "ended": 9.9 + number,
        "ids": (2 * number, 2 * number + 1),
        "longest": 64,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "loss": 10.0 - number,
        "learning_rate": 1e-4 * (STEPS - number),
    }
    return Step(**{**fields, **changes})


def steps(**changes: Any) -> tuple[Step, ...]:
    return tuple(a_step(number, **changes) for number in range(1, STEPS + 1))


def a_run(**changes: Any) -> Ran:
    samples = ((1.0, GIB), (10.0, 12 * GIB), (14.0, GIB), (20.0, 11 * GIB), (30.0, GIB))
    fields: dict[str, Any] = {"exit_code": 0, "wall_s": 30.0, "began": 0.0, "samples": samples, "steps": steps()}
    return Ran(**{**fields, **changes})


def an_attempt(number: int = 1, **changes: Any) -> Attempt:
    fields: dict[str, Any] = {
        "number": number,
        "began": 5.0,
        "ended": 12.0,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "first_step": 0,
        "most_bytes": 12 * GIB,
        "least_bytes_after": GIB,
    }
    return Attempt(**{**fields, **changes})


ATTEMPTS = (an_attempt(), an_attempt(2, began=18.0, ended=25.0, most_bytes=11 * GIB))


def a_state(**changes: Any) -> RunState:
    fields: dict[str, Any] = {
        "run_id": "r",
        "number": 1,
        "attempt": 1,
        "time_utc": "2026-01-01T00:00:00+00:00",
        "judgement": Judgement(verdict=Verdict.DEVICE_OOM),
        "phase": Phase.TRAIN,
        "ended_by": EndedBy.ITSELF,
        "exit_code": 1,
        "signal": None,
        "step": LONG_AT - 1,
        "batch": None,
        "decision": Decision(action=Action.STEP_DOWN, why="It was too large."),
    }
    return RunState(run_id="r", argv=("x",), cwd="/", attempts=2, incidents=(Incident(**{**fields, **changes}),))


def failed(bare: Ran, supervised: Ran, attempts: Any = ATTEMPTS, state: RunState | None = None) -> list[str]:
    """First words of the promises that were not held."""
    found = promises(ASKED, bare, supervised, attempts, state or a_state())
    return [promise.text.split(":")[0] for promise in found if not promise.held]


# Reading


def test_attempts_have_the_memory_of_their_time_and_the_least_until_the_next() -> None:
    begin = {"event": "begin", "time": 6.0, "step": 0, "micro_batch_size": 4, "gradient_accumulation_steps": 2}
    events = {
        1: [
            {"event": "start", "time": 5.0},
            {**begin, "gradient_checkpointing": True},
            {"event": "died", "time": 12.0},
        ],
        2: [{"event": "start", "time": 18.0}, {**begin, "step": 2}, {"event": "end", "time": 25.0}],
    }
    first, second = attempts_of(events, a_run().samples)
    assert first == ATTEMPTS[0]
    assert (second.first_step, second.most_bytes, second.least_bytes_after) == (2, 11 * GIB, GIB)


def test_a_recovery_lasts_from_the_death_to_the_end_of_the_next_step() -> None:
    assert recovery_s(ATTEMPTS, [a_step(1), a_step(3, began=20.0, ended=21.5)]) == 9.5
    assert recovery_s(ATTEMPTS, [a_step(1)]) is None


def test_of_a_step_that_was_taken_twice_the_last_counts() -> None:
    found = compare(steps(), (a_step(2, loss=99.0), *steps()))
    assert found.steps == (STEPS, STEPS)
    assert found.loss_difference == found.rate_difference == 0
    assert found.same_samples


def test_the_cpu_limit_lies_between_what_short_and_long_samples_hold() -> None:
    held = [(9.95, 1000 * MIB), (11.5, 1100 * MIB), (12.5, 1500 * MIB), (13.5, 1600 * MIB)]
    limit = gpu_run_one.limit_between(a_plan(), a_run(samples=tuple(held)))
    assert limit == 1400 * MIB


# Promises


def test_a_run_that_ended_as_if_undisturbed_holds_every_promise() -> None:
    assert failed(a_run(), a_run()) == []


@pytest.mark.parametrize(
    ("bare", "supervised", "attempts", "state", "broken"),
    [
        ({"exit_code": 1}, {}, {}, {}, "undisturbed"),
        ({}, {"exit_code": None}, {}, {}, "supervised"),
        ({}, {}, {}, {"step": LONG_AT - 2}, f"out of memory on the long batch in step {LONG_AT}, and recovered"),
        ({}, {}, {}, {"phase": Phase.SAVE}, f"out of memory on the long batch in step {LONG_AT}, and recovered"),
        ({}, {}, {"least_bytes_after": GIB + 200 * MIB}, {}, "memory in use returned"),
        ({}, {}, {"least_bytes_after": None}, {}, "memory in use returned"),
        ({}, {}, {"most_bytes": 14 * GIB}, {}, "took at most 13.00 GiB of 12.00 GiB"),
        ({}, {"steps": steps(gradient_accumulation_steps=1)}, {}, {}, "effective batch size 8"),
        ({}, {"steps": steps(ids=(0, 1))}, {}, {}, "the same samples in the same steps, in the same order"),
        ({}, {"steps": steps(learning_rate=1e-5)}, {}, {}, "learning rates"),
        ({}, {"steps": steps(loss=9.5)}, {}, {}, "losses"),
    ],
)
def test_each_difference_breaks_its_own_promise(
    bare: dict[str, Any], supervised: dict[str, Any], attempts: dict[str, Any], state: dict[str, Any], broken: str
) -> None:
    changed = (replace(ATTEMPTS[0], **attempts), ATTEMPTS[1])
    assert failed(a_run(**bare), a_run(**supervised), changed, a_state(**state)) == [broken]


def test_a_run_that_never_died_recovered_nothing() -> None:
    state = replace(a_state(), incidents=())
    assert len(failed(a_run(), a_run(), ATTEMPTS[:1], state)) == 2  # nor was memory seen to return between attempts


# The command


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], 4, "no GPU is visible here"),
        (["--gpu", "cpu", "--long-at-step", "40"], 1, "--long-at-step 40 is not among 32 steps"),
        (["--gpu", "cpu", "--long-length", "256"], 1, "--long-length must be above --short-length 256"),
        (["--gpu", "cpu", "--long-length", "9000"], 1, "the model has 8,192 positions"),
        (["--gpu", "cpu", "--micro-batch-size", "3"], 1, "does not divide the effective batch size 16"),
    ],
)
def test_bad_input_is_one_line(options: list[str], code: int, said: str) -> None:
    done = CliRunner().invoke(gpu_run.command, options, env={"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""})
    assert done.exit_code == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_says_what_it_trains_to_who_reads_commands(tmp_path: Path) -> None:
    from autotune.recover.command import read_command

    found = read_command(tuple(a_plan().command(tmp_path)), cwd=Path.cwd(), environ={}, hooked=True).settings
    assert (found.model, found.micro_batch_size, found.gradient_accumulation_steps) == ("tiny", 4, 2)
    assert (found.gradient_checkpointing, found.compute_dtype, found.lora_rank) == ("full", "bfloat16", 16)
    assert (found.output_dir, found.save_steps) == (str(tmp_path / "out"), 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rehearsal_dies_on_the_long_sample_recovers_once_and_keeps_everything(tmp_path: Path) -> None:
    model, output = tmp_path / "tiny.json", tmp_path / "results"
    source = ModelSource(name="tiny", config={**CONFIG, "vocab_size": 16384, "tie_word_embeddings": False})
    model.write_text(json.dumps(source.config))
    sizes = {"--short-length": 32, "--long-length": 512, "--steps": 8, "--long-at-step": 6, "--save-steps": 3}
    options = ["--gpu", "cpu", "--model", str(model), "--effective-batch-size", "4", "--output", str(output)]
    options += [word for name, value in sizes.items() for word in (name, str(value))]
    done = CliRunner().invoke(gpu_run.command, options)
    assert done.exit_code == 0, done.output
    assert "FAIL" not in done.output

    (path,) = output.iterdir()
    record = json.loads(path.read_text())
    assert record["schema"] == "autotune.gpu_run/1"
    assert str(tmp_path) not in path.read_text()
    assert record["environment"]["transformers"]
    bare, supervised = record["undisturbed"], record["supervised"]
    (incident,) = supervised["state"]["incidents"]
    assert incident["judgement"]["verdict"] == "device_oom"
    assert incident["batch"] == {"samples": 4, "tokens": 512}
    assert incident["steps_lost"] == 0
    assert [one["first_step"] for one in supervised["attempts"]] == [0, 5]
    assert [one["micro_batch_size"] < 4 for one in supervised["attempts"]] == [False, True]
    assert all(one["most_bytes"] > 100 * MIB for one in supervised["attempts"])
    assert len(bare["samples"]) > 10
    assert [step["step"] for step in bare["steps"]] == list(range(1, 9))
    assert max(range(8), key=lambda place: bare["steps"][place]["longest"]) == 5
    assert record["compared"]["loss_difference"] <= 1e-3
    assert "device_oom" in supervised["report"]
    assert {event["event"] for event in supervised["events"]["1"]} >= {"begin", "step", "died"}
    assert all(promise["held"] for promise in record["promises"])
