"""What the facts of a dead run mean: which memory ran out, if any did, and the one action that follows."""
