"""What runs inside a training process: it applies the plan, tells what happens, saves before it dies."""

from autotune.recover.trainer.environ import hook_environ

__all__ = ["hook_environ"]
