"""Compiled graphs, the activations they save for backward, and activation checkpointing."""
