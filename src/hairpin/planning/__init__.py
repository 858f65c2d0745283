"""Floor 3: where a model is split, what that costs, and how it is attached to the model."""
