"""Legal configs; ask for the next one, tell its verdict, know when to stop."""
