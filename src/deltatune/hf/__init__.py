"""What depends on the versions of transformers and PEFT."""
