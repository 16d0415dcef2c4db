"""Products of activations with frozen matrices, both in fp8."""
