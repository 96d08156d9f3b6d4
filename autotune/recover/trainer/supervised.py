"""`Trainer.train` under a plan: apply it, resume as it says, and on a death save what can be saved."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autotune.recover.facts import Phase
from autotune.recover.trainer import emergency, randomness
from autotune.recover.trainer.callback import make_callback
from autotune.recover.trainer.run import FORWARD_BACKWARD, TrainRun
from autotune.recover.trainer.session import Session, harmless
from autotune.recover.trainer.settings import apply_to_trainer
from autotune.recover.trainer.stop import die_of_sigterm

_RESUME = "resume_from_checkpoint"


def train_under(
    session: Session, trainer: Any, train: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """What `train` gives back. Its exceptions pass; a SIGTERM that was heard ends the process once all is saved."""
    arguments, named = _with_checkpoint(session, trainer, arguments, named)
    prepared = harmless(_prepare)(session, trainer, bool(arguments[0] if arguments else named.get(_RESUME)))
    if prepared is None:
        return train(trainer, *arguments, **named)
    run, callback = prepared
    try:
        with _own_micro_batch(trainer) if run.resumed else contextlib.nullcontext():
            result = train(trainer, *arguments, **named)
    except BaseException as error:
        emergency.lift_data_limit()
        harmless(_tell)(session, run, error)
        raise
    finally:
        run.stop.by_signal.remove()
        trainer.remove_callback(callback)
        session.run = None
    harmless(session.enter)(Phase.DONE)
    if run.stop.by_signal.is_requested:
        die_of_sigterm()
    return result


def _prepare(session: Session, trainer: Any, resumed: bool) -> tuple[TrainRun, Any]:
    session.start()
    not_applied = apply_to_trainer(trainer, session.plan.changed)
    run = TrainRun(trainer, session.plan, session.events, resumed=resumed, not_applied=not_applied)
    callback = make_callback(session, run)
    trainer.add_callback(callback)
    run.stop.install()
    session.run = run
    session.enter(Phase.LOAD)  # until training begins: a checkpoint is loaded, the model moved
    return run, callback


def _with_checkpoint(
    session: Session, trainer: Any, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `train`, with the plan's checkpoint in place of whatever the script says."""
    checkpoint = _checkpoint_for(session, trainer)
    if checkpoint is None:
        return arguments, named
    return (checkpoint, *arguments[1:]), {name: value for name, value in named.items() if name != _RESUME}


def _checkpoint_for(session: Session, trainer: Any) -> str | None:
    """The plan's checkpoint, for the first training of this process that writes where the plan says."""
    plan = session.plan
    if plan.resume_from_checkpoint is None or session.has_resumed:
        return None
    if plan.output_dir is not None and os.path.realpath(plan.output_dir) != os.path.realpath(trainer.args.output_dir):
        return None
    session.has_resumed = True
    return plan.resume_from_checkpoint


@contextlib.contextmanager
def _own_micro_batch(trainer: Any) -> Iterator[None]:
    """Before 5.2 a resumed Trainer takes its micro batch from the checkpoint: have the checkpoint say ours."""
    from transformers.trainer_callback import TrainerState

    kept = TrainerState.__dict__["load_from_json"]

    def load_from_json(cls: Any, path: str) -> Any:
        state = kept.__func__(cls, path)
        if state.train_batch_size is not None:
            state.train_batch_size = trainer.args.train_batch_size
        return state

    TrainerState.load_from_json = classmethod(load_from_json)
    try:
        yield
    finally:
        TrainerState.load_from_json = kept


def _tell(session: Session, run: TrainRun, error: BaseException) -> None:
    phase = session.phase
    run.flush()
    saved = _save(session, run, error) if isinstance(error, Exception) else None
    session.phase = phase  # saving has its own
    where = {"batch": run.batch, "step": run.step, "part": run.part}
    session.died(error, **where, saved=str(saved.absolute()) if saved else None)


def _save(session: Session, run: TrainRun, error: Exception) -> Path | None:
    """Write the emergency checkpoint where the state is that of the last finished step; None where none is written."""
    trainer = run.trainer
    in_step = session.phase is Phase.TRAIN and run.part == FORWARD_BACKWARD and run.draws is not None
    in_evaluation = session.phase is Phase.EVALUATE and run.part is None
    is_over = trainer.state.global_step >= trainer.state.max_steps or trainer.control.should_training_stop
    # Fetching a batch, logging: at the end of all, another model may be loaded already.
    between = session.phase is Phase.TRAIN and run.part is None and not is_over
    if run.step != trainer.state.global_step or not (in_step or in_evaluation or between):
        return None
    skips = in_evaluation or (between and trainer.control.should_evaluate)
    if emergency.why_not(trainer, asked=run.plan.emergency, skips_evaluation=skips) is not None:
        return None
    try:
        return _write(run, error)
    except Exception as failure:  # noqa: BLE001 - the first death is the one to tell; the folder stays marked
        sys.stderr.write(f"autotune: no emergency checkpoint: {type(failure).__name__}: {failure}\n")
        return None


def _write(run: TrainRun, error: Exception) -> Path:
    trainer = run.trainer
    emergency.free(trainer, error)
    if run.draws is not None:  # none are kept between two steps: what was drawn since is what an undisturbed run draws
        randomness.restore(run.draws)
    if run.part == FORWARD_BACKWARD and run.counters is not None:
        trainer.state.num_input_tokens_seen, trainer.current_flos = run.counters
    began = run.clock()
    folder = emergency.save(trainer)
    run.saved(str(folder.absolute()), trainer.state.global_step, run.clock() - began, emergency=True)
    return folder
