"""The files that a fit is asked for: checked before it, written after it."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from pathlib import Path
from typing import Any

from autotune.cli.words import say
from autotune.errors import InvalidRequest, UsageError
from autotune.fitfile import write_file, write_fit
from autotune.recommendation import fit_file_document
from autotune.search.export_study import check_storage, trials_of_fit, write_study
from autotune.values import GIB, FitStatus, Recommendation, Trainer

_FILES = {"--output": "output", "--plot": "plot", "--optuna": "study_file"}  # their names among the options


def check_files(options: dict[str, Any]) -> None:
    """Before minutes of probing, not after: raises `InvalidRequest`, `UsageError`."""
    asked: dict[Path, str] = {}
    for option, name in _FILES.items():
        path = options[name]
        if path is None:
            continue
        place = Path(os.path.realpath(path))  # ./a and a are one
        if place in asked:
            raise UsageError(f"{option} and {asked[place]} are both {path}: give one of them another name")
        asked[place] = option
        if option == "--optuna" and path.is_file():
            check_storage(path)  # --force does not overwrite what is no study
        _check_output(path, option, force=options["force"])


def write_files(result: Recommendation, options: dict[str, Any]) -> None:
    """The config where there is one, picture and study in any case. Raises `InvalidRequest`."""
    if options["output"] and result.status is FitStatus.FITTED:
        _write(result, options["output"], force=options["force"])
    if options["plot"]:
        _write_plot(result, options["plot"], force=options["force"])
    if options["study_file"]:
        path = options["study_file"]
        write_study(path, path.stem, trials_of_fit(result))
        say(f"Optuna study {path.stem!r} of {len(result.trials)} trials: {path}")


def _check_output(path: Path, option: str, *, force: bool) -> None:
    try:
        if path.is_dir():
            raise InvalidRequest(f"{option} {path} is a folder: give the name of a file")
        if path.exists() and not force:
            raise InvalidRequest(f"{path} exists: give --force to overwrite it, or another {option}")
        if not path.parent.is_dir():
            raise InvalidRequest(f"{path.parent} is no folder: make it first, or give another {option}")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written ({error.strerror}): give another {option}") from error


def _write(result: Recommendation, path: Path, *, force: bool) -> None:
    document = fit_file_document(result)
    document["autotune"] = importlib.metadata.version("autotune-qlora") if _packaged() else None
    write_fit(path, document, force=force)
    trainer = "trl" if result.request.start.trainer is Trainer.TRL else "transformers"
    say(f"Written to {path}. Next: autotune export {path} --to {trainer}")


def _write_plot(result: Recommendation, path: Path, *, force: bool) -> None:
    """Memory and speed of the frontier, as SVG."""
    from autotune.predict.plot import svg_of_sweep

    points = [
        (row.sequence_length, row.memory_bytes / GIB if row.memory_bytes else None, row.tokens_per_second, is_measured)
        for row in result.frontier
        for is_measured in [row.origin == "measured"]
    ]
    title = f"{result.request.model.name} on {result.device.name}: the fastest config at each length"
    hollow = "predicted, without a speed not to fit; filled: measured"
    picture = svg_of_sweep(points, x_name="sequence length, tokens", title=title, hollow=hollow)
    write_file(path, picture, force=force)
    say(f"Written to {path}.")


def _packaged() -> bool:
    try:
        importlib.metadata.version("autotune-qlora")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
