"""What is compiled, what is kept for backward and what is computed again."""
