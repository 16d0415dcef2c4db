"""Two linear layers with adapters and the gate between them."""
