"""An independent Qwen3 in numpy: the oracle that engines' tokens and log-probs are checked against.

Written from the published architecture, not from any engine: the Qwen3 technical report (arXiv 2505.09388,
section 2: "Architecture") and Hugging Face `transformers`, `models/qwen3/modeling_qwen3.py`. Everything is
float32.

An adapter (LoRA) is applied as peft's documentation defines it: each matrix that it is on becomes
`W + lora_alpha / r * B @ A`. Nothing here is shared with what merges adapters for engines.

Invariant: the logits at a position are a function of the tokens up to that position and of the checkpoint with its
adapter, and of nothing else.

Beside a busy engine run it with `OPENBLAS_NUM_THREADS=1`: with more, its threads wait for one another in
loops that the engine's threads keep interrupting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from rollpool.schemas.results import Sample

Floats = npt.NDArray[np.float32]
Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class ReferenceConfig:
    """What of config.json the forward pass needs."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> ReferenceConfig:
        """Read Hugging Face's names.

        Raises:
            ValueError: The checkpoint is not a plain Qwen3, so that these formulas are not its own.
        """
        if config.get("model_type") != "qwen3":
            raise ValueError(f"this oracle is of Qwen3; the checkpoint says {config.get('model_type')!r}")
        for key in ("rope_scaling", "attention_bias", "use_sliding_window"):
            if config.get(key):
                raise ValueError(f"this oracle has no {key}; the checkpoint sets it to {config[key]!r}")
        return cls(
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=config["rope_theta"],
            tied=config.get("tie_word_embeddings", False),
        )


