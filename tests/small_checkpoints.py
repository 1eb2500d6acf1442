"""Checkpoints and adapters of a few kB, in Hugging Face's and peft's layouts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: What peft writes where nothing special was asked for.
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "modules_to_save": None,
    "init_lora_weights": True,
}

#: The one matrix that `make_base` holds for adapters to be on, and the adapter's two.
MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
LORA_A = f"base_model.model.{MODULE}.lora_A.weight"
LORA_B = f"base_model.model.{MODULE}.lora_B.weight"

_NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64", "int8": "I8"}


def write_tensors(file: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """A safetensors file; arrays of uint16 are the bits of bfloat16."""
    header, data = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes()
        header[name] = {
            "dtype": _NAMES[value.dtype.name],
            "shape": value.shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def random(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def make_base(path: Path, *shards: Mapping[str, NDArray[Any]], config: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint; without `shards` one of a single file, with `WEIGHT` and an embedding."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {"tie_word_embeddings": False}))
    (path / "tokenizer.json").write_text('{"model": {}}')
    if len(shards) < 2:
        one = shards[0] if shards else {WEIGHT: random(6, 4), "model.embed_tokens.weight": random(8, 4, 1)}
        write_tensors(path / "model.safetensors", one)
        return path
    index: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_tensors(path / file, shard)
        index |= dict.fromkeys(shard, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def make_adapter(path: Path, tensors: Mapping[str, NDArray[Any]] | None = None, **config: Any) -> Path:
    """An adapter of rank 2 on `WEIGHT` of `make_base`, unless told otherwise."""
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    one = {LORA_A: random(2, 4, 2), LORA_B: random(6, 2, 3)} if tensors is None else tensors
    write_tensors(path / "adapter_model.safetensors", one)
    return path
