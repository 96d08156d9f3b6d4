"""Liger's stand-ins against plain torch, against a count by hand, and in whole steps, with no package to import."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from autotune.predict import autocast, liger, tracing
from autotune.predict.dryrun import DryRun
from autotune.predict.kernels import CPU
from autotune.predict.memory import rounded
from autotune.predict.tracer import Birth, Death, Stretch, Tracer, Work
from autotune.values import GIB
from autotune.workload import loss
from autotune.workload.build import UnsupportedModel
from tests.test_predict_dryrun import BASE, CHANGES, CUDA, a_dry_config, a_model, both_bytes, peak_of

OWN: dict[str, dict[str, Any]] = {
    **CHANGES,
    "exaone4": {"sliding_window": 64, "sliding_window_pattern": 4},
    "glm4": {"pad_token_id": 0},
    "hunyuan_v1_dense": {"head_dim": 32},
    "ministral": {"head_dim": 32},
    "smollm3": {"pad_token_id": 0},
}


@pytest.fixture(autouse=True)
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)


@pytest.mark.parametrize("kind", liger.ARCHITECTURES)
def test_loss_and_gradients_are_those_of_plain_torch(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**BASE, "num_hidden_layers": 2, "vocab_size": 512, **OWN.get(kind, {})})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    for name, parameter in model.named_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        parameter.requires_grad_(not name.endswith("norm.weight"))
    labels = torch.randint(0, 512, (2, 50))
    labels[0, :9] = loss.IGNORED

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        result = model(input_ids=labels.clamp(min=0), labels=labels, num_items_in_batch=torch.tensor(70))["loss"]
        result.backward()
        return [result.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    plain = step()
    with contextlib.ExitStack() as stack:
        liger._put_in_place(stack, liger.ARCHITECTURES[kind], model)
        torch.testing.assert_close(step(), plain, rtol=1e-3, atol=1e-4)


TOKENS, HIDDEN, VOCAB = 1000, 64, 640


@pytest.mark.parametrize(
    ("trains_head", "dtype", "chunk_bytes"),
    [
        (False, torch.bfloat16, 128 * VOCAB * 2),  # logits
        (True, torch.bfloat16, 128 * VOCAB * 2 + VOCAB * HIDDEN * 2),  # the head's gradient
        # Autocast casts the head for each product; its product is copied into the float32 gradient.
        (False, torch.float32, 128 * VOCAB * 2 + VOCAB * HIDDEN * 2 + 128 * HIDDEN * 2),
    ],
)
def test_fused_loss_keeps_one_chunk_of_logits(trains_head: bool, dtype: torch.dtype, chunk_bytes: int) -> None:
    hidden = torch.empty(TOKENS, HIDDEN, dtype=dtype, device="meta", requires_grad=True)
    head = torch.empty(VOCAB, HIDDEN, dtype=dtype, device="meta", requires_grad=trains_head)
    labels = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    tracer = Tracer(CUDA, vocab_size=VOCAB)
    tracer.see([hidden, head, labels])
    tracer.start(("begin", None))
    assert liger.chunk_tokens(TOKENS, VOCAB, HIDDEN) == 128  # ten shares of 100 tokens, the next power of two
    with tracer, autocast.autocast(torch.bfloat16, "cuda"):
        liger.FusedLoss.apply(hidden, head, labels, "sum", None)
    peak = peak_live_bytes(tracer.stretches)
    kept = TOKENS * HIDDEN * dtype.itemsize + TOKENS * 4 + TOKENS  # gradient, losses, mask
    assert peak == pytest.approx(kept + chunk_bytes, abs=3 * 512)
    works = [event for event in tracer.stretches[0].events if isinstance(event, Work)]
    assert sum(work.flops for work in works) == (3 if trains_head else 2) * 2 * TOKENS * VOCAB * HIDDEN


def peak_live_bytes(stretches: list[Stretch]) -> int:
    """Of storages born there, each rounded up to 512 B."""
    sizes: dict[int, int] = {}
    live = peak = 0
    for event in (event for stretch in stretches for event in stretch.events):
        if isinstance(event, Birth):
            sizes[event.storage] = rounded(event.size_bytes)
            live += sizes[event.storage]
            peak = max(peak, live)
        elif isinstance(event, Death):
            live -= sizes[event.storage]
    return peak


@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_a_step_holds_no_logits_in_training_or_evaluation(checkpointing: str) -> None:
    source = a_model("llama", vocab_size=32768, num_hidden_layers=8)
    config = a_dry_config(loss="liger", gradient_checkpointing=checkpointing, sequence_length=1000)
    trace = tracing.make_trace(source, config, CUDA)
    assert trace.point == (2, 1000)
    logits = 2 * 1000 * 32768 * 2
    assert peak_of(trace.expand("evaluate", 2, 1000)) < logits / 10
    if checkpointing == "full":
        assert peak_of(trace.expand("first", 2, 1000)) < logits / 4
    every = tracing._traced(source, config, CUDA, [(2, 1000)], True)
    assert both_bytes(trace, config) == both_bytes(every, config)


LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def test_peaks_are_those_measured_with_the_fused_loss_and_a_plain_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """fms-acceleration's benchmarks, A100 80 GB: its kernels but Liger's fused loss; GiB at 4, 8 and 32 samples."""
    monkeypatch.setattr(
        liger, "_gates", lambda gelu, mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    )
    settings = {"loss": "liger", "attention": "flash_attention_2", "gradient_checkpointing": "full", "upcast": "none"}
    adapters = {"lora_rank": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    peaks = {}
    for batch, measured in ((4, 13.4), (8, 21.4), (32, 69.0)):
        config = a_dry_config(sequence_length=4096, micro_batch_size=batch, **settings, **adapters)
        peaks[batch], _ = both_bytes(tracing.make_trace(a_model("llama", **LLAMA3_8B), config, CUDA), config)
        assert peaks[batch] / GIB == pytest.approx(measured, rel=0.003)
    assert (peaks[32] - peaks[8]) / (24 * 4096) == pytest.approx(520_352, rel=0.001)  # bytes a token


@pytest.mark.parametrize(
    ("kind", "words"), [("stablelm", "does nothing for the architecture stablelm"), ("mixtral", "cannot be predicted")]
)
def test_an_architecture_without_kernels_is_refused(kind: str, words: str) -> None:
    attention = functional.scaled_dot_product_attention
    with pytest.raises(UnsupportedModel, match=f"^loss liger .*{words}"), liger.stand_ins(kind, CUDA):
        pass
    if kind in CHANGES:
        with pytest.raises(UnsupportedModel, match=words):
            DryRun(a_model(kind), a_dry_config(loss="liger"), CUDA)
    assert functional.scaled_dot_product_attention is attention


def test_the_cpu_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="needs a GPU"):
        DryRun(a_model("llama"), a_dry_config(loss="liger"), CPU)


def test_what_is_put_in_place_ends_with_the_dry_run() -> None:
    from transformers.models.granite import modeling_granite

    before = (functional.cross_entropy, modeling_granite.apply_rotary_pos_emb, loss.apply_liger)
    run = DryRun(a_model("granite"), a_dry_config(loss="liger"), CUDA)
    assert functional.cross_entropy is liger.cross_entropy
    run.close()
    assert (functional.cross_entropy, modeling_granite.apply_rotary_pos_emb, loss.apply_liger) == before


def test_a_probe_has_the_real_package(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = mock.Mock()
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, package)
    loss.apply_liger("model")
    package._apply_liger_kernel_to_instance.assert_called_once_with(model="model")
