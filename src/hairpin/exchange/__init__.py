"""Floor 2: attention along a dim that is split: what crosses the ranks, and in which order."""
