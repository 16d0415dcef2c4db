"""Training: transformers.Trainer on packed batches, its metrics, its memory estimate, and what comes out."""
