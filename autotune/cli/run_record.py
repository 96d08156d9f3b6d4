"""What an attempt measured goes to the GPU database, so that the next fit knows this run's true worst case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from autotune.recover.facts import Ended, EndedBy, Settings
from autotune.recover.longest import batch_of_death, config_of, longest_batch
from autotune.recover.record import trials_of_run
from autotune.values import Device, Judgement, Prediction, TrainingConfig


def record_trials(
    ended: Ended,
    judgement: Judgement,
    settings: Settings,
    device: Device,
    limit_bytes: int | None,
    *,
    run_id: str,
    stopped: Callable[[], bool],
) -> int:
    """How many trials were kept; 0 where the model is not known, or nothing was measured. Raises `StoreError`."""
    if ended.ended_by is EndedBy.USER or settings.model is None or not ended.progress.reporting:
        return 0
    from autotune.cli.run_foresight import foresight  # what predicts is heavy

    with foresight(settings, ended, device, limit_bytes, stopped) as seen:
        tokens = longest_batch(settings, ended.progress, batch_of_death(ended))
        own = config_of(settings, ended.progress, tokens=tokens)
        if seen.source is None or seen.store is None or seen.environment is None or seen.base is None or own is None:
            return 0
        config = _with_trainers_own(own, seen.base)
        predictor = seen.predictor

        def predict(at: TrainingConfig) -> Prediction | None:
            return predictor.expect(at) if predictor is not None else None

        trials = trials_of_run(
            ended,
            judgement,
            config=config,
            source=seen.source,
            device=device,
            memory_limit_bytes=limit_bytes,
            environment=seen.environment,
            time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            run_id=run_id,
            predict=predict,
        )
        for trial in trials:
            seen.store.append(trial)
        return len(trials)


def _with_trainers_own(config: TrainingConfig, base: TrainingConfig) -> TrainingConfig:
    """`config` with the loss and dtypes of its trainer, which no command says."""
    return replace(config, trainer=base.trainer, loss=base.loss, upcast=base.upcast, adapter_dtype=base.adapter_dtype)
