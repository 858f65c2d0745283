"""Programs: launching ranks, training, sampling, checkpoints, data and recipes."""
