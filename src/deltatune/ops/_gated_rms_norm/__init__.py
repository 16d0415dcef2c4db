"""RMS normalisation with a SiLU gate."""
