"""What a probe costs and what a card can do: each benchmark is one command, and keeps its raw JSON."""
