"""PEFT's LoRA layers at the price of the base."""
