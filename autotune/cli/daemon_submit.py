"""`daemon submit`: a command and its options as the row that the daemon acts on."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from autotune.cli.daemon_process import running_daemon
from autotune.cli.run_options import parse_limit
from autotune.errors import InvalidRequest, UsageError
from autotune.recover.job import Event, Job, NewJob
from autotune.recover.jobs import open_jobs
from autotune.recover.notify import check_url, hook_words, keep_url

_HOOKS = {f"on_{event}": event for event in Event}
_OURS = {"name", "notify", "words", "gpu", *_HOOKS}  # what the row says in columns of its own


def submit(
    context: click.Context,
    words: tuple[str, ...],
    options: Mapping[str, Any],
    *,
    cwd: Path,
    environ: Mapping[str, str] = os.environ,
) -> tuple[Job, list[str]]:
    """The queued job, and what its owner should know. Raises InvalidRequest, StoreError."""
    if not words:
        raise UsageError("there is no command: give it after --, as in `autotune daemon submit -- python train.py`")
    if (plan := options.get("plan")) is not None and not Path(cwd, plan).is_file():
        raise InvalidRequest(f"--plan {plan} is no file here: give a fit file of `autotune fit --output`")
    if plan is not None and options["fit"]:
        raise UsageError("--plan and --fit: the plan is a fit already; give one of them")
    if options["memory_limit"]:
        parse_limit(options["memory_limit"])
    if options["notify"]:
        check_url(options["notify"])
    gpu, notes = _gpu(options["gpu"], environ)
    new = NewJob(
        command=words,
        cwd=str(cwd),
        name=options["name"] or "",
        options=option_words(context),
        environ=dict(environ),
        hooks=_hooks(options),
        gpu=gpu,
    )
    with open_jobs() as store:
        job = store.submit(new)
        if options["notify"]:
            keep_url(store.home, job.id, options["notify"])
        notes += _notes(words[0], cwd, environ)
        if running_daemon(store.home) is None:
            notes.append("no daemon runs, so it waits: start one with `autotune daemon start`")
    return job, notes


def option_words(context: click.Context) -> tuple[str, ...]:
    """The options of `autotune run` that were given, as words that it reads back."""
    words: list[str] = []
    for param in context.command.params:
        name = param.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not isinstance(param, click.Option) or name in _OURS or not given:
            continue
        words += [param.opts[0]] if param.is_flag else [param.opts[0], str(context.params[name])]
    return tuple(words)


def _hooks(options: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {
        event.value: hook_words(options[name], f"--{name.replace('_', '-')}")
        for name, event in _HOOKS.items()
        if options[name]
    }


def _gpu(asked: str, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """CUDA_VISIBLE_DEVICES of the submitting shell is a wish of that kind, too; the daemon sets the job's own."""
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if asked != "auto" or shown is None:
        return asked, []
    if not shown or shown == "-1":
        return "cpu", ["CUDA_VISIBLE_DEVICES hides every GPU: queued for the CPU"]
    if re.fullmatch(r"\d+|(GPU|MIG)-\S+", shown) and "," not in shown:
        wanted = f"cuda:{shown}" if shown.isdecimal() else shown
        return wanted, [f"CUDA_VISIBLE_DEVICES is {shown}: queued for {wanted}"]
    return "auto", [
        "CUDA_VISIBLE_DEVICES names several GPUs and is not kept: the daemon gives one, --gpu all every one"
    ]


def _notes(program: str, cwd: Path, environ: Mapping[str, str]) -> list[str]:
    found = Path(cwd, program).is_file() if "/" in program else shutil.which(program, path=environ.get("PATH"))
    return [] if found else [f"{program} is not found from here: it must be there when the job starts"]
