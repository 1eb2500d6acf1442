"""The tiny Qwen3 in plain JAX, with Hugging Face's names and layout for its weights.

Invariant: `forward` computes in float32 what `rollpool.ops.local.reference` computes in numpy, at every position
before the padding: what is to the right of a token never changes what is said about it.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

#: Weights by their Hugging Face name; a matrix is [out, in].
Params = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Config:
    """What of config.json the forward pass needs; hashable, as jit wants it."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float

    @classmethod
    def read(cls, checkpoint: Path) -> "Config":
        """From a checkpoint's config.json."""
        config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
        return cls(
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            eps=config["rms_norm_eps"],
            rope_theta=config["rope_theta"],
        )


def load(checkpoint: Path) -> dict[str, jax.Array]:
    """The weights, in float32."""
    files = [load_file(file) for file in sorted(checkpoint.glob("*.safetensors"))]
    return {name: jnp.asarray(value, jnp.float32) for file in files for name, value in file.items()}


@functools.partial(jax.jit, static_argnames=("config",))
def token_logprobs(params: Params, config: Config, ids: jax.Array) -> jax.Array:
    """The log-prob of each token, given those before it, at temperature 1.

    Args:
        params: The weights.
        config: Of the model.
        ids: [B, T], padded on the right.

    Returns:
        [B, T]; 0 for the first token of a row, which nothing predicts.
    """
    table = jax.nn.log_softmax(forward(params, config, ids[:, :-1]))
    taken = jnp.take_along_axis(table, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(taken, ((0, 0), (1, 0)))


def forward(params: Params, config: Config, ids: jax.Array) -> jax.Array:
    """Logits of the token after each position: [B, T] to [B, T, V]."""
    hidden = params["model.embed_tokens.weight"][ids]
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        normed = _rms_norm(hidden, params[prefix + "input_layernorm.weight"], config.eps)
        hidden = hidden + _attention(params, config, prefix + "self_attn.", normed)
        normed = _rms_norm(hidden, params[prefix + "post_attention_layernorm.weight"], config.eps)
        hidden = hidden + _mlp(params, prefix + "mlp.", normed)
    return _rms_norm(hidden, params["model.norm.weight"], config.eps) @ params["lm_head.weight"].T


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return weight * x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def _attention(params: Params, config: Config, prefix: str, x: jax.Array) -> jax.Array:
    """Causal, with a norm on each head's queries and keys: [B, T, D] to [B, T, D]."""
    batch, length, _ = x.shape

    def heads(name: str, count: int) -> jax.Array:
        return (x @ params[f"{prefix}{name}_proj.weight"].T).reshape(batch, length, count, config.head_dim)

    q = _rotate(_rms_norm(heads("q", config.heads), params[prefix + "q_norm.weight"], config.eps), config.rope_theta)
    k = _rotate(_rms_norm(heads("k", config.kv_heads), params[prefix + "k_norm.weight"], config.eps), config.rope_theta)
    v = heads("v", config.kv_heads)
    shared = config.heads // config.kv_heads  # so many query heads look at one head of keys
    k, v = jnp.repeat(k, shared, axis=2), jnp.repeat(v, shared, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * config.head_dim**-0.5
    past = jnp.tril(jnp.ones((length, length), dtype=bool))
    weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf))
    mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, -1)
    return mixed @ params[prefix + "o_proj.weight"].T


def _rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding: each pair `(x[i], x[i + d/2])` turns with the position; [B, T, H, d], shape unchanged."""
    length, half = x.shape[1], x.shape[-1] // 2
    angles = jnp.arange(length)[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _mlp(params: Params, prefix: str, x: jax.Array) -> jax.Array:
    gate, up = x @ params[prefix + "gate_proj.weight"].T, x @ params[prefix + "up_proj.weight"].T
    return (jax.nn.silu(gate) * up) @ params[prefix + "down_proj.weight"].T
