"""A tiny random adapter (LoRA) for the tiny model, in the layout that peft's `save_pretrained` writes.

Invariant: as for the tiny model: a directory that this module hands out is complete, and a function of its parameters
alone; and each adapter changes what the model says so much that nobody can take it for the model without it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from rollpool.ops.local.tiny_model import (
    HEAD_DIM,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    as_bfloat16,
    complete_directory,
    write_json,
)

# Raised whenever the same parameters would give other files.
_FORMAT = 1

#: Rows and columns of the matrices that an adapter can be on, and the block each is in.
_SHAPES = {
    "q_proj": ("self_attn", NUM_HEADS * HEAD_DIM, HIDDEN_SIZE),
    "k_proj": ("self_attn", NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
    "v_proj": ("self_attn", NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
    "o_proj": ("self_attn", HIDDEN_SIZE, NUM_HEADS * HEAD_DIM),
    "gate_proj": ("mlp", INTERMEDIATE_SIZE, HIDDEN_SIZE),
    "up_proj": ("mlp", INTERMEDIATE_SIZE, HIDDEN_SIZE),
    "down_proj": ("mlp", HIDDEN_SIZE, INTERMEDIATE_SIZE),
}

#: All of them, as the engine has adapters on.
ALL_TARGETS = tuple(_SHAPES)

#: At `alpha = rank` the change of a projection is as large as what the projection made before.
DEFAULT_RANK = 4
DEFAULT_ALPHA = 4.0


def make_tiny_adapter(
    path: Path,
    *,
    seed: int,
    rank: int = DEFAULT_RANK,
    alpha: float = DEFAULT_ALPHA,
    targets: Sequence[str] = ALL_TARGETS,
    base: Path | None = None,
) -> Path:
    """Write the adapter of one seed, or find it already written.

    Args:
        path: The directory to make. Its parent is made too.
        seed: Which weights. Equal seeds give equal files.
        rank: Of its matrices.
        alpha: Its scale is `alpha / rank`.
        targets: The projections it is on, in every layer.
        base: The checkpoint that its config names, as peft's does; nobody reads it.

    Returns:
        `path`, holding adapter_config.json and adapter_model.safetensors.

    Raises:
        FileExistsError: `path` holds something else.
        KeyError: a target is not one of `ALL_TARGETS`.
    """
    stamp = {
        "format": _FORMAT,
        "seed": seed,
        "rank": rank,
        "alpha": alpha,
        "targets": list(targets),
        "base": None if base is None else str(base),
    }

    def write(directory: Path) -> None:
        tensors = dict(_draw_matrices(seed, rank, targets))
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(directory / "adapter_config.json", _adapter_config(rank, alpha, targets, base))

    return complete_directory(path, stamp, write, what="a tiny adapter")


def _draw_matrices(seed: int, rank: int, targets: Sequence[str]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield each matrix under peft's name, in an order that belongs to the format.

    `A` keeps its input's size for each of its rows (deviation 1/sqrt(fan-in)), `B` gives each output the sum of `rank`
    of them at half their size: with `rank` 4 and scale 1 as much as the tiny model's own projections give.
    """
    # Not the stream of the model of this seed: its first matrix would be the embedding's.
    rng = np.random.default_rng([seed, 1])
    for layer in range(NUM_LAYERS):
        for target in targets:
            block, rows, columns = _SHAPES[target]
            module = f"base_model.model.model.layers.{layer}.{block}.{target}"
            a = rng.standard_normal((rank, columns), dtype=np.float32) * np.float32(columns**-0.5)
            b = rng.standard_normal((rows, rank), dtype=np.float32) * np.float32(0.5)
            yield f"{module}.lora_A.weight", as_bfloat16(a)
            yield f"{module}.lora_B.weight", as_bfloat16(b)


def _adapter_config(rank: int, alpha: float, targets: Sequence[str], base: Path | None) -> dict[str, Any]:
    """What peft 0.15 writes for plain LoRA."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": None if base is None else str(base),
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": False,
    }
