"""What makes pages of the docs."""
