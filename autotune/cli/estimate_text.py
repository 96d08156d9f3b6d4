"""An estimate for people: the parts as bars, what eats most, the frontier as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from autotune.cli.words import describe
from autotune.hardware.sizes import format_bytes
from autotune.predict.forecast import Forecast, Target

_WIDTH = 40  # characters of the longest bar
#: Part → the setting that makes it smaller.
_REMEDIES = {
    "logits and loss": "loss: chunked, or a smaller micro batch",
    "layer activations": "gradient_checkpointing: full, or a smaller micro batch",
    "checkpointed activations": "gradient_checkpointing: offload, or a smaller micro batch",
    "attention": "attention: sdpa or flash_attention_2, or a shorter sequence",
    "base weights": "upcast: none, or a smaller model",
    "quantisation state": "double_quant: true",
    "optimizer state": "an 8-bit optimizer, or a lower lora_rank",
    "gradients": "a lower lora_rank, or fewer target_modules",
    "casts": "upcast: none",
}


def print_estimate(model: str, target: Target, found: Forecast) -> None:
    """To stdout."""
    console = Console(highlight=False)
    memory = found.memory

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    line(f"Predicted, nothing was run: {model} on {target.name}")
    line(f"  {describe(found.config)}, {found.config.quantization.value}, {found.config.optimizer}")
    low, high = found.intervals["device_used_bytes"]
    verdict = {True: "fits in", False: "does NOT fit in", None: "of unknown memory"}[found.fits]
    capacity = f" {verdict} {format_bytes(target.capacity_bytes)}" if target.capacity_bytes else ""
    line(f"  memory in use  {format_bytes(found.device_used_bytes)}{capacity}"
         f" (from {format_bytes(int(low))} to {format_bytes(int(high))})")  # fmt: skip
    line(
        f"  allocated {format_bytes(memory.peak_allocated_bytes)}, reserved"
        f" {format_bytes(memory.peak_reserved_bytes)}, after loading {format_bytes(memory.after_load_bytes)}"
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
    eaters = [part for part, _ in parts if part in _REMEDIES][:2]
    for part in eaters:
        line(f"  Less {part}: {_REMEDIES[part]}.")


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
    Console().print(table)
