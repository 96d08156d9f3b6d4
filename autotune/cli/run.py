"""`autotune run`: one training command, supervised, resumed with a config that fits after out-of-memory."""

from __future__ import annotations

from typing import Any

import click

from autotune.cli.parameters import File
from autotune.cli.run_options import run_options


@click.command(
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS] --",
)
@run_options
@click.option("--resume", is_flag=True, help="Go on with the newest run of this command that was interrupted here.")
@click.option("--run-folder", type=File(), help="Where logs and plans go.  [default: a new one]")
@click.option("--dry-run", "-n", is_flag=True, help="Say what would run now and after an out-of-memory; run nothing.")
@click.option("--job", type=int, hidden=True, help="Of the daemon: run this job of its queue.")
@click.argument("words", metavar="COMMAND...", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(context: click.Context, /, words: tuple[str, ...], **options: Any) -> None:
    """Run one training command; when it runs out of memory, resume it with a config that fits.

    The effective batch size, the order of the samples and the learning rates stay the same. The exit code is the
    command's own; 125, 126 and 127 are autotune's, as a shell has them.

    \b
    Example:
      autotune run -- trl sft --config sft.yaml
      autotune run --plan fit.yaml --memory-limit 12GiB -- python train.py --output_dir out
      autotune run --dry-run -- accelerate launch train.py --per_device_train_batch_size 8
    """
    from autotune.cli.run_job import main

    context.exit(main(words, options))