class ReferenceModel:
    """One checkpoint, ready to score token ids."""

    def __init__(self, config: ReferenceConfig, weights: dict[str, Floats]) -> None:
        self.config = config
        self._weights = weights

    @classmethod
    def from_checkpoint(cls, path: Path) -> ReferenceModel:
        """Load a Hugging Face checkpoint directory.

        Args:
            path: Holds config.json and one or more *.safetensors files.
        """
        path = Path(path)
        config = ReferenceConfig.from_json(json.loads((path / "config.json").read_text()))
        weights: dict[str, Floats] = {}
        for file in sorted(path.glob("*.safetensors")):
            weights.update({name: value.astype(np.float32) for name, value in load_file(file).items()})
        return cls(config, weights)

    def with_adapter(self, path: Path) -> ReferenceModel:
        """The same checkpoint with an adapter on it.

        Args:
            path: Holds adapter_config.json and adapter_model.safetensors, in peft's layout.

        Raises:
            ValueError: The adapter is not plain LoRA, so that the formula is not its own.
            KeyError: It is on a matrix that the checkpoint does not have.
        """
        path = Path(path)
        config = json.loads((path / "adapter_config.json").read_text())
        for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
            if config.get(key):
                raise ValueError(f"this oracle has no {key}; the adapter sets it to {config[key]!r}")
        scale = np.float32(config["lora_alpha"] / config["r"])
        matrices = load_file(path / "adapter_model.safetensors")
        weights = dict(self._weights)
        for name, b in matrices.items():
            module, is_b, _ = name.removeprefix("base_model.model.").partition(".lora_B.weight")
            if is_b:
                a = matrices[name.replace(".lora_B.", ".lora_A.")]
                change = b.astype(np.float32) @ a.astype(np.float32)
                weights[f"{module}.weight"] = weights[f"{module}.weight"] + scale * change
        return ReferenceModel(self.config, weights)

    def logits(self, ids: Ids) -> Floats:
        """Compute next-token logits at every position of one sequence.

        Args:
            ids: `[T]` token ids.

        Returns:
            `[T, V]`: row `t` scores the token after `ids[t]`.
        """
        return self._head(self._hidden_states(np.asarray(ids, dtype=np.int64)))

    def logprobs(self, prompt_ids: Ids, output_ids: Ids, *, temperature: float = 1.0) -> Floats:
        """Score the tokens of one sample.

        Args:
            prompt_ids: `[P]`, at least one token.
            output_ids: `[N]`, the tokens generated after the prompt.
            temperature: Logits are divided by it. Top-k, top-p and min-p do not come in.

        Returns:
            `[N]`: for each output token the log of its probability given all tokens before it.

        Raises:
            ValueError: The prompt is empty, or the temperature is not positive.
        """
        return of_tokens(self.table(prompt_ids, output_ids, temperature=temperature), output_ids)

    def table(self, prompt_ids: Ids, output_ids: Ids, *, temperature: float = 1.0) -> Floats:
        """Score every token of the vocabulary in the place of each output token; as `logprobs`.

        Returns:
            `[N, V]`.
        """
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        prompt, output = np.asarray(prompt_ids, dtype=np.int64), np.asarray(output_ids, dtype=np.int64)
        if len(prompt) == 0:
            raise ValueError("the prompt is empty; the first output token has no prefix to be scored on")
        # The last token is only ever scored, never looked at.
        hidden = self._hidden_states(np.concatenate([prompt, output])[:-1])
        return log_softmax(self._head(hidden[len(prompt) - 1 :]) / np.float32(temperature))

    def logprobs_batch(self, samples: Sequence[tuple[Ids, Ids]], *, temperature: float = 1.0) -> list[Floats]:
        """Score many samples.

        They go one by one: padded batches of any size were measured to be no faster, the passes are bound
        by arithmetic already.

        Args:
            samples: Pairs `(prompt_ids, output_ids)`, of any lengths.
            temperature: As in `logprobs`, one for all.

        Returns:
            One array for each sample, in the order given; see `logprobs`.
        """
        return [self.logprobs(prompt, output, temperature=temperature) for prompt, output in samples]

    def greedy(self, prompt_ids: Ids, count: int) -> npt.NDArray[np.int32]:
        """Continue a prompt with the most likely token, `count` times.

        Returns:
            `[count]` token ids.
        """
        ids = [int(i) for i in prompt_ids]
        for _ in range(count):
            ids.append(int(np.argmax(self.logits(ids)[-1])))
        return np.asarray(ids[len(ids) - count :], dtype=np.int32)

    def _head(self, hidden: Floats) -> Floats:
        name = "model.embed_tokens.weight" if self.config.tied else "lm_head.weight"
        result: Floats = hidden @ self._weights[name].T
        return result

    def _hidden_states(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Run the pre-norm decoder stack (`Qwen3Model.forward`): `[T]` ids to `[T, D]`, normed."""
        hidden: Floats = self._weights["model.embed_tokens.weight"][ids]
        cos, sin = rotary_tables(len(ids), self.config.head_dim, self.config.rope_theta)
        for layer in range(self.config.num_layers):
            prefix = f"model.layers.{layer}."
            normed = self._norm(hidden, prefix + "input_layernorm.weight")
            hidden = hidden + self._attention(normed, prefix + "self_attn.", cos, sin)
            normed = self._norm(hidden, prefix + "post_attention_layernorm.weight")
            hidden = hidden + self._mlp(normed, prefix + "mlp.")
        return self._norm(hidden, "model.norm.weight")

    def _norm(self, x: Floats, name: str) -> Floats:
        return rms_norm(x, self._weights[name], self.config.rms_norm_eps)

    def _attention(self, x: Floats, prefix: str, cos: Floats, sin: Floats) -> Floats:
        """Grouped-query attention with a norm on each head's queries and keys (`Qwen3Attention.forward`).

        `[T, D]` to `[T, D]`. The norms come before the rotation, as in the report's "QK-Norm".
        """
        c = self.config
        length = len(x)

        def heads(name: str, count: int) -> Floats:
            projected = x @ self._weights[f"{prefix}{name}_proj.weight"].T
            return projected.reshape(length, count, c.head_dim)

        q = self._norm(heads("q", c.num_heads), prefix + "q_norm.weight").transpose(1, 0, 2)
        k = self._norm(heads("k", c.num_kv_heads), prefix + "k_norm.weight").transpose(1, 0, 2)
        v = heads("v", c.num_kv_heads).transpose(1, 0, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = c.num_heads // c.num_kv_heads  # So many query heads share a KV head (`repeat_kv`).
        k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
        scores = q @ k.transpose(0, 2, 1) * np.float32(c.head_dim**-0.5)
        future = np.triu(np.ones((length, length), dtype=bool), k=1)
        scores[:, future] = -np.inf
        mixed = (np.exp(log_softmax(scores)) @ v).transpose(1, 0, 2).reshape(length, -1)
        result: Floats = mixed @ self._weights[prefix + "o_proj.weight"].T
        return result

    def _mlp(self, x: Floats, prefix: str) -> Floats:
        """SwiGLU: `down(silu(gate(x)) * up(x))` (`Qwen3MLP.forward`), `[T, D]` to `[T, D]`."""
        gate = x @ self._weights[prefix + "gate_proj.weight"].T
        up = x @ self._weights[prefix + "up_proj.weight"].T
        silu = gate / (1 + np.exp(-gate))
        result: Floats = (silu * up) @ self._weights[prefix + "down_proj.weight"].T
        return result


def check_sample(
    models: Mapping[int, ReferenceModel], prompt_ids: Ids, sample: Sample, *, temperature: float = 1.0
) -> float:
    """Compute anew every token's log-prob by the policy whose version span it is in; how far off the sample is.

    Args:
        models: By policy version.
        prompt_ids: `[P]`, at least one token.
        sample: Of that prompt. A token is scored on the prompt and on all tokens before it, whoever made those.
        temperature: It was sampled with. 0 is greedy sampling: log-probs are then those of temperature 1, and each
            token must be the most likely one of its policy.

    Returns:
        The largest of all absolute differences between the sample's log-probs and these; and for greedy sampling of
        what the most likely token is ahead of each token, which is 0 where it is the token. Infinite where the sample
        has what is not a number.

    Raises:
        KeyError: A span names a version that has no model.
    """
    errors = [np.zeros(1)]
    for span in sample.version_spans:
        part = slice(span.start, span.end)
        before = np.concatenate([np.asarray(prompt_ids), sample.output_ids[: span.start]])
        table = models[span.version].table(before, sample.output_ids[part], temperature=temperature or 1.0)
        again = of_tokens(table, sample.output_ids[part])
        errors.append(np.abs(again - sample.logprobs[part]))
        if temperature == 0:
            errors.append(table.max(axis=-1) - again)
    return float(np.nan_to_num(np.concatenate(errors), nan=np.inf, posinf=np.inf).max())


def of_tokens(table: Floats, ids: Ids) -> Floats:
    """Take each token's own value: `[N, V]` and `[N]` to `[N]`."""
    result: Floats = np.take_along_axis(table, np.asarray(ids, dtype=np.int64)[:, None], axis=-1)[:, 0]
    return result


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Divide by the root mean square over the last axis and scale (`Qwen3RMSNorm`); shape unchanged."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    result: Floats = weight * (x / np.sqrt(mean_square + np.float32(eps)))
    return result


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[Floats, Floats]:
    """Compute cos and sin of position times frequency, `[length, head_dim]` each (`Qwen3RotaryEmbedding`).

    Frequency `i` of the `head_dim / 2` is `theta ** (-2 i / head_dim)`; the halves repeat the same angles.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.outer(np.arange(length), frequencies)
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotate each pair `(x[i], x[i + d/2])` by its angle (`apply_rotary_pos_emb`, `rotate_half`).

    Args:
        x: `[H, T, d]`.
        cos: `[T, d]`, of `rotary_tables`.
        sin: `[T, d]`.

    Returns:
        `[H, T, d]`.
    """
    first, second = np.split(x, 2, axis=-1)
    turned = np.concatenate([-second, first], axis=-1)
    return np.asarray(x * cos + turned * sin, dtype=np.float32)


def log_softmax(x: Floats) -> Floats:
    """Normalise over the last axis, in logs; shape unchanged."""
    shifted = x - np.max(x, axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return result
