"""An estimate for people: the parts as bars, what eats most, the frontier as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from autotune.cli.words import describe
from autotune.hardware.sizes import format_bytes
from autotune.predict.forecast import Forecast, Target
from autotune.values import Attention, LossPath, TrainingConfig, Upcast

_WIDTH = 40  # characters of the longest bar


def remedies(part: str, config: TrainingConfig) -> list[str]:
    """The settings that would make a part smaller than it is with this config; empty where none would."""
    smaller_batch = [] if config.micro_batch_size == 1 else ["a smaller micro batch"]
    shorter = smaller_batch or ["a shorter sequence"]
    no_copies = [] if config.upcast is Upcast.NONE else ["upcast: none"]
    mode = config.gradient_checkpointing
    ways = {
        "logits and loss": (["loss: chunked"] if config.loss is LossPath.FULL else []) + shorter,
        "layer activations": (["gradient_checkpointing: full"] if mode not in ("full", "offload") else []) + shorter,
        "checkpointed activations": (["gradient_checkpointing: offload"] if mode != "offload" else []) + shorter,
        "attention": (["attention: sdpa"] if config.attention is Attention.EAGER else []) + shorter,
        "base weights": [*no_copies, "a smaller model"],
        "quantisation state": [] if config.double_quant else ["double_quant: true"],
        "optimizer state": ["an 8-bit optimizer", "a lower lora_rank"],
        "gradients": ["a lower lora_rank", "fewer target_modules"],
        "casts": no_copies + shorter,
    }
    return ways.get(part, [])


def plain_console() -> Console:
    """Text as it is: the name of a model is a path, which may hold what rich takes for markup or an emoji."""
    return Console(highlight=False, markup=False, emoji=False)


def print_estimate(model: str, target: Target, found: Forecast) -> None:
    """To stdout."""
    console = plain_console()
    memory = found.memory

    def line(text: str) -> None:
        console.print(text, soft_wrap=True)

    line(f"Predicted, nothing was run: {model} on {target.name}")
    words = [describe(found.config), found.config.quantization.value]
    if found.config.optimizer not in words[0]:  # there where it is not the usual one
        words.append(found.config.optimizer)
    line(f"  {', '.join(words)}")
    low, high = found.intervals["device_used_bytes"]
    verdict = {True: "fits in", False: "does NOT fit in", None: "of unknown memory"}[found.fits]
    capacity = f" {verdict} {format_bytes(target.capacity_bytes)}" if target.capacity_bytes else ""
    line(f"  memory in use  {format_bytes(found.device_used_bytes)}{capacity}"
         f" (from {format_bytes(int(low))} to {format_bytes(int(high))})")  # fmt: skip
    if target.others_bytes:
        line(f"  of which other programs hold {format_bytes(target.others_bytes)}")
    line(
        f"  allocated {format_bytes(memory.peak_allocated_bytes)}, reserved"
        f" {format_bytes(memory.peak_reserved_bytes)}; after loading {format_bytes(memory.after_load_bytes)},"
        f" in an evaluation {format_bytes(memory.evaluation_peak_allocated_bytes)},"
        f" writing a checkpoint {format_bytes(memory.checkpoint_peak_allocated_bytes)}"
    )
    if found.step_time_s is not None and found.tokens_per_second is not None:
        slow, fast = found.intervals["tokens_per_second"]
        line(
            f"  speed {found.tokens_per_second:,.0f} tokens/s (from {slow:,.0f} to {fast:,.0f}),"
            f" {found.step_time_s:.2f} s a step of {found.config.tokens_per_step:,} tokens"
        )
    line("At the worst moment:")
    parts = sorted(memory.parts.items(), key=lambda item: -item[1])
    largest = parts[0][1]
    for part, size in parts:
        bar = "█" * max(1, round(_WIDTH * size / largest))
        line(f"  {part:<25}{format_bytes(size):>10}  {bar}")
    if memory.unquantized_bytes:
        line(
            f"  {format_bytes(memory.unquantized_bytes)} of experts were not quantised: bitsandbytes takes linear"
            " layers, and the installed transformers keeps experts as one tensor."
        )
    helped = [(part, ways) for part, _ in parts if (ways := remedies(part, found.config))]
    for part, ways in helped[:2]:
        line(f"  Less {part}: {', or '.join(ways)}.")


def print_sweep(model: str, target: Target, rows: Sequence[Forecast]) -> None:
    """The frontier as a table, to stdout."""
    table = Table(title=f"Predicted: {model} on {target.name}")
    for name in ("tokens", "config", "memory in use", "fits", "tokens/s"):
        table.add_column(name, justify="left" if name == "config" else "right")
    for row in rows:
        speed = f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "unknown"
        fits = {True: "yes", False: "no", None: "unknown"}[row.fits]
        table.add_row(
            f"{row.config.sequence_length:,}",
            describe(row.config).partition(", ")[2],
            format_bytes(row.device_used_bytes),
            fits,
            speed,
        )
    plain_console().print(table)
