"""The TrainerCallback that tells a `TrainRun` what the Trainer does; made only where transformers is imported."""

from __future__ import annotations

from typing import Any

from autotune.recover.facts import Phase
from autotune.recover.trainer.emergency import checkpoint_path
from autotune.recover.trainer.run import TrainRun
from autotune.recover.trainer.session import Session, harmless


def make_callback(session: Session, run: TrainRun) -> Any:
    from transformers import TrainerCallback

    class AutotuneCallback(TrainerCallback):  # type: ignore[misc]
        """Each method is one look and at most one line written; no device is waited for."""

        @harmless
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            session.enter(Phase.TRAIN)
            run.begins(args, state)

        @harmless
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.epoch_begins()

        @harmless
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.step_begins(state)

        @harmless
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.micro_batch_ends()

        @harmless
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            run.optimizer_begins(optimizer)

        @harmless
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.step_ends(state, loss_follows=bool(control.should_log))
            if run.stop.is_due(state.global_step):
                run.stopping = control.should_training_stop = True
                if run.saves or run.plan.emergency or run.stop.by_control:
                    control.should_save = True

        @harmless
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.flush()
            if run.stopping and not float(state.epoch or 0).is_integer():  # stopped within it: it has not ended
                control.should_evaluate = control.should_save = False

        @harmless
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            run.logged(logs)

        @harmless
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.saved(str(checkpoint_path(run.trainer).absolute()), state.global_step, run.saving_s)

        @harmless
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.ends(state)

    return AutotuneCallback()
