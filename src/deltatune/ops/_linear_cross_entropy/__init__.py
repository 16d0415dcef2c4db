"""The output head and its loss, without the logits of the pack."""
