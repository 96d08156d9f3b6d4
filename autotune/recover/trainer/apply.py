"""One line for a Trainer script: run as the plan says, and tell the supervisor."""

from __future__ import annotations

import os
from typing import Any, TypeVar

T = TypeVar("T")


def apply(trainer_or_args: T) -> T:
    """Give back a `Trainer` or a `TrainingArguments` with the plan of `autotune run` applied to it.

    The plan is the one that `AUTOTUNE_PLAN` names; without it nothing happens. From here on the Trainer also reports
    its steps, resumes from the plan's checkpoint and saves before it dies, as under the hook. Once is enough, twice
    does no harm.
    Raises `InvalidRequest` where the plan cannot be read.

        from autotune.recover import apply

        trainer = apply(Trainer(model=model, args=args, train_dataset=dataset))
        trainer.train()
    """
    if not os.environ.get("AUTOTUNE_PLAN"):
        return trainer_or_args
    import transformers.trainer

    from autotune.recover.trainer.patch import install
    from autotune.recover.trainer.session import open_session
    from autotune.recover.trainer.settings import apply_to_arguments, apply_to_trainer

    session = open_session()
    if session is None:
        return trainer_or_args
    install(transformers.trainer.Trainer)
    session.start()
    given: Any = trainer_or_args
    if hasattr(given, "per_device_train_batch_size"):
        apply_to_arguments(given, session.plan.changed)
    else:
        apply_to_trainer(given, session.plan.changed)
    return trainer_or_args
