"""Stand-ins for Liger's Triton kernels in a dry run: what they allocate, save, overwrite and move, without the package.

As liger-kernel 0.8.5 is put in place by transformers' `use_liger_kernel=True`, by default everything it has for an
architecture: RMSNorm, SwiGLU or GEGLU, rotary embedding, and the head fused with the cross-entropy. A kernel is one
operator of our own library, so a tracer sees its inputs and outputs alone; products of matrices are torch's.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any
from unittest import mock

import torch
from torch import library
from torch.nn import functional

from autotune.predict import autocast
from autotune.predict.kernels import KernelSet
from autotune.workload import loss as loss_paths
from autotune.workload.build import UnsupportedModel
from autotune.workload.loss import IGNORED


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """What Liger replaces in one architecture (transformers/monkey_patch.py, the defaults of its functions)."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")  # in each layer
    offset: float = 0.0  # Gemma's norms multiply by 1 + weight
    in_place: bool = True  # the gradient of a layer's norm overwrites the one that comes in
    last_in_place: bool = True  # the same of the norm after the layers
    gelu: bool = False  # GEGLU; else SwiGLU
    rope: bool = True
    fused_loss: bool = True  # else the plain cross-entropy, in place in the float32 logits


_HEADS = ("self_attn.q_norm", "self_attn.k_norm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_GEMMA2 = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_LLAMA = Patches()
ARCHITECTURES = {
    "exaone4": Patches(norms=_AFTER + _HEADS, in_place=False, last_in_place=False),
    "gemma": Patches(offset=1.0, gelu=True),
    "gemma2": Patches(norms=_GEMMA2, offset=1.0, in_place=False, last_in_place=False, gelu=True),
    "gemma3_text": Patches(norms=_GEMMA2 + _HEADS, offset=1.0, in_place=False, last_in_place=False, gelu=True),
    "glm4": Patches(
        norms=(*_LLAMA.norms, "post_self_attn_layernorm", "post_mlp_layernorm"),
        in_place=False,
        last_in_place=False,
        rope=False,
    ),
    "granite": Patches(fused_loss=False),  # whose logits are scaled
    "hunyuan_v1_dense": _LLAMA,
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": Patches(norms=_AFTER, in_place=False),
    "olmo3": Patches(norms=_AFTER, in_place=False),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Patches(norms=_LLAMA.norms + _HEADS),
    "smollm3": _LLAMA,
}
#: Causal language models that Liger knows too: experts, state spaces, their own activations.
_UNTRACED = {
    "deepseek_v2", "deepseek_v3", "deepseek_v4", "falcon_h1", "gemma4_text", "gpt_oss", "hunyuan_v1_moe",
    "llama4_text", "mixtral", "muse_glimmer", "nemotron", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe",
    "qwen3_next",
}  # fmt: skip


@contextlib.contextmanager
def stand_ins(kind: str, kernels: KernelSet) -> Iterator[None]:
    """While it lasts, a step with `loss: liger` for this architecture is made of stand-ins.

    Raises `UnsupportedModel` where Liger has no kernels for it: the Trainer would train on without a word.
    """
    if kernels.kind != "cuda":
        raise UnsupportedModel("loss liger needs a GPU: its kernels are written in Triton")
    if kind not in ARCHITECTURES:
        why = "cannot be predicted" if kind in _UNTRACED else "does nothing"
        raise UnsupportedModel(f"loss liger {why} for the architecture {kind}")
    with contextlib.ExitStack() as stack:
        put = functools.partial(_put_in_place, stack, ARCHITECTURES[kind])
        stack.enter_context(mock.patch.object(loss_paths, "apply_liger", put))
        yield


def _put_in_place(stack: contextlib.ExitStack, patches: Patches, model: Any) -> None:
    """As liger_kernel's `_apply_liger_kernel_to_instance`; what is global there ends with `stack`."""
    base = getattr(model, model.base_model_prefix)
    _bind_norm(base.norm, patches.offset, patches.last_in_place)
    for layer in base.layers:
        for name in patches.norms:
            _bind_norm(layer.get_submodule(name), patches.offset, patches.in_place)
        forward = _joined_gates if hasattr(layer.mlp, "gate_up_proj") else _gates
        layer.mlp.forward = MethodType(functools.partial(forward, patches.gelu), layer.mlp)
    if patches.rope:
        stack.enter_context(mock.patch.object(sys.modules[type(model).__module__], "apply_rotary_pos_emb", rotate))
    if patches.fused_loss:
        model.forward = MethodType(_forward, model)
    else:
        stack.enter_context(mock.patch.object(functional, "cross_entropy", cross_entropy))


def _bind_norm(module: Any, offset: float, in_place: bool) -> None:
    eps = getattr(module, "variance_epsilon", None) or module.eps

    def forward(self: Any, hidden: torch.Tensor) -> Any:
        return Norm.apply(hidden, self.weight, eps, offset, in_place)  # type: ignore[no-untyped-call]

    module.forward = MethodType(forward, module)


def _gates(gelu: bool, mlp: Any, x: torch.Tensor) -> Any:
    return mlp.down_proj(Gate.apply(mlp.gate_proj(x), mlp.up_proj(x), gelu))  # type: ignore[no-untyped-call]


def _joined_gates(gelu: bool, mlp: Any, x: torch.Tensor) -> Any:
    up = mlp.gate_up_proj(x)
    gate, up = up.chunk(2, dim=-1)
    return mlp.down_proj(Gate.apply(gate, up, gelu))  # type: ignore[no-untyped-call]


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
    """transformers' `apply_rotary_pos_emb`."""
    return Rotation.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]


