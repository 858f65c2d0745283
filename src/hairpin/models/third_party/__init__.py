"""Seam tables of models that other libraries define. Plain data; the libraries are not imported."""
