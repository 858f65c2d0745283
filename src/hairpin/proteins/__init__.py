"""Proteins as data: residues and atoms, sequences, alignments, structures, features."""
