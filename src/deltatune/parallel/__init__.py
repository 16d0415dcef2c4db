"""Several processes: their axes, sharded weights, what is gathered of them again."""
