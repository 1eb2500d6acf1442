"""Scripts that run inside the engine's own environment: only the standard library and `sgl_jax` are there."""
