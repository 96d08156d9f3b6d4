"""The command group: each command's module is imported only when it is called."""

from __future__ import annotations

import importlib
import sys

import click

from autotune import __version__
from autotune.errors import AutotuneError

#: command → the module that holds it as `command`, and its line in `autotune --help`
COMMANDS = {
    "fit": "the fastest config that fits, proven by real training steps",
    "export": "a fit in a trainer's own words",
    "classify": "what a log says about why a run died",
    "gpus": "what devices are here",
    "doctor": "what works and what is missing",
}


class LazyGroup(click.Group):
    """Knows its commands by name, and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"autotune.cli.{name}").command
        command.name = name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="autotune")
def group() -> None:
    """Find the fastest QLoRA training config that fits this GPU, before a long run.

    \b
    Example:
      autotune fit --gpu auto --model meta-llama/Llama-3.2-1B --sequence-length 2048
    """


def main() -> None:
    """Run the command line; an `AutotuneError` is one line on stderr and its own exit code."""
    try:
        group(prog_name="autotune", standalone_mode=False)
    except AutotuneError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except BrokenPipeError:  # the reader of our output has gone: no more to say
        sys.stderr.close()
        sys.exit(1)
