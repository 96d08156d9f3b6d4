"""What `autotune run` does once its options are parsed: read the command, find its folder, supervise, say the end."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autotune.cli.run_options import parse_limit, this_folder
from autotune.cli.run_text import PREFIX, command_line, tell
from autotune.errors import AutotuneError, InvalidRequest, UsageError
from autotune.hardware.readers import read_machine
from autotune.hardware.select import check_memory_limit, select_device
from autotune.recover.checkpoints import newest_complete, present
from autotune.recover.command import TrainingCommand, read_command
from autotune.recover.facts import Checkpoint, Settings
from autotune.recover.folder import held, interrupted_run, new_folder
from autotune.recover.limits import needs_torch, with_memory_limit
from autotune.recover.plan import RunState, read_state, write_state
from autotune.recover.run import run
from autotune.recover.trainer.environ import hook_environ
from autotune.recover.watching import AttemptLimits
from autotune.values import Device

FAILED = 125  # the supervisor itself; 126 and 127 are of the command, as a shell has them


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One run as asked for."""

    words: tuple[str, ...]
    options: dict[str, Any]
    cwd: Path
    environ: dict[str, str]  # of the command
    device: Device
    limit_bytes: int | None
    start: Settings | None  # of a fit file or options
    command: TrainingCommand
    limits: AttemptLimits
    job: int | None = None

    @property
    def settings(self) -> Settings:
        """As the command has it; what it does not say, as the options do."""
        stated = {
            name: value
            for name in ("model", "sequence_length", "output_dir")
            if (value := self.options[name]) is not None and getattr(self.command.settings, name) is None
        }
        return replace(self.command.settings, **stated)

    @property
    def begin_change(self) -> dict[str, Any]:
        """What a fit file's config changes in the command."""
        if self.start is None:
            return {}
        own = asdict(self.command.settings)
        return {
            name: value
            for name, value in asdict(self.start).items()
            if value is not None and value != own[name] and name in _PLANNED and self.command.can(name, value)
        }


#: Of a fit's config: what the effective batch size and the speed hang on, and no one's own choice.
_PLANNED = ("micro_batch_size", "gradient_accumulation_steps", "eval_micro_batch_size", "gradient_checkpointing")


