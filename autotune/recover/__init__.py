"""One supervised run (`run`), many (`daemon`): notice, classify, step down, resume."""

from autotune.recover.trainer.apply import apply

__all__ = ["apply"]
