"""The training command: what it will run with, read from its words and files, and what it is told instead."""

from autotune.recover.command.command import ALLOCATOR, HOOK, TrainingCommand
from autotune.recover.command.errors import CommandNotFound
from autotune.recover.command.read import read_command

__all__ = ["ALLOCATOR", "HOOK", "CommandNotFound", "TrainingCommand", "read_command"]
