"""autotune: the fastest QLoRA config that fits this GPU, proven by real training steps."""

__version__ = "0.1.0"
