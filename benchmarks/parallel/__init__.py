"""Training steps on several GPUs, against one process before they are timed."""
