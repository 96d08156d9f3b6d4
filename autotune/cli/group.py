"""The command group: each command's module is imported only when it is called."""

from __future__ import annotations

import difflib
import importlib
import io
import re
import sys

import click

from autotune import __version__
from autotune.errors import AutotuneError

#: command → the module that holds it as `command`, and its line in `autotune --help`
COMMANDS = {
    "fit": "the fastest config that fits, proven by real training steps",
    "sweep": "measure a whole grid of configs, to replay searches on",
    "estimate": "memory and speed on a card that need not be here, predicted",
    "run": "one training command, resumed with what fits after out-of-memory",
    "daemon": "a queue of supervised runs on this machine's GPUs",
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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
            ctx.fail(f"No such command {name[:40]}: {hint}")
        return super().resolve_command(ctx, args)

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


def run() -> int:
    """Run the command line and give its exit code; whatever is wrong is one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without "×" or "➜" shows "?"
    try:
        code = group(prog_name="autotune", standalone_mode=False)
    except AutotuneError as error:
        _say_error(str(error))
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        said = " ".join(error.format_message().split())
        _say_error(f"{said} (see {context.command_path if context else 'autotune'} --help)")
        return error.exit_code
    except click.Abort:
        click.echo("Interrupted.", err=True)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: no more to say
        sys.stderr.close()
        return 1
    except OSError as error:  # a full disk behind stdout, no file or process to be had: nothing of ours to explain
        what = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        kept = "; what was measured is kept" if sys.argv[1:2] in (["fit"], ["sweep"]) else ""
        _say_error(f"the system refused ({what}): mend that and try again{kept}")
        return 1
    return code if isinstance(code, int) else 0  # of context.exit(code), as doctor has it


def _say_error(message: str) -> None:
    """One line, whatever names and paths hold: a word longer than any path of use is cut, what follows it is not."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    click.echo(f"Error: {_ENDLESS.sub(_cut, shown)}", err=True)


_ENDLESS = re.compile(r"\S{300,}")


def _cut(word: re.Match[str]) -> str:
    return f"{word[0][:200]}…"
