"""The training step on `meta` under a tracer: one micro batch of each kind, an evaluation, the optimizer."""

from __future__ import annotations

import contextlib
import gc
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from autotune.predict import autocast
from autotune.predict.kernels import KernelSet
from autotune.predict.layers import Pattern, find_layers, find_pattern, keep_layers
from autotune.predict.patches import device_behaviour
from autotune.predict.trace import Resident
from autotune.predict.tracer import Stretch, Tracer
from autotune.values import Attention, LossPath, ModelSource, TrainingConfig
from autotune.workload import loss as loss_paths
from autotune.workload import prepare
from autotune.workload.build import UnsupportedModel, build_base
from autotune.workload.loss import Batch
from autotune.workload.step import TrainingStep, batch_of
from autotune.workload.tracking import model_tensors


@dataclass(slots=True)
class Point:
    """What one micro batch of (B, T) tokens did: stretches by program."""

    batch: int
    tokens: int
    programs: dict[str, list[Stretch]] = field(default_factory=dict)


class DryRun:
    """A model and settings ready to be traced at any micro batch size and sequence length.

    Raises `UnsupportedModel` for what cannot be built, and what a library raises for what does not trace.
    """

    def __init__(
        self,
        source: ModelSource,
        config: TrainingConfig,
        kernels: KernelSet,
        *,
        all_layers: bool = False,
        hidden_temporaries: bool = True,
    ) -> None:
        self.config = config
        self.kernels = kernels
        self._hidden = hidden_temporaries
        self._tracer: Tracer | None = None
        self._backward = False
        self.paged_bytes = 0
        with contextlib.ExitStack() as stack:  # where something raises, all that was put in place ends
            self._folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="autotune-dry-run-"))
            base = build_base(source, _buildable(config), torch.device("meta"))
            if config.attention is Attention.FLASH_ATTENTION_2:
                _check_flash(base.model, source)
            self.parameters = base.parameters
            self.unquantized_bytes = base.unquantized_bytes
            self.pattern = self._pattern(base.model, all_layers)
            self.loaded = _loaded(base.model, config)
            keep_layers(base.model, self.pattern)
            stack.enter_context(device_behaviour(kernels))
            if config.loss is LossPath.LIGER:
                from autotune.predict import liger

                stack.enter_context(liger.stand_ins(base.model.config.model_type, kernels))
            self.step = TrainingStep(
                base,
                _buildable(config),
                folder=self._folder,
                autocast=lambda dtype: autocast.autocast(dtype, kernels.kind),
            )
            self._stack = stack.pop_all()
        if config.attention.value == "flash_attention_2":
            _name_attention(base.model, "flash_attention_2")
        self._mark_layers(base.model)
        self._settle(base.model)

    def _settle(self, model: Any) -> None:
        """One micro batch before any is traced, where a first forward changes the model: bitsandbytes casts the
        biases of its layers once and for good."""
        if any(getattr(m, "bias", None) is not None and hasattr(m, "quant_state") for m in model.modules()):
            self._micro_batch(1, 256)
            self.step.model.zero_grad()

    def close(self) -> None:
        self._stack.close()

    def _pattern(self, model: Any, all_layers: bool) -> Pattern:
        try:
            _, _, layers = find_layers(model)
        except (LookupError, AttributeError):
            return Pattern(total=0, kept=0, head=0, period=0)
        mode = self.config.gradient_checkpointing
        if all_layers:
            return Pattern(total=len(layers), kept=len(layers), head=len(layers), period=0)
        every = int(mode.removeprefix("every_")) if mode.startswith("every_") else 1
        return find_pattern(layers, every=every, types=getattr(model.config, "layer_types", None))

    def _mark_layers(self, model: Any) -> None:
        """Begin a stretch where a layer's forward or backward begins."""
        if not self.pattern.total:
            return
        _, _, layers = find_layers(model)
        last = len(layers) - 1
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, i=index: self._mark(("forward", i)))
            layer.register_forward_hook(lambda *given, i=index: self._layer_done(i, i == last, given[-1]))
            if hasattr(layer, "_gradient_checkpointing_func"):
                whole: Any = layer
                whole._gradient_checkpointing_func = _recompute_with_autocast(whole._gradient_checkpointing_func)

    def _layer_done(self, index: int, last: bool, output: Any) -> None:
        if self._backward or self._tracer is None:
            return
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(lambda *_: self._mark(("backward", index), in_backward=True))
        if last:
            self._mark(("forward_end", None))

    def _mark(self, label: tuple[str, int | None], *, in_backward: bool = False) -> None:
        if self._tracer is not None and (in_backward or not self._backward):
            self._tracer.start(label)

    def trace(self, batch: int, tokens: int, *, accumulates: bool, evaluates: bool) -> Point:
        """Programs `first` (no gradients before), `next` (gradients exist) and `evaluate` at (B, T)."""
        point = Point(batch, tokens)
        point.programs["first"] = self._micro_batch(batch, tokens)
        if accumulates:
            point.programs["next"] = self._micro_batch(batch, tokens)
        self.step.model.zero_grad()
        if evaluates:
            point.programs["evaluate"] = self._evaluation(batch, tokens)
        return point

    def _new_tracer(self) -> Tracer:
        tracer = Tracer(self.kernels, vocab_size=self.step.vocab_size, hidden_temporaries=self._hidden)
        tracer.see(model_tensors(self.step.model))
        tracer.see(self.step.optimizer_tensors())
        tracer.start(("begin", None))
        return tracer

    def _micro_batch(self, batch: int, tokens: int) -> list[Stretch]:
        tracer = self._tracer = self._new_tracer()
        gc.disable()
        try:
            with tracer, self._chunk_marks(tracer):
                self._run_micro_batch(batch, tokens)
                tracer.start(("end", None))
        finally:
            gc.enable()
            self._tracer, self._backward = None, False
        return tracer.stretches

    def _run_micro_batch(self, batch: int, tokens: int) -> None:
        made = self._batch(batch, tokens)
        items = torch.zeros((), dtype=torch.int64, device="meta")
        self.step.micro_batch(made, items, phase=self._phase)

    def _batch(self, batch: int, tokens: int) -> Batch:
        ids = torch.empty((batch, tokens), dtype=torch.int64, device="meta")
        return batch_of(ids, padding_free=self.config.is_padding_free)

    def _phase(self, name: str) -> None:
        if name == "backward":
            self._mark(("backward_begin", None))
            self._backward = True

    def _evaluation(self, batch: int, tokens: int) -> list[Stretch]:
        tracer = self._tracer = self._new_tracer()
        self.step.model.eval()
        try:
            with tracer, self._chunk_marks(tracer), torch.no_grad():
                self._run_evaluation(batch, tokens)
                tracer.start(("end", None))
        finally:
            self.step.model.train()
            self._tracer = None
        return tracer.stretches

    def _run_evaluation(self, batch: int, tokens: int) -> None:
        made = self._batch(batch, tokens)
        items = torch.zeros((), dtype=torch.int64, device="meta")
        with self.step._loss_context():
            self.step._loss(self.step.model, made, items)

    @contextlib.contextmanager
    def _chunk_marks(self, tracer: Tracer) -> Iterator[None]:
        """Begin a stretch where the loss begins with another chunk of tokens."""
        counts = {"forward": 0, "backward": 0}

        def mark(index: int | None = None) -> int:
            way = "backward" if self._backward else "forward"
            index = counts[way] if index is None else index
            counts[way] += 1
            tracer.start((f"{way}_chunk", index))
            return index

        with contextlib.ExitStack() as stack:
            if self.step._loss is loss_paths.chunked_loss:
                stack.enter_context(mock.patch.object(loss_paths, "checkpoint", _marked_checkpoint(mark)))
            elif self.step._loss is loss_paths.trl_loss:
                _mark_trl(stack, mark, self.kernels)
            yield

    def adapters(self) -> list[int]:
        """Bytes of each trainable tensor of the whole model."""
        return [p.untyped_storage().nbytes() for _, p in self._trainable()]

    def _trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        named = [(n, p) for n, p in self.step.model.named_parameters() if p.requires_grad]
        return _repeated(named, self.pattern)

    def optimizer(self, steps: int = 2) -> list[list[Stretch]]:
        """Births and deaths of `steps` optimizer steps over the parameters of the whole model, one list a step."""
        shapes = tuple((tuple(p.shape), p.dtype) for _, p in self._trainable())
        key = (self.config.optimizer, self.kernels, shapes, steps)
        if key not in _optimizer_steps:  # alike for every other setting of a model
            parameters = [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape, dtype in shapes]
            _optimizer_steps[key] = (_trace_optimizer(self, parameters, steps), self.paged_bytes)
        traced, self.paged_bytes = _optimizer_steps[key]
        return traced


