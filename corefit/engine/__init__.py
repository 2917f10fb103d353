"""Model, loss, loop, checkpoints. Nothing here knows of plugins or recipes: it is handed resolved values."""
