"""Dynamic axial parallelism: the stacks of a folding model split over ranks."""
