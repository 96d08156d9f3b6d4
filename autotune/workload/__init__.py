"""The training step, on any device."""
