"""What `autotune fit` does once its options are parsed: join the rooms, run the flow, print."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import click

from autotune.cli.bench import LEARNED_FROM, open_bench, optional_packages, read_checked_environment, stop_flag
from autotune.cli.fit_dataset import Dataset, dataset_document, read_dataset, with_dataset
from autotune.cli.fit_files import check_files, write_files
from autotune.cli.fit_nothing import nothing_fits_line
from autotune.cli.fit_request import build_request, choose_device, defaults_for
from autotune.consent import consents
from autotune.errors import NothingFits
from autotune.frontier import BUDGET_S, KNOWN_BUDGET_S, candidates_of, frontier
from autotune.probe.predictor import FitPredictor
from autotune.recommendation import closest_trial, fit_document
from autotune.search.space import build_space
from autotune.tuner import fit, observe
from autotune.values import Device, FitRequest, FitStatus, Recommendation
from gpu_db.store import GpuStore
from strategies import LADDER


def run(options: dict[str, Any]) -> None:
    """Fit and print. Raises `AutotuneError`; `NothingFits` after the result is printed."""
    dataset = read_dataset(options["dataset"], options["tokenizer"])
    check_files(options)
    device = choose_device(options["gpu"], options["python"])
    request, headroom = build_request(options, device)
    request = with_dataset(request, dataset)
    with stop_flag() as stopped:  # until here a signal ends the command at once: nothing is measured yet
        result = _fit(request, device, headroom, options, stopped)
    _report(result, dataset, options)


def _fit(
    request: FitRequest, device: Device, headroom: int, options: dict[str, Any], stopped: Callable[[], bool]
) -> Recommendation:
    from autotune.cli.progress import FitProgress

    environment = read_checked_environment(device, options["python"])
    installed = optional_packages(options["python"])
    build_space(request, device, installed=installed)  # refuses an empty one before anything is written
    progress = FitProgress(device, request)
    with open_bench(request, device, headroom, environment, options, stopped, progress) as bench:
        result = fit(
            request,
            device,
            bench.seams,
            ladder=LADDER,
            installed=installed,
            headroom_bytes=headroom,
            fresh=options["fresh"],
            max_probes=options["max_probes"] or defaults_for(device).max_probes,
            tolerance=options["tolerance"],
            budget_s=options["budget"],
        )
        result = _with_consents(result, bench.predictor, installed)
        return _with_frontier(result, bench.store, bench.predictor, installed)


def _with_consents(result: Recommendation, predictor: FitPredictor | None, installed: frozenset[str]) -> Recommendation:
    """Where nothing fits, the result with what each consent that is left would bring."""
    if result.status is not FitStatus.NOTHING_FITS or predictor is None:
        return result
    device = result.device
    observed = [observe(trial, on_cpu=device.kind == "cpu") for trial in result.trials]
    found = consents(result.request, device, observed, predictor, ladder=LADDER, installed=installed)
    return dataclasses.replace(result, consents=found)


def _with_frontier(
    result: Recommendation, store: GpuStore, predictor: FitPredictor | None, installed: frozenset[str]
) -> Recommendation:
    """The result with the fastest config at other lengths, from what is stored and what traces at hand predict."""
    stored = store.trials(model_fingerprint=result.request.model.fingerprint, latest=LEARNED_FROM)
    space = build_space(result.request, result.device, installed=installed)
    candidates = candidates_of(space, result.trials)
    budget_s = KNOWN_BUDGET_S if result.from_database else BUDGET_S
    rows, left_out = frontier(result, stored, candidates, predictor, monotonic=time.monotonic, budget_s=budget_s)
    return dataclasses.replace(result, frontier=rows, notes=(*left_out, *result.notes))


def _report(result: Recommendation, dataset: Dataset | None, options: dict[str, Any]) -> None:
    """The files where asked, the result to stdout. Raises `NothingFits`."""
    try:
        write_files(result, options)
    finally:  # a result that cannot be written is shown; one that cannot be shown is written
        _print(result, dataset, options)
    if result.status is not FitStatus.FITTED:
        raise NothingFits(nothing_fits_line(result), closest=closest_trial(result))


def _print(result: Recommendation, dataset: Dataset | None, options: dict[str, Any]) -> None:
    from autotune.cli.fit_text import print_fit, time_of_training

    training = time_of_training(result, dataset.facts if dataset else None, options["epochs"])
    if options["as_json"]:
        document = fit_document(result)
        if dataset:
            document["dataset"] = dataset_document(dataset, result.request.lengths)
        if training:
            document["training"] = training
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        print_fit(result, training)
