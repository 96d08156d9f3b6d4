"""A fit's result for a terminal: the trials, the config, its headroom, what lies beyond, the hours it would take."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from autotune.cli.fit_dataset import mix_words
from autotune.cli.words import WORDS, mib, settings
from autotune.dataset import DatasetFacts, training_hours
from autotune.mix import samples_per_step
from autotune.recommendation import headroom_bytes, outlook, peak_bytes
from autotune.values import Move, Recommendation, TrainingConfig, TrialRecord

WIDTH = 110  # columns, where stdout is a file or a pipe

_SHOWN = (
    "sequence_length",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "attention",
    "loss",
    "upcast",
    "optimizer",
    "quantization",
    "double_quant",
    "compute_dtype",
    "lora_rank",
    "lora_alpha",
    "target_modules",
    "adapter_dtype",
    "allocator",
    "trainer",
)


def time_of_training(result: Recommendation, dataset: DatasetFacts | None, epochs: float) -> dict[str, Any] | None:
    """What `--dataset` with `--epochs` would take with the proven config: at its lengths, or all of full length."""
    if dataset is None or result.proof is None:
        return None
    config = result.proof.config
    step_time_s = result.proof.report.step_time_s(config.gradient_accumulation_steps)
    if step_time_s is None:
        return None
    mix = result.request.lengths
    batch = samples_per_step(config, mix) if mix else config.effective_batch_size
    steps, hours = training_hours(dataset.samples, epochs, batch, step_time_s)
    return {"samples": dataset.samples, "epochs": epochs, "optimizer_steps": steps, "hours": hours}


def print_fit(result: Recommendation, training: dict[str, Any] | None) -> None:
    """To stdout."""
    # No markup: names of modules and devices are anybody's text.
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=WIDTH)
    if result.from_database:
        console.print("Known: answered from the database, nothing was run. --fresh measures again.")
    if result.trials:
        console.print(_trials(result))
    if result.proof is not None:
        console.print(_config(result.proof.config, result.moves))
    if len(result.frontier) > 1:
        console.print(_frontier(result))
    if result.proof is None:
        return
    for line in _lines(result, result.proof, training):
        console.print(line, soft_wrap=True)


def _trials(result: Recommendation) -> Table:
    several = len({trial.config.sequence_length for trial in result.trials}) > 1
    table = Table(title="Trials", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in (
        "",
        *(["tokens"] if several else []),
        "batch",
        "checkpoints",
        "settings",
        "verdict",
        "tokens/s",
        "peak",
    ):
        right = name in ("tokens", "tokens/s", "peak")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "settings")
    for trial in result.trials:
        config, speed = trial.config, trial.tokens_per_second
        proven = result.proof is not None and trial == result.proof
        table.add_row(
            "➜" if proven else "",
            *([str(config.sequence_length)] if several else []),
            f"{config.micro_batch_size} × {config.gradient_accumulation_steps}",
            config.gradient_checkpointing,
            settings(config),
            WORDS[trial.judgement.verdict] + (", proven" if proven else ""),
            f"{speed:,.0f}" if speed else "",
            mib(peak_bytes(trial.report)),
        )
    return table


def _frontier(result: Recommendation) -> Table:
    table = Table(title="Fastest at each length", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "tokens", "batch", "checkpoints", "settings", "tokens/s", "memory", "how known"):
        right = name in ("tokens", "tokens/s", "memory")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "settings")
    for row in result.frontier:
        config, speed = row.config, row.tokens_per_second
        proven = result.proof is not None and config == result.proof.config and row.origin == "measured"
        table.add_row(
            "➜" if proven else "",
            f"{row.sequence_length:,}",
            f"{config.micro_batch_size} × {config.gradient_accumulation_steps}",
            config.gradient_checkpointing,
            settings(config),
            f"{speed:,.0f}" if speed else "",
            mib(row.memory_bytes),
            row.origin if row.fits else f"{row.origin} not to fit",
        )
    return table


def _config(config: TrainingConfig, moves: tuple[Move, ...]) -> Table:
    changed = {next(iter(move.changed)): move for move in moves}
    table = Table(title="Config", title_justify="left", show_header=False, box=None, pad_edge=False)
    for name in _SHOWN:
        value = getattr(config, name)
        text = ", ".join(value) if isinstance(value, tuple) else str(value)
        table.add_row(name, text, _move(changed[name], name) if name in changed else "")
    return table


def _move(move: Move, name: str) -> str:
    """The move that set a field: what it was, and what the move saved and cost where that was measured."""
    parts = [f"{move.name} ({move.preserves}), was {move.changed[name][0]}"]
    if move.saved_bytes is not None:
        parts.append(f"saved {mib(move.saved_bytes)}")
    if move.speed_ratio is not None:
        parts.append(f"speed × {move.speed_ratio:.2f}")
    return ", ".join(parts)


def _duration(hours: float) -> str:
    """ "3 hours and 12 minutes"."""
    import humanize

    minimum = "minutes" if hours >= 0.1 else "seconds"
    text: str = humanize.precisedelta(timedelta(hours=hours), minimum_unit=minimum, format="%0.0f")
    return text


def _lines(result: Recommendation, proof: TrialRecord, training: dict[str, Any] | None) -> list[str]:
    start, config, report = result.request.start, proof.config, proof.report
    speed = f"{proof.tokens_per_second:,.0f}" if proof.tokens_per_second else "?"
    step = report.step_time_s(config.gradient_accumulation_steps)
    mix = result.request.lengths
    counted = "padding counted" if proof.counts_padding else "padding NOT counted, at the dataset's own lengths"
    lines = [
        f"Proven in a fresh process on {result.device.name}{' (a rehearsal: no GPU)' if result.rehearsal else ''}:"
        f" {speed} tokens/s, {counted}; {step:.2f} s an optimizer step.",
        f"Memory: peak {mib(peak_bytes(report))} of {mib(report.limit_bytes)} allowed,"
        f" {mib(headroom_bytes(result))} left; live tensors {mib(report.peak_allocated_bytes)}.",
    ]
    if mix:
        lines.append(f"Dataset: {mix_words(mix)}.")
    if mix and config.packing:
        lines.append(
            f"Packed: about {samples_per_step(config, mix):.3g} samples an optimizer step,"
            f" {start.effective_batch_size} were asked for."
        )
    if config.sequence_length < start.sequence_length:
        allowed = "--min-sequence-length allowed it" if result.request.min_sequence_length else "none was stated"
        lines.append(
            f"ATTENTION: the sequence was CUT from {start.sequence_length} to {config.sequence_length} tokens"
            f" ({allowed}): longer samples would be truncated."
        )
    if report.unquantized_bytes:
        lines.append(f"Not quantised: {mib(report.unquantized_bytes)} of expert weights stay 16-bit (3-D parameters).")
    beyond = outlook(result, result.request.model.max_positions)
    if beyond:
        lines += [f"Next faster: {beyond.faster}.", f"Longer: {beyond.longer}."]
    if training:
        lengths = "full length" if proof.counts_padding else "the dataset's lengths"
        lines.append(
            f"Training: {training['samples']:,} samples × {training['epochs']:g} epochs ="
            f" {training['optimizer_steps']:,} optimizer steps, about {_duration(training['hours'])}"
            f" at {lengths}."
        )
    lines += [f"Note: {note}." for note in result.notes]
    lines.append(f"Probes: {result.probes}, out of memory {result.out_of_memory}, {result.wall_time_s:.0f} s in all.")
    return lines
