"""Frozen matrices in formats of 4 and 8 bits, and their values."""
