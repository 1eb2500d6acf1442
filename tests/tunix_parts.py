"""What tests of Tunix share. Nothing here imports it: only some environments have it."""

from typing import Any

#: What a prompt begins with. Tunix's samplers take 0 for none.
BOS = 2


class Tokenizer:
    """Words are numbers."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return BOS

    def eos_id(self) -> int:
        return self._vocab - 1

    def pad_id(self) -> int:
        return 0


def shape_of_tiny(qwen3: Any) -> Any:
    """Tunix's configuration of what `make_tiny_model` makes; `qwen3` is its `tunix.models.qwen3.model`."""
    return qwen3.ModelConfig(
        num_layers=2,
        vocab_size=512,
        embed_dim=256,
        hidden_dim=512,
        num_heads=16,
        head_dim=128,
        num_kv_heads=16,
        norm_eps=1e-6,
        rope_theta=10_000,
    )
