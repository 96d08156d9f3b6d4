"""Makes the trace of a model with given settings on given kernels: dry runs at two points, distilled."""

from __future__ import annotations

import logging
from collections.abc import Callable
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
from autotune.predict.store import window_of
from autotune.predict.trace import Block, Loop, NotAlike, Resident, Trace
from autotune.values import LossPath, ModelSource, Trainer, TrainingConfig
from autotune.workload import loss as loss_paths

logger = logging.getLogger(__name__)

#: Prime multiples of 256 tokens and prime batches, so that a size tells which of them it is a multiple of.
_LONG = (256 * 101, 256 * 103)
_BATCHES = (97, 89)


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
    if config.loss is LossPath.LIGER:
        raise NotAlike("Liger's chunks are a power of two near the tokens of the batch over V / H")
    window = window_of(source)
    lengths = _LONG
    if window and config.sequence_length < window:
        lengths = (window * 53 // 128, window * 47 // 128)
        if config.loss is LossPath.CHUNKED:
            raise NotAlike("too few chunks below the window")
    if config.micro_batch_size == 1:
        return [(1, lengths[0]), (1, lengths[1])]
    return [(_BATCHES[0], lengths[0]), (_BATCHES[1], lengths[1])]


def _traced(
    source: ModelSource, config: TrainingConfig, kernels: KernelSet, points: list[tuple[int, int]], all_layers: bool
) -> Trace:
    run = DryRun(source, config, kernels, all_layers=all_layers)
    try:
        if len(points) > 1 and run.step._loss is loss_paths.chunked_loss:
            # Chunks are of constant size: a few are enough, where the class allows them.
            points = (
                [(b, t) for b, t in ((1, 256 * 7), (1, 256 * 11))]
                if config.micro_batch_size == 1
                else [(7, 256), (11, 256 * 3)]
            )
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
        hidden_size=int(getattr(run.step.model.config.get_text_config(), "hidden_size", 0)),
        chunk_tokens=chunk_tokens if len(points) > 1 else 0,
        point=points[0] if len(points) == 1 else None,
        paged_bytes=run.paged_bytes,
    )


def _chunks(run: DryRun, config: TrainingConfig) -> tuple[int, int]:
    """(tokens of one pass over the loss's chunks, chunks in it); (0, 0) where the loss has none."""
    loss: Any = run.step._loss
    if loss is loss_paths.chunked_loss:
        return loss_paths.CHUNK_TOKENS, 1
    if loss is loss_paths.trl_loss and config.trainer is Trainer.TRL:
        import trl.kernels.chunked_logprob as tiles
        import trl.trainer.utils as utils

        return tiles.TOKEN_CHUNK_SIZE, -(-run.step.vocab_size // utils._CHUNKED_LOGPROB_CHUNK_SIZE)
    return 0, 0
