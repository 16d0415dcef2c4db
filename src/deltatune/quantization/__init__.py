"""Frozen weights in few bits: as tensors of a model, as checkpoints hold them, and made from 16 bits."""
