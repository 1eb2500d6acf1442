"""GRPO, written plainly in JAX, on a tiny Qwen3 that learns through a real engine. See README.md."""