def _buildable(config: TrainingConfig) -> TrainingConfig:
    """The config with an attention that can be built without its package: eager, which every model has."""
    if config.attention is Attention.FLASH_ATTENTION_2:
        return replace(config, attention=Attention.EAGER)
    return config


def _check_flash(model: Any, source: ModelSource) -> None:
    if not getattr(model, "_supports_flash_attn", True):
        raise UnsupportedModel(
            f"transformers has no attention flash_attention_2 for {source.name}: give another", lacks="attention"
        )


def _name_attention(model: Any, name: str) -> None:
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation_internal = name


def _recompute_with_autocast(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointed call whose recomputation has the autocast that its forward had."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        dtype = autocast.current_dtype()
        if dtype is None:
            return checkpoint(function, *args, **kwargs)
        target = autocast.current_target()

        def again(*inner: Any, **named: Any) -> Any:
            with autocast.autocast(dtype, target):
                return function(*inner, **named)

        return checkpoint(again, *args, **kwargs)

    return run


def _marked_checkpoint(mark: Callable[..., int]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    rerun = _recompute_with_autocast(checkpoint)

    def marked(function: Any, *args: Any, **kwargs: Any) -> Any:
        index = mark()
        out = rerun(function, *args, **kwargs)
        if out.grad_fn is not None:
            out.grad_fn.register_prehook(lambda *_: _nothing(mark(index)))
        return out

    return marked


def _nothing(_: object) -> None:
    """A hook that gives anything back would replace the gradient."""


def _mark_trl(stack: contextlib.ExitStack, mark: Callable[..., int], kernels: KernelSet) -> None:
    """trl's tiles: on a card each is one Triton kernel, which allocates nothing."""
    import trl.kernels.chunked_logprob as tiles
    import trl.trainer.utils as utils

    for name in ("_forward_tile", "_backward_tile"):
        original = getattr(tiles, name)
        silent = kernels.kind == "cuda"

        def tile(*args: Any, _original: Any = original, _silent: bool = silent, **kwargs: Any) -> Any:
            mark()
            return None if _silent else _original(*args, **kwargs)

        stack.enter_context(mock.patch.object(tiles, name, tile))
    if kernels.kind == "cuda":
        stack.enter_context(mock.patch.object(utils, "_use_triton", return_value=True))


def _loaded(model: Any, config: TrainingConfig) -> list[Resident]:
    """Every tensor of the whole base model in the order of its modules, before and after its dtypes were prepared."""
    found: list[tuple[Any, str, int]] = []
    seen: set[int] = set()

    def add(tensor: Any, part: str, load_bytes: int = 0) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            found.append((tensor, part, load_bytes))

    width = torch.empty((), dtype=getattr(torch, config.compute_dtype)).element_size()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)
            add(parameter, "base weights", state.shape.numel() * width if state is not None else 0)
            while state is not None:
                for tensor in (state.absmax, state.code, state.offset):
                    add(tensor, "quantisation state")
                state = state.state2
        for buffer in module.buffers(recurse=False):
            add(buffer, "base weights")
    before = [tensor.untyped_storage().nbytes() for tensor, _, _ in found]
    prepare.upcast_parameters(model, config)
    return [
        Resident(
            tensor.untyped_storage().nbytes(), part, load, 0 if tensor.untyped_storage().nbytes() == size else size
        )
        for (tensor, part, load), size in zip(found, before, strict=True)
    ]


def _repeated(named: list[tuple[str, Any]], pattern: Pattern) -> list[tuple[str, Any]]:
    """Parameters of the whole model, from those of the kept layers, in the model's order."""
    if not pattern.period:
        return named
    middle: list[tuple[str, Any]] = []
    out: list[tuple[str, Any]] = []
    for name, parameter in named:
        found = re.search(r"\.(\d+)\.", name)
        index = int(found.group(1)) if found else -1
        if pattern.head <= index < pattern.head + pattern.period:
            middle.append((name, parameter))
            continue
        if middle:
            out += middle * pattern.repeats
            middle = []
        out.append((name, parameter))
    return out + middle * pattern.repeats


_optimizer_steps: dict[Any, tuple[list[list[Stretch]], int]] = {}


def _trace_optimizer(run: DryRun, parameters: list[torch.nn.Parameter], steps: int) -> list[list[Stretch]]:
    from autotune.workload.step import MAX_GRAD_NORM

    holder = torch.nn.ParameterList(parameters)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    traced = []
    tracer = Tracer(run.kernels, vocab_size=-1, hidden_temporaries=run._hidden)
    paged = _Paged(tracer)
    tracer.see(parameters)
    tracer.see([p.grad for p in parameters if p.grad is not None])
    with tracer, paged.in_place():
        tracer.start(("optimizer", None))
        optimizer = prepare.make_optimizer(holder, run.config, torch.device("meta"), run._folder)
        for step in range(steps):
            if step:
                tracer.stretches = []
                tracer.start(("optimizer", None))
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            traced.append(tracer.stretches)
    run.paged_bytes = paged.size_bytes
    return traced


class _Paged:
    """bitsandbytes' paged optimizer state: managed memory, which no allocator counts."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self.size_bytes = 0

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        import bitsandbytes.functional as kernels

        with (
            mock.patch.object(kernels, "get_paged", self._get),
            mock.patch.object(kernels, "fill", return_value=None),
        ):
            yield

    def _get(self, *shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        self.size_bytes += dtype.itemsize * math.prod(shape)
        with _disable_current_modes():
            made = torch.empty(shape, dtype=dtype, device="meta")
        self._tracer.see([made])
        return made
