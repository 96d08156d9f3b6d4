"""Predicted memory beside what others measured and published: row by row, by source, with bars.

`python -m benchmarks.memory_accuracy --output benchmarks/results`
"""

from __future__ import annotations

import csv
import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from autotune.errors import AutotuneError
from autotune.hardware.cards import find_card
from autotune.predict.forecast import Forecast, Target, forecast, target_of_card
from autotune.predict.store import TraceStore, library_versions
from autotune.predict.trace import Trace
from autotune.values import GIB, MIB, Attention, ModelSource, Quantization, Trainer, TrainingConfig, Upcast, to_json
from autotune.workload.models import resolve_model
from benchmarks.records import one_line_errors, plain_table, write_record

SCHEMA = "autotune.memory_accuracy/1"
PUBLISHED = Path(__file__).parent / "data" / "published-measurements.csv"

#: |error| in %: (mean, worst), over the rows of one source that have a bar.
BARS = {"allocated": (0.4, 2.0), "process": (3.0, 9.0)}

T4 = "Tesla T4"  # its 14,912 MiB and 140.875 MiB of context in the catalogue are those of the rows' notes
A100 = "A100 80GB"

MEASURES = ("after_load", "forward", "allocated", "reserved", "process")
_TARGETS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_NOTE_GIB = {
    "after_load": "after_load",
    "forward": "fwd_peak",
    "reserved": "reserved",
    "process": "process(reserved+ctx)",
}

