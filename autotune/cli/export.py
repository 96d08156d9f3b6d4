"""`autotune export`: a fit in a trainer's own words."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("fit_file", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["transformers", "trl"]), help="Trainer to write it for.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["yaml", "json", "python"]),
    default="yaml",
    show_default=True,
    help="python: a script that makes the trainer.",
)
@click.option("--output", type=click.Path(path_type=Path), help="File to write.  [default: standard output]")
@click.option("--force", is_flag=True, help="Overwrite the output file.")
@click.option("--transformers-version", metavar="X.Y", help="Version to write for.  [default: the installed one]")
@click.option("--trl-version", metavar="X.Y", help="Version to write for.  [default: the installed one]")
def command(
    fit_file: Path,
    to: str,
    form: str,
    output: Path | None,
    force: bool,
    transformers_version: str | None,
    trl_version: str | None,
) -> None:
    """Write the fit in FIT_FILE in a trainer's own words.

    What the trainer has no setting for is a step, with the code it takes.

    \b
    Example:
      autotune fit --output fit.yaml
      autotune export fit.yaml --to trl --format python --output train.py
    """
    from autotune.export import render, to_transformers, to_trl
    from autotune.fitfile import read_fit, write_file

    fit = read_fit(fit_file)
    if to == "trl":
        document = to_trl(fit.config, fit.model, trl_version=trl_version, transformers_version=transformers_version)
    else:
        document = to_transformers(fit.config, fit.model, transformers_version=transformers_version)
    text = render(document, form)
    if output is None:
        click.echo(text, nl=False)
        return
    write_file(output, text, force=force)
    click.echo(f"Wrote {output} for {to}.", err=True)
