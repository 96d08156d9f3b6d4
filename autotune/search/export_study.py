"""A fit or a sweep as a study in a file that Optuna's own tools read."""

from __future__ import annotations

import sqlite3
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.errors import InvalidRequest
from autotune.landscape import Landscape, Row
from autotune.values import Recommendation, TrainingConfig, TrialRecord, Verdict, to_json

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_CONSTRAINTS = "constraints"  # where Optuna's samplers keep a trial's, from version 2 on
_SIZES = ("sequence_length", "micro_batch_size", "gradient_accumulation_steps", "lora_rank", "lora_alpha")
#: Above 0, a trial is infeasible. What ran out of memory exceeded the limit by an amount that nobody measured.
_SOMEWHAT_OVER = 1e-6


def check_storage(path: Path, option: str = "--optuna") -> None:
    """Before hours of probing: raises `InvalidRequest` where no study could be written to `path`."""
    if not path.exists():
        if not path.parent.is_dir():
            raise InvalidRequest(f"{path.parent} is no folder: make it first, or give another {option}")
        return
    try:
        with path.open("r+b") as file:
            start = file.read(16)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written ({error.strerror}): give another {option}") from error
    if start not in (b"", b"SQLite format 3\0") or (start and not _has_studies(path)):
        raise InvalidRequest(f"{path} exists and is no storage of Optuna: give another {option}")


def _has_studies(path: Path) -> bool:
    connection = sqlite3.connect(path)
    try:
        return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'studies'").fetchone())
    except sqlite3.DatabaseError:
        return False
    finally:
        connection.close()


def write_study(path: Path, name: str, trials: Iterable[FrozenTrial]) -> None:
    """These trials as the study `name` in `path`, in place of one that has that name; other studies stay.

    Values are tokens a second, to be maximised. Read it with `optuna.load_study(study_name=name,
    storage="sqlite:///PATH")`. Raises `InvalidRequest`.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    check_storage(path)
    storage = None
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        if name in optuna.get_all_study_names(storage):
            optuna.delete_study(study_name=name, storage=storage)
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        study.add_trials(trials)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        why = str(getattr(error, "orig", None) or error.__cause__ or error).splitlines()[0]
        raise InvalidRequest(f"{path}: the study cannot be written ({why}): give another --optuna") from error
    finally:
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """One trial, as a study is told of it."""

    config: TrainingConfig
    speed: float | None  # tokens a second; None: it does not fit
    over_allowed: float
    facts: dict[str, Any]  # JSON data beside the config
    cut_short: bool = False


def trials_of(landscape: Landscape) -> list[FrozenTrial]:
    """A row a trial: what fits is complete, the rest failed and infeasible. All fields that vary are parameters."""
    allowed = _allowed_bytes(landscape)
    return _frozen(
        [
            _Told(
                config=row.config,
                speed=speed_of(row),
                over_allowed=over_allowed(row, allowed),
                facts={
                    "verdict": row.verdict.value,
                    "needed_bytes": row.needed_bytes,
                    "peak_allocated_bytes": row.peak_allocated_bytes,
                    "device": landscape.header.device.name,
                    "model": landscape.header.model.name,
                },
            )
            for row in landscape.rows
        ]
    )


def trials_of_fit(result: Recommendation) -> list[FrozenTrial]:
    """The same of a fit's trials, those that were known before it too. One that was cut short is pruned."""
    return _frozen(
        [
            _Told(
                config=trial.config,
                speed=trial.tokens_per_second,
                over_allowed=_over_limit(trial),
                facts={
                    "verdict": trial.judgement.verdict.value,
                    "origin": trial.origin.value,
                    "moves": list(trial.moves),
                    "peak_reserved_bytes": trial.report.peak_reserved_bytes,
                    "peak_allocated_bytes": trial.report.peak_allocated_bytes,
                    "counts_padding": trial.counts_padding,
                    "predicted": to_json(trial.prediction),
                    "time_utc": trial.time_utc,
                    "device": result.device.name,
                    "model": result.request.model.name,
                },
                cut_short=trial.report.cut_short,
            )
            for trial in result.trials
        ]
    )


def _frozen(told: Sequence[_Told]) -> list[FrozenTrial]:
    """As Optuna keeps them; fields with one value alone are no parameters."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    values = _varying([one.config for one in told])
    distributions: dict[str, BaseDistribution] = {
        name: IntDistribution(min(each), max(each)) if name in _SIZES else CategoricalDistribution(each)
        for name, each in values.items()
    }
    found = []
    for one in told:
        config = to_json(one.config)
        ran = TrialState.PRUNED if one.cut_short else TrialState.COMPLETE
        found.append(
            create_trial(
                state=TrialState.FAIL if one.speed is None else ran,
                value=one.speed,
                params={name: _parameter(config[name]) for name in values},
                distributions=distributions,
                intermediate_values={0: one.speed} if one.cut_short and one.speed else {},
                user_attrs={"config": config, **one.facts},
                system_attrs={_CONSTRAINTS: [one.over_allowed]},
            )
        )
    return found


def speed_of(row: Row) -> float | None:
    """Tokens a second, padding counted; None where it does not fit."""
    if row.verdict is not Verdict.FITS:
        return None
    micro, optimizer = statistics.median(row.micro_batch_times_s), statistics.median(row.optimizer_times_s)
    return row.config.tokens_per_step / (row.config.gradient_accumulation_steps * micro + optimizer)


def over_allowed(row: Row, allowed_bytes: int | None) -> float:
    """Memory ÷ what is allowed - 1: above 0 is infeasible, as Optuna has it."""
    if row.verdict is not Verdict.FITS:
        return _SOMEWHAT_OVER
    if row.needed_bytes is None or not allowed_bytes:
        return 0.0
    return min(0.0, row.needed_bytes / allowed_bytes - 1)


def _over_limit(trial: TrialRecord) -> float:
    """The same of a fit's trial: what was held against the limit that was enforced."""
    if trial.judgement.verdict is not Verdict.FITS:
        return _SOMEWHAT_OVER
    held, limit = trial.report.peak_reserved_bytes, trial.report.limit_bytes
    return min(0.0, held / limit - 1) if held and limit else 0.0


def _allowed_bytes(landscape: Landscape) -> int | None:
    limit = landscape.header.memory_limit_bytes or landscape.header.device.total_bytes
    return None if limit is None else limit - landscape.header.headroom_bytes


def _varying(configs: Sequence[TrainingConfig]) -> dict[str, list[Any]]:
    """Field: its values in the order they come, of fields with more than one; of a single config all sizes."""
    documents = [to_json(config) for config in configs]
    names = documents[0] if documents else ()
    values = {name: list(dict.fromkeys(_parameter(one[name]) for one in documents)) for name in names}
    return {name: each for name, each in values.items() if len(each) > 1 or name == "micro_batch_size"}


def _parameter(value: Any) -> Any:
    """What Optuna takes as a category: a list becomes text."""
    return ",".join(map(str, value)) if isinstance(value, list) else value
