"""A dry run's trace to peak memory (a caching-allocator simulator) and to step time (a roofline)."""
