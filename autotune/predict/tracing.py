"""Makes the trace of a model with given settings on given kernels: dry runs at two points, distilled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autotune.predict.distill import (
    SizeTable,
    check_repeats,
    chunk_loop,
    compress_chunks,
    fit,
    raw_blocks,
    without_accumulation,
)
from autotune.predict.dryrun import DryRun, Point
from autotune.predict.kernels import KernelSet
from autotune.predict.store import TRL_TILE, in_one_tile, window_of
from autotune.predict.trace import Block, Loop, NotAlike, Resident, Trace
from autotune.values import LossPath, ModelSource, Trainer, TrainingConfig
from autotune.workload import loss as loss_paths

logger = logging.getLogger(__name__)

_PRIMES = tuple(n for n in range(2, 600) if all(n % m for m in range(2, int(n**0.5) + 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Points:
    """Where a kind of loss is traced. Lengths are prime multiples of a unit that kernels round rows to, and batches
    are primes: a size then tells which product of them it is a multiple of."""

    unit: int = 256  # tokens
    lengths: tuple[int, int]
    batches: tuple[int, int] = (2, 5)  # of another ratio than any two lengths


_PLAIN = _Points(lengths=(101, 103), batches=(97, 89))
_IN_CHUNKS = _Points(lengths=(5, 7))  # chunks of 256 tokens: a few are enough
_IN_TILES = _Points(unit=TRL_TILE, lengths=(5, 7))
_ONE_TILE = {True: _Points(lengths=(11, 13)), False: _Points(lengths=(7, 3))}  # of one sample, of several


def make_trace(source: ModelSource, config: TrainingConfig, kernels: KernelSet, *, own_point: bool = False) -> Trace:
    """A trace for every B and T of the class of `config` (`store.class_of`), or for its own B and T alone: where that
    is asked for (`own_point`), or the course of the step depends on them.

    Raises `UnsupportedModel`, and what a library raises for what does not trace.
    """
    batch, tokens = config.micro_batch_size, config.sequence_length
    attempts: list[Callable[[], Trace]] = [
        lambda: _traced(source, config, kernels, _points(config, source), False),
        lambda: _traced(source, config, kernels, [(batch, tokens)], False),
        lambda: _traced(source, config, kernels, [(batch, tokens)], True),
    ]
    for attempt in attempts[1 if own_point else 0 : -1]:
        try:
            return attempt()
        except NotAlike as why:
            logger.debug("trace holds for one point alone: %s", why)
            continue
    return attempts[-1]()


def _points(config: TrainingConfig, source: ModelSource) -> list[tuple[int, int]]:
    """Two points of the config's class. Raises `NotAlike` for a class that has none."""
    if config.loss is LossPath.LIGER:
        raise NotAlike("Liger's chunks are a power of two near the tokens of the batch over V / H")
    of_one = config.micro_batch_size == 1
    points = _PLAIN
    if in_one_tile(config):
        points = _ONE_TILE[of_one]
    elif config.loss is LossPath.CHUNKED:
        points = _IN_TILES if config.trainer is Trainer.TRL else _IN_CHUNKS
    lengths = _lengths(points, config.sequence_length, window_of(source), may_grow=not in_one_tile(config))
    return list(zip((1, 1) if of_one else points.batches, lengths, strict=True))


def _lengths(points: _Points, tokens: int, window: int | None, *, may_grow: bool) -> tuple[int, int]:
    """Two lengths on the same side of a sliding window as `tokens`: the usual ones, or others."""
    usual = points.unit * points.lengths[0], points.unit * points.lengths[1]
    if window and tokens >= window and tokens % 16:
        raise NotAlike("masks are padded to rows of a multiple of 16")
    if not window or all((length >= window) == (tokens >= window) for length in usual):
        return usual
    units = (points.unit,) if tokens >= window else (points.unit, 128)  # rows are rounded to 128 at least
    for unit in units:
        if tokens >= window:
            found = [prime for prime in _PRIMES if unit * prime >= window and prime >= points.lengths[0]][:2]
        else:
            found = [prime for prime in _PRIMES if unit * prime < window][-2:]
        if may_grow and len(found) == 2:
            return unit * found[1], unit * found[0]
    raise NotAlike(f"no two lengths on this side of a window of {window} tokens")


def _traced(
    source: ModelSource, config: TrainingConfig, kernels: KernelSet, points: list[tuple[int, int]], all_layers: bool
) -> Trace:
    run = DryRun(source, config, kernels, all_layers=all_layers)
    try:
        traced = [run.trace(b, t, accumulates=False, evaluates=True) for b, t in points]
        return _distilled(run, config, points, traced)
    finally:
        run.close()


def _distilled(run: DryRun, config: TrainingConfig, points: list[tuple[int, int]], traced: list[Point]) -> Trace:
    table = SizeTable(points)
    pattern = run.pattern
    loops: dict[str, Loop] = {}
    if pattern.total:
        loops["layers"] = Loop(kept=pattern.kept, head=pattern.head, period=pattern.period, total=pattern.total)
    chunk_tokens, period = _chunks(run, config)
    programs: dict[str, list[Block]] = {}
    for name in traced[0].programs:
        raw = [raw_blocks(point.programs[name]) for point in traced]
        if chunk_tokens and len(points) > 1:
            loop = chunk_loop(raw[0], period)
            if loop is None or any(chunk_loop(other, period) is None for other in raw):
                raise NotAlike("too few chunks of the loss")
            raw = [compress_chunks(blocks, loop) for blocks in raw]
            loops["chunks"] = loop
        programs[name] = fit(raw, table, checkpointed=config.gradient_checkpointing != "off")
        if "layers" in loops and loops["layers"].period:
            check_repeats(programs[name], loops["layers"])
    programs["next"] = without_accumulation(programs["first"])
    constants = SizeTable([points[0]])
    constants.sizes = table.sizes
    constants._known = table._known
    optimizer = [fit([raw_blocks(step)], constants, checkpointed=False) for step in run.optimizer()]
    for step in optimizer:
        for block in step:
            block.parts = ["optimizer state" if part == "gradients" else part for part in block.parts]
    residents = list(run.loaded) + [Resident(size, "adapters") for size in run.adapters()]
    return Trace(
        sizes=table.sizes,
        programs=programs,
        optimizer=optimizer,
        residents=residents,
        loops=loops,
        parameters=run.parameters,
        unquantized_bytes=run.unquantized_bytes,
        vocab_size=run.step.vocab_size,
        chunk_tokens=chunk_tokens if len(points) > 1 else 0,
        point=points[0] if len(points) == 1 else None,
        is_of_one=points[0][0] == 1,
        paged_bytes=run.paged_bytes,
    )


def _chunks(run: DryRun, config: TrainingConfig) -> tuple[int, int]:
    """(tokens of one pass over the loss's chunks, chunks in it); (0, 0) where the loss has none."""
    loss: Any = run.step._loss
    if loss is loss_paths.chunked_loss:
        return loss_paths.CHUNK_TOKENS, 1
    if loss is loss_paths.trl_loss and not in_one_tile(config):
        import trl.kernels.chunked_logprob as tiles
        import trl.trainer.utils as utils

        return tiles.TOKEN_CHUNK_SIZE, -(-run.step.vocab_size // utils._CHUNKED_LOGPROB_CHUNK_SIZE)
    return 0, 0
