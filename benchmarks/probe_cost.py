"""What a probe costs beyond its own training steps: warm, in a fresh process, and by loading 16-bit weights.

`python -m benchmarks.probe_cost --output benchmarks/results`
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from autotune.errors import ProbeFailed
from autotune.hardware.environment import read_environment
from autotune.hardware.readers import read_machine, watcher
from autotune.hardware.select import select_device
from autotune.probe.executor import SubprocessExecutor
from autotune.values import (
    TRAINER_ADAPTER_DTYPE,
    TRAINER_LOSS,
    TRAINER_UPCAST,
    Device,
    ModelSource,
    ProbeReport,
    ProbeRequest,
    Trainer,
    TrainingConfig,
    to_json,
)
from autotune.workload.models import check_sequence_length, resolve_model
from benchmarks.records import (
    circumstances,
    model_folder,
    one_line_errors,
    plain_table,
    private_roots,
    record_path,
    shareable,
    usable_cores,
    write_record,
)

SCHEMA = "autotune.probe_cost/1"
MAX_WARM_OVERHEAD_S = 1.0  # on the CPU
MIN_FRESH_TO_WARM = 10.0
LATER_PROBES = 2  # warm ones of each round, after its first
LOAD_TIMEOUT_S = 1800.0

WARM_FIRST, WARM, FRESH, LOAD = "warm_first", "warm", "fresh", "load"
WORDS = {
    WARM_FIRST: "warm, first of its worker",
    WARM: "warm, later ones",
    FRESH: "a fresh process",
    LOAD: "loading 16-bit weights",
}
_USER_SCRIPT = Path(__file__).with_name("user_script.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement, in seconds."""

    way: str  # a key of WORDS
    round: int
    first_step_s: float  # from asking until the first optimizer step is done
    wall_time_s: float  # from asking until the answer is here (a process of its own: until its exit)
    overhead_s: float  # of that, what was neither forward nor backward nor optimizer
    phases_s: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A promise, and what was measured. `value` is at most or at least `bound`."""

    name: str
    value: float
    bound: float
    at_most: bool

    @property
    def held(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@click.command()
@click.option(
    "--model", default="HuggingFaceTB/SmolLM2-135M", show_default=True, help="A public id, a folder or a config.json."
)
@click.option("--sequence-length", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Each measures every way once or more."
)
@click.option("--device", "wanted", default="cpu", show_default=True, help="cpu or cuda:N.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for the raw samples.")
@click.option("--check", is_flag=True, help="Exit 1 where a bar is not held.")
def command(model: str, sequence_length: int, rounds: int, wanted: str, output: Path | None, check: bool) -> None:
    """Time to the first training step and cost of a probe, all ways in turn, so that other load affects all alike.

    \b
    Example:
      python -m benchmarks.probe_cost --rounds 5 --output benchmarks/results
    """
    with one_line_errors():
        device, _ = select_device(wanted, read_machine().devices)
        source = resolve_model(model, say=say)
        check_sequence_length(source, sequence_length)
        request = probe_request(source, sequence_length, device)
        record = {"schema": SCHEMA, **circumstances(device), "model": source.name, "config": to_json(request.config)}
        samples = measure(request, device, rounds)
    bars = bars_of(samples, device)
    click.echo(report(samples, bars))
    if output:
        record |= {"rounds": rounds, "summary": summary(samples), "bars": [{**asdict(b), "held": b.held} for b in bars]}
        record["samples"] = [asdict(sample) for sample in samples]
        path = record_path(output, "probe_cost", device, record["time_utc"][:10])
        write_record(path, shareable(record, private_roots(model_folder(model))))
        say(f"Written to {path}.")
    if check and not all(bar.held for bar in bars):
        sys.exit(1)


def probe_request(source: ModelSource, sequence_length: int, device: Device) -> ProbeRequest:
    """The smallest probe of a fit: two micro batches of one sample to an optimizer step, no memory limit."""
    trainer = Trainer.TRANSFORMERS
    return ProbeRequest(
        model=source,
        config=TrainingConfig(
            sequence_length=sequence_length,
            micro_batch_size=1,
            gradient_accumulation_steps=2,
            loss=TRAINER_LOSS[trainer],
            upcast=TRAINER_UPCAST[trainer],
            adapter_dtype=TRAINER_ADAPTER_DTYPE[trainer],
            trainer=trainer,
        ),
        device=device.id,
        memory_limit_bytes=None,
    )


def measure(request: ProbeRequest, device: Device, rounds: int) -> list[Sample]:
    """Every way in each round. Raises `ProbeFailed`."""
    samples = []
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as folder:
        say("Saving random 16-bit weights, once …")
        make_weights(request, device, Path(folder))
        for number in range(rounds):
            for sample in one_round(request, device, Path(folder), number):
                say(f"round {number + 1}: {WORDS[sample.way]}, cost {sample.overhead_s:.2f} s")
                samples.append(sample)
    return samples


def one_round(request: ProbeRequest, device: Device, folder: Path, number: int) -> Iterator[Sample]:
    with probing(device) as (executor, clock):
        yield sample_of(WARM_FIRST, number, executor, clock, request)
        for _ in range(LATER_PROBES):
            yield sample_of(WARM, number, executor, clock, request)
        executor.close()  # not on the fresh one's clock
        yield sample_of(FRESH, number, executor, clock, request)
    yield load_weights(request, device, folder, number)


class StepClock:
    """Hears the phases of a probe: the one after its optimizer step is its report."""

    def __init__(self) -> None:
        self.step_done = 0.0

    def __call__(self, phase: str) -> None:
        if phase == "report":
            self.step_done = time.monotonic()


@contextmanager
def probing(device: Device) -> Iterator[tuple[SubprocessExecutor, StepClock]]:
    """An executor as `autotune fit` makes it, ended at the end."""
    clock = StepClock()
    environment = read_environment(None, device, usable_cores() if device.kind == "cpu" else None)
    executor = SubprocessExecutor(environment, watch=watcher(device), progress=clock)
    try:
        yield executor, clock
    finally:
        executor.close()


def sample_of(way: str, number: int, executor: SubprocessExecutor, clock: StepClock, request: ProbeRequest) -> Sample:
    """One probe. Raises `ProbeFailed`."""
    began = time.monotonic()
    report = executor.probe(request, fresh=way == FRESH)
    check_report(report)
    return Sample(
        way=way,
        round=number,
        first_step_s=clock.step_done - began,
        wall_time_s=report.wall_time_s,
        overhead_s=report.startup_s,
        phases_s=report.phases_s,
    )


def check_report(report: ProbeReport) -> None:
    if report.failure is None and report.optimizer_times_s:
        return
    failure = report.failure
    said = (
        f"{failure.phase}: {failure.exception}: {failure.message.splitlines()[:1]}" if failure else "no training step"
    )
    raise ProbeFailed(f"a probe took no step ({said}): choose a smaller model or sequence length")


def make_weights(request: ProbeRequest, device: Device, folder: Path) -> None:
    """The model of `request` as a checkpoint of random 16-bit weights in `folder`."""
    (folder / "config.json").write_text(json.dumps(request.model.config), encoding="utf-8")
    run_user_script(["make", str(folder), request.config.compute_dtype], device)


def load_weights(request: ProbeRequest, device: Device, folder: Path, number: int) -> Sample:
    """One training step in a new process that loads `folder`. Raises `ProbeFailed`."""
    settings = {**to_json(request.config), "device": "cpu" if device.kind == "cpu" else "cuda:0"}
    began = time.monotonic()
    said = run_user_script(["train", str(folder), json.dumps(settings)], device)
    wall = time.monotonic() - began
    times = json.loads(said.splitlines()[-1])
    training = {"forward_backward": sum(times["micro_batch_times_s"]), "optimizer": times["optimizer_time_s"]}
    return Sample(
        way=LOAD,
        round=number,
        first_step_s=times["step_done"] - began,
        wall_time_s=wall,
        overhead_s=wall - sum(training.values()),
        phases_s=training,
    )


def run_user_script(arguments: Sequence[str], device: Device) -> str:
    """Its stdout. Raises `ProbeFailed` with the last line of what it said on stderr."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "" if device.kind == "cpu" else device.uuid or str(device.index),
    }
    environment.setdefault("GOMP_SPINCOUNT", "3000")  # as probe workers have it
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_USER_SCRIPT), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            timeout=LOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeFailed(f"loading 16-bit weights took over {LOAD_TIMEOUT_S:.0f} s: choose a smaller model") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no last words"])[-1]
        raise ProbeFailed(f"loading 16-bit weights: {last}", worker_exit_code=done.returncode, stderr_tail=done.stderr)
    return done.stdout


