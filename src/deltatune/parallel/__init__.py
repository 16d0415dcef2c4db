"""Several processes: their axes, sharded weights, and packs that several ranks hold together."""
