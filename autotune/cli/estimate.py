"""`autotune estimate`: memory and speed of a config on a card that need not be here, predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autotune.cli.parameters import Text, Whole

_PATH = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option(
    "--gpu", type=Text(), help='The card: a name such as "3060" or "A100 80GB", or cpu. Default: the GPU here.'
)
@click.option("--model", type=Text(), help="An id, a folder or a config.json; without --config.")
@click.option("--sequence-length", type=Whole(1, 10_000_000), help="Tokens of one sample. Default: 2048.")
@click.option("--effective-batch-size", type=Whole(1, 65_536), help="Samples of one optimizer step. Default: 16.")
@click.option(
    "--config", "config_file", type=_PATH, help="Predict this one config (YAML or JSON) instead of searching."
)
@click.option("--memory-limit", type=Text(), help="Whole memory to predict for, such as 12GiB. Default: the card's.")
@click.option(
    "--in-use",
    type=Text(),
    help="Memory that other programs hold: 800MiB of a desktop, or 0. Default: what they hold now of a GPU here.",
)
@click.option(
    "--trainer",
    type=click.Choice(["transformers", "trl", "loop"]),
    help="Whose training step; without --config. Default: transformers.",
)
@click.option(
    "--attention",
    type=click.Choice(["eager", "sdpa", "flash_attention_2"]),
    help="Attention implementation. Default: sdpa, where the model has it.",
)
@click.option(
    "--sweep", type=Text(), help="The frontier over a setting: sequence_length=512..8192 doubles; or =512,768."
)
@click.option("--plot", type=_PATH, help="Write memory over one step by part (with --sweep: the frontier) as SVG.")
@click.option("--history", type=_PATH, help="Write the allocations for pytorch.org/memory_viz (a pickle).")
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: bytes, seconds, unknown is null.")
def command(**options: Any) -> None:
    """Predict memory and speed on a card that need not be here. Nothing is run on a GPU, nothing downloaded.

    Gives the fastest config predicted to fit (exit code 3 where none is), or what one given config takes: whether it
    fits is then the answer, and the exit code is 0 either way.

    \b
    Example:
      autotune estimate --gpu 3060 --model meta-llama/Llama-3.2-1B --sequence-length 2048
      autotune estimate --gpu "A100 80GB" --config config.yaml --json
    """
    from autotune.cli.estimate_run import run

    run(options)
