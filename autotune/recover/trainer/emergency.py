"""The checkpoint that a dying trainer still writes: the state after its last finished optimizer step.

Sound where the death came between two optimizer steps: in forward or backward, in an evaluation or while a batch is
fetched nothing of the model, the optimizer or the schedule has changed since. The folder is marked while it is
written, as transformers marks its own just-in-time checkpoints, so what is cut short is never taken for a checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = "checkpoint-is-incomplete.txt"
_STATE = "trainer_state.json"
#: Optimizers that change weights while gradients are still being computed.
_IN_BACKWARD = ("lomo", "layerwise")


def why_not(trainer: Any, *, asked: bool, skips_evaluation: bool) -> str | None:
    """Why no emergency checkpoint can or should be written; None where one can."""
    arguments, step = trainer.args, trainer.state.global_step
    saves = _word(arguments.save_strategy) != "no" or asked
    is_sharded = (
        getattr(trainer, "is_deepspeed_enabled", False)
        or getattr(trainer, "is_fsdp_enabled", False)
        or getattr(trainer, "is_distributed_loading_by_transformers", False)
        or (getattr(trainer.model, "_tp_size", None) or getattr(trainer.model, "tp_size", None) or 1) > 1
    )
    reasons = {
        "it saves no checkpoints": not saves,
        "no step is finished": step == 0,
        "its checkpoints hold no optimizer": getattr(arguments, "save_only_model", False),
        "the state is spread over processes": is_sharded,
        "saving would wait for the other ranks": arguments.world_size > 1,  # even DDP's: it sums their FLOPs
        "weights change during backward": any(word in _word(arguments.optim) for word in _IN_BACKWARD),
        "it is a hyperparameter search": getattr(trainer, "hp_search_backend", None) is not None,
        "the evaluation decides what follows": skips_evaluation and _evaluation_decides(trainer),
        "the checkpoint is there": is_complete(checkpoint_path(trainer)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def checkpoint_path(trainer: Any) -> Path:
    return Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"


def is_complete(folder: Path) -> bool:
    """Whether the trainer's own last file is there and no mark says otherwise."""
    return (folder / _STATE).is_file() and not (folder / MARK).exists()


def free(trainer: Any, error: BaseException) -> None:
    """Give back what the failed step holds: its frames' tensors, gradients, the allocator's cache, the CPU's limit."""
    lift_data_limit()
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    if trainer.model is not None:
        trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    torch = sys.modules["torch"]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def lift_data_limit() -> None:
    """The soft RLIMIT_DATA up to the hard one: what is written of a death needs memory too."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def save(trainer: Any) -> Path:
    """Write the checkpoint with the trainer's own means. Raises what those raise; the mark then stays."""
    folder = checkpoint_path(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK
    mark.write_text(f"Emergency checkpoint of step {trainer.state.global_step}: being written.\n", encoding="utf-8")
    with _alone(trainer.args):
        trainer._save_checkpoint(trainer.model, None)
    if not (folder / _STATE).is_file():
        raise FileNotFoundError(f"the trainer wrote no {folder / _STATE}")
    mark.unlink()
    return folder


@contextlib.contextmanager
def _alone(arguments: Any) -> Iterator[None]:
    """No upload, and no other checkpoint removed: the older ones go when the next regular one is complete."""
    kept = {name: getattr(arguments, name) for name in ("push_to_hub", "save_total_limit")}
    try:
        arguments.push_to_hub, arguments.save_total_limit = False, None
        yield
    finally:
        for name, value in kept.items():
            setattr(arguments, name, value)


def _evaluation_decides(trainer: Any) -> bool:
    """Whether a skipped evaluation would change the run: a best checkpoint, early stopping, a plateau schedule."""
    arguments = trainer.args
    return (
        arguments.metric_for_best_model is not None
        or bool(arguments.load_best_model_at_end)
        or _word(arguments.save_strategy) == "best"
        or _word(arguments.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy")
    )


def _word(value: Any) -> str:
    return str(getattr(value, "value", value)).lower()
