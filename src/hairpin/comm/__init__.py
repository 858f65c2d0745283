"""Floor 1: meshes of ranks and the verbs that move tensors between layouts on them."""