def cross_entropy(
    input: torch.Tensor, target: torch.Tensor, *, ignore_index: int = IGNORED, reduction: str = "mean"
) -> Any:
    """`functional.cross_entropy` as transformers calls it."""
    return CrossEntropy.apply(input, target, reduction)  # type: ignore[no-untyped-call]


def _forward(
    self: Any,
    labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | None = None,
    skip_logits: bool | None = None,
    **inputs: Any,
) -> Any:
    """The causal model's forward: no logits in training, nor where it is told so."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if labels is None or not (self.training if skip_logits is None else skip_logits):
        return type(self).forward(self, labels=labels, num_items_in_batch=num_items_in_batch, **inputs)
    outputs = self.base_model(**inputs)
    hidden = outputs[0]  # (B, T, H), alive as long as `outputs`
    loss = _fused_loss(self, hidden.view(-1, hidden.size(-1)), labels, num_items_in_batch)
    return CausalLMOutputWithPast(loss=loss, past_key_values=outputs.past_key_values)


def _fused_loss(model: Any, hidden: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | None) -> Any:
    labels = functional.pad(labels, (0, 1), value=IGNORED)
    shifted = labels[..., 1:].contiguous()  # token < n predicts n; `labels` stays until the loss is there
    cap = getattr(model.config, "final_logit_softcapping", None)
    reduction = "mean" if items is None else "sum"
    loss = FusedLoss.apply(hidden, model.lm_head.weight, shifted.view(-1), reduction, cap)  # type: ignore[no-untyped-call]
    return loss if items is None else loss / items


class Norm(torch.autograd.Function):
    """ops/rms_norm.py: keeps its input and one float32 a row; the output has the input's dtype. The weight is frozen
    (a trained one would add its gradient's float32 sums, one row a multiprocessor)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, in_place: bool) -> Any:
        x = x.contiguous()
        rows = x.view(-1, x.size(-1))
        out, scale = _ops.norm(rows, weight, eps, offset)
        ctx.save_for_backward(rows, weight, scale)
        ctx.offset, ctx.in_place = offset, in_place
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        rows, weight, scale = ctx.saved_tensors
        grad = grad.contiguous()
        incoming = grad.view(rows.shape)
        made = incoming if ctx.in_place else torch.zeros_like(incoming)
        _ops.norm_backward(made, None if ctx.in_place else incoming, rows, weight, scale, ctx.offset)
        return made.view(grad.shape), None, None, None, None


class Gate(torch.autograd.Function):
    """ops/swiglu.py and geglu.py: activation(gate) · up. Keeps both, and their gradients overwrite them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        out: torch.Tensor = _ops.gate(gate, up, gelu)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        _ops.gate_backward(gate, up, grad.contiguous(), ctx.gelu)
        return gate, up, None


class Rotation(torch.autograd.Function):
    """ops/rope.py: queries and keys (B, heads, T, D) are rotated where they are, and so are their gradients."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return *_rotated(q, k, cos, sin, True), None, None


def _rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> Any:
    q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()  # (B, T, heads, D)
    _ops.rotate(q, k, cos, sin, back)
    return q.transpose(1, 2), k.transpose(1, 2)


class CrossEntropy(torch.autograd.Function):
    """ops/cross_entropy.py: the gradient overwrites the logits (B·T, V) in forward."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
        losses = torch.zeros(logits.size(0), dtype=logits.dtype, device=logits.device)
        mask = target != IGNORED
        items = mask.sum().item()
        (target * mask).max(), (target * mask).min()  # it asks whether they are in the vocabulary
        _ops.cross_entropy(logits, target, losses, 1 / items if reduction == "mean" else 1.0, None)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits.detach())
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (logits,) = ctx.saved_tensors
        return _ops.multiply(logits, grad), None, None


class FusedLoss(torch.autograd.Function):
    """ops/fused_linear_cross_entropy.py: logits of one chunk of tokens at a time, and the gradients, in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, reduction: str, cap: float | None
    ) -> torch.Tensor:
        """(B·T, H), (V, H), (B·T,) → (), float32."""
        tokens, device = hidden.size(0), hidden.device
        size = chunk_tokens(tokens, weight.size(0), hidden.size(1))
        for_hidden = torch.zeros_like(hidden)
        trains_head = ctx.needs_input_grad[0] and ctx.needs_input_grad[1]
        for_weight = torch.zeros_like(weight) if trains_head else None
        losses = torch.zeros(tokens, dtype=torch.float32, device=device)
        mask = target != IGNORED
        scale = 1 / mask.sum().item() if reduction == "mean" else 1.0
        kept = None  # one buffer for the logits of every chunk
        if hidden.dtype == weight.dtype and autocast.current_dtype() in (None, hidden.dtype):
            kept = torch.empty((size, weight.size(0)), dtype=hidden.dtype, device=device)
        for start in range(0, tokens, size):
            chunk = slice(start, min(start + size, tokens))
            if kept is None:
                logits = hidden[chunk] @ weight.t()
            else:
                logits = kept[: chunk.stop - start]
                torch.mm(hidden[chunk], weight.t(), out=logits)
            _ops.cross_entropy(logits, target[chunk], losses[chunk], scale, cap)
            if ctx.needs_input_grad[0]:
                _add_products(logits, hidden[chunk], weight, for_hidden[chunk], for_weight, kept is not None)
            del logits
        del kept
        ctx.save_for_backward(for_hidden, for_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        made = [None if one is None else _ops.multiply(one, grad) for one in ctx.saved_tensors]
        return *made, None, None, None


def chunk_tokens(tokens: int, vocab: int, hidden: int) -> int:
    """Tokens of one chunk, so that its logits take about what the hidden states do: a power of two, or all of them."""
    share = -(-tokens // -(-vocab // hidden))
    return min(1 << (share - 1).bit_length(), tokens)


def _add_products(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    for_hidden: torch.Tensor,
    for_weight: torch.Tensor | None,
    in_place: bool,
) -> None:
    """A chunk's gradients of the hidden states and of the head. The branches are those of compute capability 8."""
    if in_place:
        torch.mm(grad, weight, out=for_hidden)
    else:
        for_hidden.copy_(grad @ weight)
    if for_weight is None:
        return
    if grad.dtype == for_weight.dtype and grad.dtype != torch.float32:
        torch.addmm(for_weight, grad.t(), hidden.to(grad.dtype), out=for_weight)
    else:
        for_weight += torch.mm(grad.t(), hidden).float()


# The kernels. What a body makes is not traced: one operator, which reads and writes what it is given.

_library = library.Library("autotune_liger", "DEF")
_ops: Any = torch.ops.autotune_liger


def _kernel(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Arguments marked `!` are written to, past autograd's eyes, as Triton writes."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        name = _library.define(schema)
        _library.impl(name, body, "CompositeExplicitAutograd")
        return body

    return register


@_kernel("norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)")
def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> Any:
    scale = torch.rsqrt(x.float().square().mean(-1) + eps)
    return (x.float() * scale[:, None] * (offset + weight.float())).to(x.dtype), scale


@_kernel(
    "norm_backward(Tensor(a!) made, Tensor? grad, Tensor x, Tensor weight, Tensor scale, float offset) -> Tensor(a!)"
)
def _norm_backward(
    made: torch.Tensor,
    grad: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: float,
) -> torch.Tensor:
    weighted = (made if grad is None else grad).float() * (offset + weight.float())
    normal = x.float() * scale[:, None]
    made.data.copy_(scale[:, None] * (weighted - normal * (weighted * normal).mean(-1, keepdim=True)))
    return made


@_kernel("gate(Tensor gate, Tensor up, bool gelu) -> Tensor")
def _gate(gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    active = functional.gelu(gate.float(), approximate="tanh") if gelu else functional.silu(gate.float())
    return active.to(up.dtype) * up


@_kernel("gate_backward(Tensor(a!) gate, Tensor(b!) up, Tensor grad, bool gelu) -> (Tensor(a!), Tensor(b!))")
def _gate_backward(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, gelu: bool) -> Any:
    wide = grad.float()
    aten = torch.ops.aten
    if gelu:
        for_gate = aten.gelu_backward(wide * up, gate.float(), approximate="tanh")
    else:
        for_gate = aten.silu_backward(wide * up, gate.float())
    up.data.copy_(wide * _gate(gate, torch.ones_like(wide), gelu))
    gate.data.copy_(for_gate)
    return gate, up


@_kernel("rotate(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool back) -> (Tensor(a!), Tensor(b!))")
def _rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> Any:
    half = cos.size(-1) // 2  # the width may be less than a head's
    cos, sin = cos[..., None, :half], sin[..., None, :half] * (-1 if back else 1)  # (B or 1, T, 1, D / 2)
    for x in (q, k):
        one, two = x.data[..., :half], x.data[..., half : 2 * half]
        turned = one * cos - two * sin, two * cos + one * sin
        one.copy_(turned[0]), two.copy_(turned[1])
    return q, k


@_kernel(
    "cross_entropy(Tensor(a!) logits, Tensor target, Tensor(b!) losses, float scale, float? cap) -> "
    "(Tensor(a!), Tensor(b!))"
)
def _cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, losses: torch.Tensor, scale: float, cap: float | None
) -> Any:
    wide = logits.float()
    capped = cap * torch.tanh(wide / cap) if cap else wide
    learned = (target != IGNORED)[:, None] * scale
    place = target.clamp(min=0)[:, None]
    likely = functional.log_softmax(capped, dim=-1)
    losses.data.copy_((-likely.gather(1, place) * learned)[:, 0])
    grad = (likely.exp() - torch.zeros_like(likely).scatter(1, place, 1.0)) * learned
    logits.data.copy_(grad * (1 - (capped / cap) ** 2) if cap else grad)
    return logits, losses


@_kernel("multiply(Tensor(a!) x, Tensor factor) -> Tensor(a!)")
def _multiply(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    x.data.mul_(factor)
    return x
