"""Causal attention over packed documents."""
