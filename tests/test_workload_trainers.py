"""The step takes the memory of the real trainers: peak of live tensor bytes, on the CPU, on one model from disk."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.values import (
    TRAINER_ADAPTER_DTYPE,
    TRAINER_LOSS,
    TRAINER_UPCAST,
    ModelSource,
    Trainer,
    TrainingConfig,
    Upcast,
)
from autotune.workload.build import build_base, quantization_config
from autotune.workload.step import TrainingStep
from autotune.workload.tracking import LiveBytes, model_tensors

pytestmark = pytest.mark.slow

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
TOKENS = 256
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit checkpoint of random weights, as a user would have it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG), dtype=torch.bfloat16).save_pretrained(path)
    return path


def config_of(trainer: Trainer, micro: int, checkpointing: str) -> TrainingConfig:
    return TrainingConfig(
        sequence_length=TOKENS,
        micro_batch_size=micro,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        trainer=trainer,
        upcast=TRAINER_UPCAST[trainer],
        adapter_dtype=TRAINER_ADAPTER_DTYPE[trainer],
        loss=TRAINER_LOSS[trainer],
    )


def our_peak(config: TrainingConfig, tmp_path: Path) -> int:
    """Peak over real optimizer steps, nothing primed."""
    gc.collect()
    base = build_base(ModelSource(name="test", config=CONFIG), config, torch.device("cpu"))
    step = TrainingStep(base, config, folder=str(tmp_path))
    tracker = LiveBytes()
    tracker.see(model_tensors(step.model))
    with tracker:
        for _ in range(STEPS):
            batches = step.batches(config.gradient_accumulation_steps)
            items = step.items_in(batches)
            for batch in batches:
                step.micro_batch(batch, items)
            step.optimizer_step()
    return tracker.peak_bytes


def primed_peak(config: TrainingConfig, tmp_path: Path) -> int:
    """Peak of the one micro batch that a probe runs, the optimizer primed."""
    gc.collect()
    base = build_base(ModelSource(name="test", config=CONFIG), config, torch.device("cpu"))
    step = TrainingStep(base, config, folder=str(tmp_path))
    step.prime_optimizer()
    batches = step.batches(config.gradient_accumulation_steps)
    tracker = LiveBytes()
    tracker.see(model_tensors(step.model))
    tracker.see(step.optimizer_tensors())
    tracker.see(tensor for batch in batches for tensor in batch.values())
    with tracker:
        step.micro_batch(batches[0], step.items_in(batches))
    return tracker.peak_bytes


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Random rows of full length."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, CONFIG["vocab_size"], (count, TOKENS), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        return {"input_ids": row, "attention_mask": [1] * TOKENS, "labels": list(row)}


def loaded(folder: Path, config: TrainingConfig) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_config(config), dtype=torch.bfloat16, device_map={"": "cpu"}
    )


def peak_of_training(trainer: Any) -> int:
    gc.collect()
    tracker = LiveBytes()
    tracker.see(model_tensors(trainer.model))
    with tracker:
        trainer.train()
    return tracker.peak_bytes


def arguments(config: TrainingConfig, tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "activation_checkpointing": config.gradient_checkpointing != "off",
        "max_steps": STEPS,
        "optim": config.optimizer,
        "use_cpu": True,
        "bf16": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


@pytest.fixture
def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("checkpointing", ["off", "full"])
@pytest.mark.parametrize("micro", [1, 4])
def test_step_peaks_as_transformers_trainer_does(
    folder: Path, tmp_path: Path, lora: Any, micro: int, checkpointing: str
) -> None:
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer as HfTrainer
    from transformers import TrainingArguments

    config = config_of(Trainer.TRANSFORMERS, micro, checkpointing)
    ours, primed = our_peak(config, tmp_path), primed_peak(config, tmp_path)
    base = prepare_model_for_kbit_training(
        loaded(folder, config),
        use_gradient_checkpointing=checkpointing != "off",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    trainer = HfTrainer(
        model=get_peft_model(base, lora),
        args=TrainingArguments(**arguments(config, tmp_path)),
        train_dataset=Rows(2 * micro * STEPS),
    )
    theirs = peak_of_training(trainer)
    print(f"transformers micro={micro} checkpointing={checkpointing}: ours {ours} primed {primed} theirs {theirs}")
    assert ours == pytest.approx(theirs, rel=0.002)
    assert primed == pytest.approx(theirs, rel=0.002)


@pytest.mark.parametrize("checkpointing", ["off", "full"])
@pytest.mark.parametrize("micro", [1, 4])
def test_step_peaks_as_trl_sft_trainer_does(
    folder: Path, tmp_path: Path, lora: Any, micro: int, checkpointing: str
) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    config = config_of(Trainer.TRL, micro, checkpointing)
    ours, primed = our_peak(config, tmp_path), primed_peak(config, tmp_path)
    rows = Rows(2 * micro * STEPS).rows
    vocabulary = {str(token): token for token in range(CONFIG["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")), eos_token="1", pad_token="2"
    )
    trainer = SFTTrainer(
        model=loaded(folder, config),
        args=SFTConfig(**arguments(config, tmp_path), max_length=TOKENS),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        peft_config=lora,
    )
    theirs = peak_of_training(trainer)
    print(f"trl micro={micro} checkpointing={checkpointing}: ours {ours} primed {primed} theirs {theirs}")
    assert ours == pytest.approx(theirs, rel=0.01)
    assert primed == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("upcast", list(Upcast))
def test_base_holds_the_bytes_that_from_pretrained_makes(folder: Path, upcast: Upcast) -> None:
    from autotune.workload.prepare import upcast_parameters

    config = TrainingConfig(sequence_length=TOKENS, micro_batch_size=1, upcast=upcast)
    ours = build_base(ModelSource(name="test", config=CONFIG), config, torch.device("cpu")).model
    theirs = loaded(folder, config)
    upcast_parameters(ours, config)
    upcast_parameters(theirs, config)

    def sizes(model: Any) -> list[tuple[str, torch.dtype, int]]:
        return sorted((name, p.dtype, p.numel()) for name, p in model.named_parameters())

    assert sizes(ours) == sizes(theirs)
    tracked = [LiveBytes(), LiveBytes()]
    for tracker, model in zip(tracked, (ours, theirs), strict=True):
        tracker.see(model_tensors(model))
    assert tracked[0].live_bytes == tracked[1].live_bytes


def test_real_weights_come_from_the_folder_and_train(folder: Path, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    config = config_of(Trainer.TRANSFORMERS, 1, "off")
    source = ModelSource(name="test", config=CONFIG, folder=str(folder), weights="real")
    base = build_base(source, config, torch.device("cpu"))
    ours = base.model.model.layers[1].self_attn.q_proj.weight
    theirs = loaded(folder, config).model.layers[1].self_attn.q_proj.weight
    assert torch.equal(
        bnb.functional.dequantize_4bit(ours.data, ours.quant_state),
        bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state),
    )
    step = TrainingStep(base, config, folder=str(tmp_path))
    batches = step.batches(2)
    assert float(step.micro_batch(batches[0], step.items_in(batches))) > 0
