"""`autotune daemon`: a queue of supervised runs on this machine's GPUs."""

from __future__ import annotations

import json
from typing import Any

import click

from autotune.cli.parameters import Text, Whole
from autotune.cli.run_options import run_options, this_folder

TEXT = Text()
_SHARE = click.option(
    "--share", type=Whole(1, 64), default=1, show_default=True, help="Jobs at once on one GPU; they share its memory."
)
_ID = click.argument("job_id", metavar="ID", type=Whole(1, 2**63 - 1))


@click.group()
def command() -> None:
    """Keep a queue of supervised runs: one at a time on each GPU, resumed after out-of-memory, a crash or a reboot.

    Jobs are rows of $AUTOTUNE_HOME/jobs.db. Each has a supervisor process of its own, which goes on while the daemon
    is stopped or upgraded.

    \b
    Example:
      autotune daemon start
      autotune daemon submit --name first -- trl sft --config sft.yaml
      autotune daemon status --watch
    """


@command.command()
@click.option("--foreground", is_flag=True, help="Stay here and log to stderr, as a service does.")
@_SHARE
def start(foreground: bool, share: int) -> None:
    """Start the daemon; it goes on where the last one stopped.

    \b
    Example:
      autotune daemon start
      autotune daemon start --foreground --share 2
    """
    from autotune.cli import daemon_process

    if foreground:
        daemon_process.serve_here(share)
    else:
        click.echo(daemon_process.start_detached(share))


@command.command()
@click.option("--jobs", is_flag=True, help="Interrupt running jobs, too; the next daemon resumes them.")
def stop(jobs: bool) -> None:
    """Stop the daemon. Running jobs go on under their own supervisors, unless --jobs is given.

    \b
    Example:
      autotune daemon stop
      autotune daemon stop --jobs
    """
    from autotune.cli import daemon_process

    for line in daemon_process.stop(jobs=jobs):
        click.echo(line)


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, autotune.status/1.")
@click.option("--watch", is_flag=True, help="Show it live, until Ctrl-C.")
@click.option("--all", "everything", is_flag=True, help="List every job, the old ones, too.")
def status(as_json: bool, watch: bool, everything: bool) -> None:
    """Show the jobs, how far they are, their memory and speed, and what they recovered from.

    \b
    Example:
      autotune daemon status
      autotune daemon status --watch
      autotune daemon status --json
    """
    from autotune.cli import daemon_status

    if watch and as_json:
        raise click.UsageError("--watch is for a terminal and --json for a program: give one of them")
    if watch:
        from autotune.cli import daemon_watch

        daemon_watch.watch()
        return
    document = daemon_status.read(everything=everything)
    if as_json:
        click.echo(json.dumps(document, indent=1))
    else:
        click.echo("\n".join(daemon_status.lines(document, everything=everything)))


@command.command(context_settings={"allow_interspersed_args": False}, options_metavar="[OPTIONS] --")
@click.option("--name", type=TEXT, help="What to call it.")
@click.option("--notify", type=TEXT, metavar="URL", help="Tell a service, through apprise, when it ends or recovers.")
@run_options
@click.argument("words", metavar="COMMAND...", nargs=-1, type=click.UNPROCESSED)
def submit(words: tuple[str, ...], **options: Any) -> None:
    """Put one training command into the queue. The options are those of `autotune run`; --gpu all takes every GPU.

    It runs in this folder, with this shell's PATH and the like. Secrets are not kept: give them to the daemon.

    \b
    Example:
      autotune daemon submit -- trl sft --config sft.yaml
      autotune daemon submit --fit --name llama --on-failed "mail -s failed me" -- python train.py
    """
    from autotune.cli import daemon_submit

    job, notes = daemon_submit.submit(click.get_current_context(), words, options, cwd=this_folder())
    for note in notes:
        click.echo(f"Note: {note}", err=True)
    click.echo(f"{job.label[0].upper()}{job.label[1:]} is queued.")


@command.command()
@_ID
def cancel(job_id: int) -> None:
    """Take a job out of the queue, or end it if it runs; its checkpoints stay.

    \b
    Example:
      autotune daemon cancel 3
    """
    from autotune.cli import daemon_process

    click.echo(daemon_process.cancel(job_id))


@command.command()
@_ID
@click.option("--follow", "-f", is_flag=True, help="Go on until the job has ended.")
@click.option("--output", "which", flag_value="output", default=True, help="What the command printed.  [default]")
@click.option("--report", "which", flag_value="report", help="What it died of, and what was done about it.")
@click.option("--supervisor", "which", flag_value="supervisor", help="What its supervisor says.")
def logs(job_id: int, follow: bool, which: str) -> None:
    """Print what a job wrote.

    \b
    Example:
      autotune daemon logs 3 --follow
      autotune daemon logs 3 --report
    """
    from autotune.cli import daemon_logs

    daemon_logs.show(job_id, which, follow=follow)


@command.command()
@click.option("--force", is_flag=True, help="Replace a unit that says something else.")
@click.option("--print", "print_only", is_flag=True, help="Print the unit and write nothing.")
@_SHARE
def install(force: bool, print_only: bool, share: int) -> None:
    """Write a systemd user unit, so that the daemon runs from boot on.

    \b
    Example:
      autotune daemon install
      autotune daemon install --print
    """
    from autotune.cli import daemon_install

    if print_only:
        click.echo(daemon_install.text(share), nl=False)
        return
    for line in daemon_install.install(share, force=force):
        click.echo(line)
