"""``deltatune bench ops``: every op at the shapes of models, ours beside Inductor, stock modules and libraries."""

from deltatune.bench.ops.command import add_arguments, run

__all__ = ["add_arguments", "run"]