def summary(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """By way: median, least and most of the seconds to the first step and of the overhead, and ratios to warm."""
    return {
        way: {
            "samples": sum(sample.way == way for sample in samples),
            "first_step_s": spread(samples, way, lambda sample: sample.first_step_s),
            "overhead_s": spread(samples, way, lambda sample: sample.overhead_s),
            "first_step_to_warm": ratio_to_warm(samples, way, lambda sample: sample.first_step_s),
            "overhead_to_warm": ratio_to_warm(samples, way, lambda sample: sample.overhead_s),
        }
        for way in WORDS
    }


def spread(samples: Sequence[Sample], way: str, of: Callable[[Sample], float]) -> dict[str, float]:
    values = [of(sample) for sample in samples if sample.way == way]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio_to_warm(samples: Sequence[Sample], way: str, of: Callable[[Sample], float]) -> float:
    """Median of this way ÷ median of a later warm probe."""
    return spread(samples, way, of)["median"] / spread(samples, WARM, of)["median"]


def bars_of(samples: Sequence[Sample], device: Device) -> list[Bar]:
    found = summary(samples)
    bars = [
        Bar(
            name="cost of a fresh probe ÷ of a warm one",
            value=found[FRESH]["overhead_to_warm"],
            bound=MIN_FRESH_TO_WARM,
            at_most=False,
        )
    ]
    if device.kind == "cpu":
        warm = found[WARM]["overhead_s"]["median"]
        bars.insert(0, Bar(name="cost of a warm probe, s", value=warm, bound=MAX_WARM_OVERHEAD_S, at_most=True))
    return bars


def report(samples: Sequence[Sample], bars: Sequence[Bar]) -> str:
    """A table of medians (least–most), and one line a bar."""
    rows = [("way", "first step done, s", "÷ warm", "cost beyond training, s", "÷ warm")]
    for way, facts in summary(samples).items():
        rows.append(
            (
                WORDS[way],
                _shown(facts["first_step_s"]),
                f"{facts['first_step_to_warm']:.1f}",
                _shown(facts["overhead_s"]),
                f"{facts['overhead_to_warm']:.1f}",
            )
        )
    return "\n".join([plain_table(rows), "", *(_line(bar) for bar in bars)])


def _shown(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f}–{values['max']:.2f})"


def _line(bar: Bar) -> str:
    sign = "≤" if bar.at_most else "≥"
    return f"{'pass' if bar.held else 'FAIL'}  {bar.name}: {bar.value:.2f} (bar: {sign} {bar.bound:g})"


def say(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    command()
