"""What `train.py` calls: configuration, data, state, step, checkpoints, metrics."""