def main(words: tuple[str, ...], options: dict[str, Any]) -> int:
    """The exit code of the command. Raises `AutotuneError` with 125, 126 or 127 for what is not the command's."""
    logging.basicConfig(format=f"{PREFIX}%(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        if options["job"] is not None:
            return _job(options["job"])
        return supervise(ask(words, options, cwd=this_folder(), environ=os.environ))
    except UsageError:
        raise
    except AutotuneError as error:
        error.exit_code = error.exit_code if error.exit_code in (126, 127) else FAILED
        raise


def _job(number: int) -> int:
    """A job of the daemon's queue."""
    from autotune.cli.run import command
    from autotune.recover.job import State
    from autotune.recover.jobs import open_jobs

    with open_jobs() as store:
        job = store.job(number)
        ended = read_state(Path(job.run_folder)) if job.run_folder else None
        if ended is not None and ended.finished:  # its supervisor was killed between the end and the row
            state = State.FAILED if ended.exit_code else State.FINISHED
            store.finish(number, state, exit_code=ended.exit_code, message=f"ended with exit code {ended.exit_code}")
            return ended.exit_code or 0
    context = command.make_context("run", [*job.options, "--", *job.command])
    options = {**context.params, "job": number, "resume": job.run_folder is not None}
    options["run_folder"] = Path(job.run_folder) if job.run_folder else None
    options["gpu"] = "cpu" if job.device == "cpu" else "auto"  # the daemon lets it see its own card alone
    options |= {f"on_{event}": None for event in ("finished", "recovered", "failed")}  # the row has them
    words = options.pop("words")
    try:
        return supervise(ask(words, options, cwd=Path(job.cwd), environ=os.environ))
    except AutotuneError as error:
        _job_failed(number, str(error))
        raise


def _job_failed(number: int, message: str) -> None:
    from autotune.recover.job import ENDED, Event, State
    from autotune.recover.jobs import open_jobs
    from autotune.recover.notify import tell as notify

    with open_jobs() as store:
        if store.job(number).state in ENDED:
            return  # its row has heard of it, and told
        job = store.finish(number, State.FAILED, exit_code=FAILED, message=message)
        if job.state is State.FAILED:  # another process may have it
            notify(job, Event.FAILED, message, home=store.home).join()


def ask(words: tuple[str, ...], options: dict[str, Any], *, cwd: Path, environ: Mapping[str, str]) -> Asked:
    """Everything that can be wrong before anything is started. Raises `AutotuneError`."""
    if not words:
        raise UsageError("there is no command: give it behind --, as in autotune run -- python train.py")
    if options["plan"] is not None and options["fit"]:
        raise UsageError("--plan and --fit: the plan is a fit already; give one of them")
    device = _device(options["gpu"])
    limit = _limit(options["memory_limit"], device)
    hooked = not options["no_hook"]
    env = hook_environ(environ) if hooked else dict(environ)
    start = _start(options, device) if options["plan"] else None
    command = read_command(words, cwd=cwd, environ=env, hooked=hooked, start=start)
    if options["fit"]:
        start = _fitted(command, options)
        command = read_command(words, cwd=cwd, environ=env, hooked=hooked, start=start)
    if start is not None:
        _check_plan(start, command, options)
    torch = ".".join(map(str, command.torch)) if command.torch else None
    if limit is not None and device.kind != "cpu" and (too_old := needs_torch(torch)):
        raise InvalidRequest(too_old)
    limits = replace(
        AttemptLimits(),
        start_s=options["start_limit"],
        stall_factor=options["stall"],
        stall_floor_s=options["stall_floor"],
        grace_s=options["grace"],
    )
    asked = Asked(
        words=words,
        options=options,
        cwd=cwd,
        environ=env,
        device=device,
        limit_bytes=limit,
        start=start,
        command=command,
        limits=with_memory_limit(limits, limit, device),
        job=options["job"],
    )
    _check_checkpoints(asked)
    return asked


def _device(wanted: str) -> Device:
    """Without a GPU the CPU: a command runs where it runs, and nothing is said about it."""
    if wanted == "all":  # the daemon's word for every visible card
        wanted = "auto"
    return select_device(wanted, read_machine().devices)[0]


def _limit(stated: str | None, device: Device) -> int | None:
    if stated is None:
        return None
    limit = parse_limit(stated)
    check_memory_limit(limit, device)
    return limit


def _start(options: dict[str, Any], device: Device) -> Settings:
    """A fit file's config. Raises `InvalidRequest` where it was fitted on another kind of card."""
    from autotune.cli.run_fit import settings_of
    from autotune.fitfile import read_fit

    fit = read_fit(options["plan"])
    name = fit.gpu.get("name")
    if name is not None and name != device.name:
        raise InvalidRequest(
            f"{options['plan']} is a fit for {name}, and this run is on {device.name}: fit here, or name the card"
            " with --gpu"
        )
    return settings_of(fit)


def _fitted(command: TrainingCommand, options: dict[str, Any]) -> Settings:
    from autotune.cli.run_fit import fitted
    from autotune.recover.job import State
    from autotune.recover.jobs import open_jobs

    if options["job"] is not None:
        with open_jobs() as store:
            store.update(options["job"], state=State.FITTING, message="fitting")
    return fitted(command.settings, options)


def _check_plan(start: Settings, command: TrainingCommand, options: dict[str, Any]) -> None:
    """Raises `InvalidRequest` for a plan of another model, of another effective batch, or for longer samples."""
    own, plan = command.settings, options["plan"] or "the fit"
    model = own.model or options["model"]
    if model is not None and start.model is not None and Path(model).name != Path(start.model).name:
        raise InvalidRequest(f"{plan} is of {start.model}, and the command trains {model}: fit that model")
    if own.sequence_length and start.sequence_length and own.sequence_length > start.sequence_length:
        raise InvalidRequest(
            f"{plan} is proven at {start.sequence_length} tokens, and the command has {own.sequence_length}: fit with"
            f" --sequence-length {own.sequence_length}"
        )
    batches = [
        one.micro_batch_size * (one.gradient_accumulation_steps or 1) if one.micro_batch_size else None
        for one in (start, own)
    ]
    if None not in batches and batches[0] != batches[1] and {"arguments", "file"} & set(command.carriers):
        raise InvalidRequest(
            f"{plan} has effective batch size {batches[0]}, and the command {batches[1]}, which decides what is"
            f" learned: fit with --effective-batch-size {batches[1]}, or change the command"
        )


def _check_checkpoints(asked: Asked) -> None:
    """Raises `InvalidRequest` where a death would lose everything, and that was not consented to."""
    if asked.command.settings.save_strategy == "no" and not asked.options["without_checkpoints"]:
        raise InvalidRequest(
            "the command saves no checkpoints (save_strategy no), so a death loses all that was trained: set"
            " save_strategy to steps, or consent with --without-checkpoints"
        )


def supervise(asked: Asked) -> int:
    if asked.options["dry_run"]:
        from autotune.cli.run_dry import print_dry_run

        print_dry_run(asked)
        return 0
    folder, state, resume = _place(asked)
    from autotune.cli.run_hands import Hands

    output = asked.cwd / state.output_dir if state.output_dir else None
    with held(folder, output), Hands(asked, folder, state.run_id) as hands:
        if resume is None and state.attempts:
            resume = hands.newest(state)
        write_state(folder, state)
        end = run(state, asked.command, hands.seams(), resume=resume)
    return end.exit_code or 0


def _place(asked: Asked) -> tuple[Path, RunState, Checkpoint | None]:
    """The run's folder, its state, and a checkpoint that --resume found where no run of ours is to go on."""
    given = asked.options["run_folder"]
    if asked.options["resume"]:
        found = _interrupted(asked, given)
        if found is not None:
            folder, state = found
            if state.finished:
                raise InvalidRequest(
                    f"the run of {folder} has ended (exit code {state.exit_code}): start a new one without --resume"
                )
            tell(f"going on with run {state.run_id}, in attempt {state.attempts + 1} ({folder})")
            return folder, state, None
    run_id, folder = _new_folder(given, resumed=asked.options["resume"])
    output = asked.settings.output_dir
    state = RunState(
        run_id=run_id,
        argv=asked.words,
        cwd=str(asked.cwd),
        output_dir=output,
        changed=asked.begin_change,
        leftovers=present(asked.cwd / output) if output else None,
    )
    return folder, state, _resumed_by_hand(asked, output)


def _new_folder(given: Path | None, *, resumed: bool) -> tuple[str, Path]:
    """A folder to resume in that holds no state is of a run that was killed before it began."""
    if given is not None and resumed and given.is_dir():
        return f"{time.strftime('%Y%m%d-%H%M%S')}-{given.name}", given.absolute()
    return new_folder(given)


def _interrupted(asked: Asked, given: Path | None) -> tuple[Path, RunState] | None:
    if given is not None:
        state = read_state(given.absolute())
        if state is not None and list(state.argv) != list(asked.words):
            raise InvalidRequest(
                f"the run of {given} is of another command ({command_line(state.argv)}): give that one, or another"
                " --run-folder"
            )
        return (given.absolute(), state) if state is not None else None
    return interrupted_run(asked.words, str(asked.cwd))


def _resumed_by_hand(asked: Asked, output: str | None) -> Checkpoint | None:
    """With --resume and no run of ours: the newest complete checkpoint that is there, whoever wrote it."""
    if not asked.options["resume"]:
        return None
    found = newest_complete(asked.cwd / output) if output else None
    if found is None and not (asked.options["run_folder"] or asked.job):
        raise InvalidRequest(
            "--resume: no interrupted run of this command is known here, and no complete checkpoint is in"
            f" {output or 'its output folder, which the command does not name (--output-dir)'}: start without --resume"
        )
    return found
