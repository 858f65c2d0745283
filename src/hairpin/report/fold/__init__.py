"""What a person looks at after a fold: plots, and a page with the structure in three dimensions.

The viewer ``3Dmol-min.js`` is 3Dmol.js 2.5.5 (Rego and Koes 2015), unchanged; its licence,
BSD-3-Clause, is beside it.
"""
