"""Plain serial models, one folder each: `model.py` reads like the paper, `seams.py` is the table.

A model knows nothing of ranks, meshes or plans.
"""
