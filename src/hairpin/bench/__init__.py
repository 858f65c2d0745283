"""Benchmarks: what is sent, counted on the wire, and how long it takes at which bandwidth."""
