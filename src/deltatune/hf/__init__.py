"""What ages with transformers and PEFT."""
