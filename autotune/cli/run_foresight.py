"""What a run can know before it chooses its next config: the model's shape, what is stored, and predictions."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from autotune.cli.bench import LEARNED_FROM, predictor_of, read_checked_environment
from autotune.errors import AutotuneError, StoreError
from autotune.hardware.select import default_headroom_bytes
from autotune.protocols import Predictor
from autotune.recover.facts import Ended, Settings
from autotune.recover.longest import config_of, longest_batch
from autotune.values import (
    LIBRARIES,
    TRAINER_ADAPTER_DTYPE,
    TRAINER_LOSS,
    TRAINER_UPCAST,
    Device,
    Environment,
    FitRequest,
    ModelSource,
    Trainer,
    TrainingConfig,
    TrialRecord,
)
from autotune.workload.models import resolve_model
from gpu_db.store import GpuStore, open_store

logger = logging.getLogger(__name__)

_TRAINER = {"trl": Trainer.TRL}  # whose step the others run is transformers' own


@dataclass(frozen=True, slots=True, kw_only=True)
class Foresight:
    """Nothing of it is there where the model is not known."""

    source: ModelSource | None = None
    base: TrainingConfig | None = None
    environment: Environment | None = None  # of the trainer, as far as it told its versions
    store: GpuStore | None = None
    predictor: Predictor | None = None
    trials: tuple[TrialRecord, ...] = ()
    why_not: str | None = None  # one sentence, where nothing can be predicted


@contextmanager
def foresight(
    settings: Settings,
    ended: Ended,
    device: Device,
    limit_bytes: int | None,
    stopped: Callable[[], bool],
) -> Iterator[Foresight]:
    """The model's predictor and its stored trials, for one decision; its processes are ended afterwards."""
    with contextlib.ExitStack() as stack:
        try:
            yield _foresight(settings, ended, device, limit_bytes, stopped, stack)
        except _Unknown as unknown:
            logger.debug("no prediction: %s", unknown)
            yield Foresight(why_not=str(unknown))


class _Unknown(Exception):
    """Nothing can be predicted; the message says why."""


def _foresight(
    settings: Settings,
    ended: Ended,
    device: Device,
    limit_bytes: int | None,
    stopped: Callable[[], bool],
    stack: contextlib.ExitStack,
) -> Foresight:
    source = model_of(settings)
    base = base_config(settings, ended)
    if source is None or base is None:
        raise _Unknown("the command does not say its model and lengths: --model and --sequence-length would")
    try:
        environment = read_checked_environment(device, None)
        store = stack.enter_context(open_store(None, device))
        trials = store.trials(model_fingerprint=source.fingerprint, latest=LEARNED_FROM)
        request = FitRequest(model=source, start=base, sequence_length_stated=True, memory_limit_bytes=limit_bytes)
        headroom = default_headroom_bytes(device, limit_bytes)
        predictor = predictor_of(request, device, headroom, environment, store, python=None, stop=stopped)
    except StoreError as error:
        raise _Unknown(f"the GPU database cannot be read: {error}") from error
    except AutotuneError as error:
        raise _Unknown(str(error)) from error
    stack.callback(predictor.close)
    known = tuple(t for t in trials if t.environment.fingerprint == environment.fingerprint)
    versions: dict[str, Any] = {name: version for name, version in ended.progress.versions.items() if name in LIBRARIES}
    return Foresight(
        source=source,
        base=base,
        environment=replace(environment, **versions),
        store=store,
        predictor=predictor,
        trials=known,
    )


def model_of(settings: Settings) -> ModelSource | None:
    """The model that the command names, by its config.json alone; None where it cannot be read."""
    if settings.model is None:
        return None
    try:
        return resolve_model(settings.model, say=logger.debug)
    except AutotuneError as error:
        logger.debug("model %s: %s", settings.model, error)
        return None


def base_config(settings: Settings, ended: Ended) -> TrainingConfig | None:
    """What the command says, and where it does not, what its trainer does: loss, dtypes."""
    config = config_of(settings, ended.progress)
    if config is None or longest_batch(settings, ended.progress, None) is None:
        return None
    trainer = _TRAINER.get(settings.trainer or "", Trainer.TRANSFORMERS)
    own: Mapping[str, Any] = {
        "trainer": trainer,
        "loss": TRAINER_LOSS[trainer],
        "upcast": TRAINER_UPCAST[trainer],
        "adapter_dtype": TRAINER_ADAPTER_DTYPE[trainer],
    }
    return replace(config, **own)
