"""Splits: the seam table, the search for the cheapest, and what carries one out."""
