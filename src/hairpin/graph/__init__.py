"""Floor 2: what a model computes, seen from its operations, without running it on real sizes."""
