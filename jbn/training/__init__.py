"""The trainer: configuration, data, state, step, checkpoints, metrics."""
