"""The TPU host's side."""
