"""A run: its plan, its epochs, its checkpoints and records, and the flags that say what it does."""
