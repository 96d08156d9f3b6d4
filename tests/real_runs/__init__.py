"""Real trainers on a real small model, as a user runs them: what the tests of `autotune run` supervise."""
