"""From bytes to batches. Nothing here imports torch."""