_OLD_LOSS = (
    "transformers 4.48's loss copied the shifted float32 logits; the installed one shifts the labels:"
    " fewer bytes a logit, so no bar"
)
_MOE = "experts are 3-D parameters in the installed transformers, which bitsandbytes leaves in 16 bits: no bar"
_FMS_UPCAST = {"none": Upcast.NONE, "baseline-peft-bnb": Upcast.FP32, "accelerated-peft-bnb": Upcast.NONE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A published row that can be predicted. Measured values in bytes, as exact as the source printed them."""

    source: str
    label: str
    model: str  # a catalogue id
    config: TrainingConfig
    card: str  # as `--gpu` takes it
    measured: dict[str, float]
    no_bar: str | None = None  # why its errors count for no bar
    fitcheck: dict[str, float] = field(default_factory=dict)  # FitCheck's own error in %, of allocated and process


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A published row that cannot, and why."""

    source: str
    label: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case predicted. `errors`: (predicted - published) / published in %, by measure."""

    case: Case
    predicted: dict[str, float]  # bytes
    errors: dict[str, float]
    accelerate: float | None = None  # the error of accelerate's training figure against allocated, in %


# Rows


def read_published(path: Path) -> list[dict[str, str]]:
    """The rows graded [A]. Raises `click.ClickException` for a file that is not such a table."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [row for row in rows if grade(row["notes"]) == "A"]
    except (OSError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise click.ClickException(f"{path} is no table of published measurements: {error}") from error


def grade(notes: str) -> str | None:
    """A, B or C, from the start of the notes."""
    found = re.match(r"\[([ABC])\]", notes)
    return found[1] if found else None


def case_of(row: dict[str, str]) -> Case | LeftOut:
    """The row's settings as a config, or why they are not one."""
    source = row["source_url_or_repo_path"]
    if "fitcheck-llm" in source:
        return _t4_case(row)
    if "fms-acceleration" in source:
        return _fms_case(row)
    reason = "another code base's model"
    if "litgpt" in source:
        reason = "litgpt runs its own model code, chunked loss and bfloat16 adapters: not the installed software"
    return LeftOut(source=source, label=_label(row), reason=reason)


def _label(row: dict[str, str]) -> str:
    named = re.search(r"config=([^;]+);", row["notes"])
    parts = [row["gpu"], row["model"].split("/")[-1], named[1] if named and named[1] != "none" else row["quant"]]
    return " ".join([*parts, f"T={row['seq_len']}", f"B={row['micro_batch']}", row["attention"].split(" ")[0]])


def _t4_case(row: dict[str, str]) -> Case | LeftOut:
    """FitCheck's own script on a T4: a plain loop in float16, no autocast, k-bit preparation where NF4."""
    nf4, rank = row["quant"] == "bnb-nf4", int(row["lora_rank"])
    notes = row["notes"]
    measured = {key: value for key, name in _NOTE_GIB.items() if (value := note_gib(notes, name)) is not None}
    peak = float(row["peak_mem_gib"]) * GIB
    fitcheck = fitcheck_errors(notes)
    if "peak=process level" in notes:
        measured["process"] = peak
        told = re.search(r"FitCheck predicted ([\d,]+) MiB", notes)
        if told:
            fitcheck = {"process": error_percent(float(told[1].replace(",", "")) * MIB, peak)}
    else:
        measured["allocated"] = peak
    return Case(
        source="FitCheck's T4 measurements (pypi fitcheck-llm 0.3.1)",
        label=_label(row),
        model=row["model"],
        card=T4,
        config=TrainingConfig(
            sequence_length=int(row["seq_len"]),
            micro_batch_size=int(row["micro_batch"]),
            gradient_accumulation_steps=int(row["grad_accum"]),
            gradient_checkpointing="full" if row["grad_checkpointing"] == "yes" else "off",
            attention=Attention.SDPA if row["attention"].startswith("sdpa") else Attention.EAGER,
            optimizer="adamw_torch",
            quantization=Quantization.NF4 if nf4 else Quantization.NONE,
            double_quant=False,
            compute_dtype="float16",
            autocast=False,
            upcast=Upcast.FP32 if nf4 else Upcast.NONE,
            lora_rank=rank,
            lora_alpha=2 * rank,
            target_modules=targets(row["target_modules"]),
            trainer=Trainer.LOOP,
        ),
        measured=measured,
        fitcheck=fitcheck,
    )


def _fms_case(row: dict[str, str]) -> Case | LeftOut:
    """fms-acceleration's A100 benchmarks: transformers' Trainer under bfloat16 autocast, packed, FlashAttention 2."""
    source = "fms-acceleration's A100-80GB benchmarks"
    named = re.search(r"config=([^;]+);", row["notes"])
    setup = named[1] if named else ""
    reason = None
    if not row["gpu"].startswith("1x "):
        reason = "several GPUs under FSDP: a shard of the model each"
    elif "gptq" in setup or row["quant"].startswith("gptq"):
        reason = "GPTQ base weights"
    elif setup not in _FMS_UPCAST:
        reason = f"{setup or 'an unnamed setup'}: fused kernels of that project"
    elif row["oom"] == "yes" or not row["peak_mem_gib"]:
        reason = "out of memory: no number"
    if reason:
        return LeftOut(source=source, label=_label(row), reason=reason)
    return Case(
        source=source,
        label=_label(row),
        model=row["model"],
        card=A100,
        config=TrainingConfig(
            sequence_length=int(row["seq_len"]),
            micro_batch_size=int(row["micro_batch"]),
            gradient_accumulation_steps=int(row["grad_accum"]),
            gradient_checkpointing="full" if row["grad_checkpointing"] == "yes" else "off",
            attention=Attention.FLASH_ATTENTION_2,
            optimizer="adamw_torch",
            quantization=Quantization.NONE if row["quant"] == "none" else Quantization.NF4,
            upcast=_FMS_UPCAST[setup],
            lora_rank=int(row["lora_rank"]),
            lora_alpha=16,
            lora_dropout=0.1,
            target_modules=targets(row["target_modules"]),
        ),
        measured={"allocated": float(row["peak_mem_gib"]) * GIB},
        no_bar=_MOE if "Mixtral" in row["model"] else _OLD_LOSS,
    )


def targets(text: str) -> tuple[str, ...]:
    """ "q,k,v,o" as module names. Raises KeyError for another letter."""
    return tuple(_TARGETS[letter] for letter in text.split(","))


def note_gib(notes: str, name: str) -> float | None:
    """Bytes of "name=1.234" in the notes, which say GiB; None where they do not."""
    found = re.search(rf"(?<!\w){re.escape(name)}=([\d.]*\d)", notes)
    return float(found[1]) * GIB if found else None


def fitcheck_errors(notes: str) -> dict[str, float]:
    """FitCheck's own errors in %, of its tensors (allocated) and of the process."""
    found = re.search(r"FitCheck error% tensors=(-?[\d.]*\d) process=(-?[\d.]*\d)", notes)
    return {"allocated": float(found[1]), "process": float(found[2])} if found else {}


# Errors


def error_percent(predicted: float, published: float) -> float:
    return (predicted / published - 1) * 100


def compare(case: Case, found: Forecast, accelerate_bytes: float | None = None) -> Result:
    """A prediction beside what was published of it."""
    memory = found.memory
    predicted: dict[str, float] = {
        "after_load": memory.after_load_bytes,
        "forward": memory.forward_peak_allocated_bytes,
        "allocated": memory.peak_allocated_bytes,
        "reserved": memory.peak_reserved_bytes,
        "process": found.device_used_bytes,
    }
    told = case.measured
    allocated = told.get("allocated")
    return Result(
        case=case,
        predicted=predicted,
        errors={key: error_percent(value, told[key]) for key, value in predicted.items() if key in told},
        accelerate=error_percent(accelerate_bytes, allocated) if accelerate_bytes and allocated else None,
    )


def mean_and_worst(errors: Iterable[float]) -> tuple[float, float] | None:
    """Of the absolute errors; None of none."""
    sizes = [abs(error) for error in errors]
    return (statistics.fmean(sizes), max(sizes)) if sizes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One measure of one source against its bar."""

    source: str
    measure: str
    rows: int
    mean: float
    worst: float
    passed: bool


def bars(results: Sequence[Result]) -> list[Bar]:
    """Every source's bars over its rows that have one."""
    found: list[Bar] = []
    for source in _in_order(result.case.source for result in results):
        held = [result for result in results if result.case.source == source and not result.case.no_bar]
        for measure, (mean_limit, worst_limit) in BARS.items():
            errors = [result.errors[measure] for result in held if measure in result.errors]
            summary = mean_and_worst(errors)
            if summary:
                mean, worst = summary
                passed = mean <= mean_limit and worst <= worst_limit
                found.append(
                    Bar(source=source, measure=measure, rows=len(errors), mean=mean, worst=worst, passed=passed)
                )
    return found


def against_fitcheck(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Mean absolute error of ours and FitCheck's by measure, over the rows whose FitCheck error is known."""
    found: dict[str, dict[str, float]] = {}
    for measure in BARS:
        both = [result for result in results if measure in result.errors and measure in result.case.fitcheck]
        if both:
            found[measure] = {
                "rows": len(both),
                "ours": statistics.fmean(abs(result.errors[measure]) for result in both),
                "fitcheck": statistics.fmean(abs(result.case.fitcheck[measure]) for result in both),
            }
    return found


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


# Predicting


def predict(case: Case, store: TraceStore) -> Forecast:
    """As `autotune estimate --config` does, from a trace in the store or a new one."""
    return forecast(trace_of(case, store), case.config, target_of(case))


def target_of(case: Case) -> Target:
    return target_of_card(find_card(case.card).card)


def trace_of(case: Case, store: TraceStore) -> Trace:
    """The case's trace, from the store or made and kept there."""
    source, kernels = resolve_model(case.model), target_of(case).kernels
    trace = store.find(source, case.config, kernels)
    if trace is None:
        from autotune.predict.tracing import make_trace

        trace = make_trace(source, case.config, kernels)
        store.keep(source, case.config, kernels, trace)
    return trace


def accelerate_bytes(source: ModelSource, dtype: str) -> float:
    """What `accelerate estimate-memory` prints for training: Adam on the whole model, whatever the batch and length.

    Its own functions, fed a meta model of the same config.json: the command itself needs a model hub.
    """
    import torch
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModelForCausalLM

    from autotune.workload.build import hf_config_of

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config_of(source), dtype=torch.float32)
    total, _largest = calculate_maximum_sizes(model)
    return float(max(estimate_training_usage(total, dtype).values()))


# Output


def row_table(results: Sequence[Result]) -> list[list[str]]:
    head = ["row", *(f"{measure} %" for measure in MEASURES), "FitCheck alloc %", "FitCheck proc %", "accelerate %"]
    return [head, *(_cells(result) for result in results)]


def _cells(result: Result) -> list[str]:
    told = result.case.fitcheck
    numbers = [result.errors.get(measure) for measure in MEASURES]
    return [
        result.case.label + (" *" if result.case.no_bar else ""),
        *(_percent(number) for number in [*numbers, told.get("allocated"), told.get("process"), result.accelerate]),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}" if abs(value) < 100 else f"{value:+.0f}"


def bar_lines(held: Sequence[Bar]) -> list[str]:
    return [
        f"{'pass' if bar.passed else 'FAIL'}  {bar.source}: {bar.measure}, {bar.rows} rows: mean {bar.mean:.2f} %"
        f" (bar {BARS[bar.measure][0]:g}), worst {bar.worst:.2f} % (bar {BARS[bar.measure][1]:g})"
        for bar in held
    ]


def fitcheck_lines(found: dict[str, dict[str, float]]) -> list[str]:
    return [
        f"{'pass' if both['ours'] < both['fitcheck'] else 'FAIL'}  {measure}, {both['rows']:.0f} rows, mean |error|:"
        f" ours {both['ours']:.2f} %, FitCheck {both['fitcheck']:.2f} %"
        for measure, both in found.items()
    ]


def left_out_lines(left: Sequence[LeftOut]) -> list[str]:
    counted = Counter((out.source.split("@")[0], out.reason) for out in left)
    return [f"{number} rows: {reason} ({source})" for (source, reason), number in counted.items()]


def reasons_without_bar(results: Sequence[Result]) -> list[str]:
    return _in_order(f"* {result.case.no_bar}" for result in results if result.case.no_bar)


def missed_rows(results: Sequence[Result], held: Sequence[Bar]) -> list[str]:
    """The rows that pull a missed bar: those above its mean."""
    return [
        f"  {bar.measure} {result.errors[bar.measure]:+.2f} %  {result.case.label}"
        for bar in held
        if not bar.passed
        for result in results
        if result.case.source == bar.source
        and not result.case.no_bar
        and abs(result.errors.get(bar.measure, 0.0)) > BARS[bar.measure][0]
    ]


def report(results: Sequence[Result], left: Sequence[LeftOut], *, markdown: bool) -> str:
    """Everything as text, by source."""
    lines: list[str] = []
    for source in _in_order(result.case.source for result in results):
        mine = [result for result in results if result.case.source == source]
        rows = row_table(mine)
        lines += [f"## {source}" if markdown else source, "", _markdown(rows) if markdown else plain_table(rows), ""]
        lines += [*_listed(reasons_without_bar(mine), markdown), ""]
    held = bars(results)
    for title, items in (
        ("Bars", [*bar_lines(held), *missed_rows(results, held)]),
        ("Ours and FitCheck (fitted to that card), on the T4", fitcheck_lines(against_fitcheck(results))),
        ("Left out", left_out_lines(left)),
    ):
        lines += [f"## {title}" if markdown else title, "", *_listed(items, markdown), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _listed(items: Sequence[str], markdown: bool) -> list[str]:
    return [f"- {item.removeprefix('* ').strip()}" for item in items] if markdown else list(items)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def record(results: Sequence[Result], left: Sequence[LeftOut], published: str, now: datetime) -> dict[str, Any]:
    """Everything as JSON: bytes and %."""
    return {
        "schema": SCHEMA,
        "time_utc": now.isoformat(timespec="seconds"),
        "libraries": library_versions(),
        "published": published,
        "rows": [to_json(result) for result in results],
        "bars": [to_json(bar) for bar in bars(results)],
        "against_fitcheck": against_fitcheck(results),
        "left_out": [to_json(out) for out in left],
    }


def write(folder: Path, results: Sequence[Result], left: Sequence[LeftOut], published: str, now: datetime) -> Path:
    """A new pair of files of this day: earlier runs are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"memory_accuracy-{now:%Y-%m-%d}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    path = next(folder / f"{name}.json" for name in names if not (folder / f"{name}.json").exists())
    write_record(path, record(results, left, published, now))
    head = f"# memory_accuracy, {now:%Y-%m-%d}\n\nErrors are (predicted - published) / published. * has no bar.\n\n"
    path.with_suffix(".md").write_text(head + report(results, left, markdown=True), encoding="utf-8")
    return path


@click.command(help=__doc__)
@click.option(
    "--published", type=click.Path(path_type=Path), default=PUBLISHED, help="Table of measurements (CSV); its [A] rows."
)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for JSON and markdown.")
def main(published: Path, output: Path | None) -> None:
    """Exit 1 if a bar is missed."""
    with one_line_errors():
        found = [case_of(row) for row in read_published(published)]
        cases = [case for case in found if isinstance(case, Case)]
        left = [case for case in found if isinstance(case, LeftOut)]
        results, refused = _results(cases)
        left += refused
    click.echo(report(results, left, markdown=False), nl=False)
    if output is not None:
        path = write(output, results, left, published.name, datetime.now(UTC))
        click.echo(f"\nwritten: {path}", err=True)
    ahead = all(both["ours"] < both["fitcheck"] for both in against_fitcheck(results).values())
    sys.exit(0 if ahead and all(bar.passed for bar in bars(results)) else 1)


def _results(cases: Sequence[Case]) -> tuple[list[Result], list[LeftOut]]:
    """Predicts each. A row without a bar that the installed software cannot run is left out."""
    results: list[Result] = []
    refused: list[LeftOut] = []
    others: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = TraceStore(Path(folder))
        for number, case in enumerate(cases, 1):
            click.echo(f"{number}/{len(cases)} {case.label}", err=True)
            try:
                found = predict(case, store)
            except (AutotuneError, RuntimeError, ValueError) as error:
                if not case.no_bar:
                    raise
                why = f"the installed software does not run it: {str(error).splitlines()[0]}"
                refused.append(LeftOut(source=case.source, label=case.label, reason=why))
                continue
            key = (case.model, case.config.compute_dtype)
            if key not in others:
                others[key] = accelerate_bytes(resolve_model(case.model), case.config.compute_dtype)
            results.append(compare(case, found, others[key]))
    return results, refused


if __name__ == "__main__":
    main()
