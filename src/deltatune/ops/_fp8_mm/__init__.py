"""Products of activations with frozen matrices, or with one of several for each row, both in fp8."""
