"""RMS normalisation of heads, then rotary position embedding."""
