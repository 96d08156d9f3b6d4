"""`autotune fit`: the fastest config that fits a device, proven by real training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autotune.cli.parameters import Duration, Number, Text, Whole
from autotune.values import Attention, Isolation, Trainer, Upcast

TEXT = Text()
POSITIVE = Whole(1, 2**31 - 1)
TOKENS = Whole(2, 2**31 - 1)  # of a sample with one token nothing is learned
SAMPLES = Whole(1, 2**20)
FRACTION = Number("a number from 0 to below 1", lambda number: 0 <= number < 1)
TOLERANCE = Number("a number from 0 to 0.5, such as 0.01 or 1%", lambda number: 0 <= number <= 0.5, percent=True)
EPOCHS = Number("a number above 0 and up to a million", lambda number: 0 < number <= 1e6)


@click.command()
@click.option(
    "--gpu",
    type=TEXT,
    default="auto",
    show_default=True,
    help='auto, cuda:N, cpu, a UUID or a name such as "RTX 4090".',
)
@click.option(
    "--model",
    type=TEXT,
    help="A public id, a folder, or a config.json.  [default: Llama-3-8B; on the CPU SmolLM2-135M]",
)
@click.option(
    "--weights",
    type=click.Choice(["random", "real"]),
    default="random",
    show_default=True,
    help="real: load them from the model's folder; memory and speed are the same.",
)
@click.option(
    "--sequence-length", type=TOKENS, help="Tokens of a sample; kept when stated.  [default: 2048; on the CPU 256]"
)
@click.option(
    "--min-sequence-length", type=TOKENS, help="Consent to shorten the sequence, down to here, if nothing fits."
)
@click.option(
    "--effective-batch-size", type=SAMPLES, help="Samples of an optimizer step; always kept.  [default: 16; CPU 8]"
)
@click.option(
    "--memory-limit", type=TEXT, help="Of the whole card, e.g. 12GiB.  [default: all of it; on the CPU 1500MiB]"
)
@click.option("--headroom", type=TEXT, help="Kept free of the limit.  [default: 2 %, at least 256MiB; on the CPU 0]")
@click.option(
    "--trainer",
    type=click.Choice([t.value for t in Trainer]),
    default="transformers",
    show_default=True,
    help="Whose training step is run: its loss and its handling of dtypes.",
)
@click.option(
    "--upcast",
    type=click.Choice([u.value for u in Upcast]),
    help="What is not 4-bit becomes float32, or only norms do.  [default: the trainer's]",
)
@click.option(
    "--compute-dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of matrix products and unquantised weights.  [default: bfloat16; float16 on GPUs before Ampere]",
)
@click.option("--optimizer", type=TEXT, default="adamw_torch_fused", show_default=True, help="By transformers' name.")
@click.option("--attention", type=click.Choice([a.value for a in Attention]), default="sdpa", show_default=True)
@click.option("--lora-rank", type=POSITIVE, default=16, show_default=True)
@click.option("--lora-alpha", type=POSITIVE, default=16, show_default=True)
@click.option("--lora-dropout", type=FRACTION, default=0.0, show_default=True)
@click.option(
    "--target-modules", type=TEXT, default="all-linear", show_default=True, help="all-linear, or names with commas."
)
@click.option("--allow", type=click.Choice(["near"]), help="near: moves that change the mathematics a little, too.")
@click.option("--min-lora-rank", type=POSITIVE, help="Consent to a lower rank, down to here, if nothing fits.")
@click.option("--allow-fewer-modules", is_flag=True, help="Consent to adapters on attention only, if nothing fits.")
@click.option(
    "--dataset",
    type=click.Path(path_type=Path),
    help="Prove memory at its longest batch, measure speed at its own lengths, say the hours that training takes.",
)
@click.option(
    "--tokenizer", type=TEXT, help="Of --dataset's text: a folder or a cached id.  [default: a guess by bytes]"
)
@click.option(
    "--epochs",
    type=EPOCHS,
    default=1.0,
    show_default=True,
    help="For the hours of --dataset.",
)
@click.option(
    "--isolation",
    type=click.Choice([i.value for i in Isolation]),
    default="warm",
    show_default=True,
    help="fresh: a new process for each probe. The winner is always proven in one.",
)
@click.option("--python", type=TEXT, help="Interpreter of your trainer's environment.  [default: autotune's own]")
@click.option("--fix", type=TEXT, multiple=True, help="Try one value of a setting alone: attention=sdpa. Repeatable.")
@click.option("--exclude", type=TEXT, multiple=True, help="Never try this: loss=liger. Repeatable.")
@click.option("--space", type=click.Path(path_type=Path), help="A YAML file of both, or of fields with their values.")
@click.option(
    "--tolerance",
    type=TOLERANCE,
    default=0.01,
    show_default=True,
    help="Stop where no probe is expected to gain more of speed; 1% is 0.01.",
)
@click.option("--budget", type=Duration(), help="Stop searching in time to prove within this: 90s, 5min.")
@click.option("--max-probes", type=POSITIVE, help="Stop searching after so many.  [default: 24; on the CPU 10]")
@click.option("--fresh", is_flag=True, help="Measure again, whatever the database holds.")
@click.option("--no-prediction", is_flag=True, help="Predict nothing: probe configs that a prediction would skip.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: bytes, seconds, unknown is null.")
@click.option("--output", type=click.Path(path_type=Path), help="Write config, measurement and provenance as YAML.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw speed and memory at each sequence length, as SVG.")
@click.option(
    "--optuna",
    "study_file",
    type=click.Path(path_type=Path),
    help="Write all trials as an Optuna study, named as the file without its ending, into this SQLite file.",
)
@click.option("--force", is_flag=True, help="Let --output, --plot and --optuna overwrite.")
def command(**options: Any) -> None:
    """Find the fastest config that fits, by short real QLoRA runs, and prove it in a fresh process.

    Effective batch size, sequence length (when stated) and optimizer mathematics stay as asked. What is measured goes
    into a database per GPU model: the same request again is answered from it at once.

    \b
    Example:
      autotune fit --gpu auto
      autotune fit --model Qwen/Qwen2.5-7B --sequence-length 4096 --memory-limit 12GiB --output fit.yaml
      autotune fit --dataset train.jsonl --fix attention=sdpa --exclude loss=liger --budget 10min
    """
    from autotune.cli import fit_run

    fit_run.run(options)
