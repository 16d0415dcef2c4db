"""Linear layers with low-rank adapters inside their matrix products."""
