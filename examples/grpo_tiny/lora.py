"""A LoRA adapter for the tiny model: made, merged and saved in peft's layout.

Invariant: what is saved, applied as peft's documentation defines it, gives the model that `merged` gives; a new adapter
changes nothing.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from rollpool.ops.local.tiny_model import write_json

from .model import Params

#: Of the matrices, and what the change is multiplied by.
RANK, ALPHA = 8, 16.0

#: In each layer.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: By `model.layers.0.self_attn.q_proj.lora_A` and the like: A is [rank, in], B is [out, rank].
Adapter = Mapping[str, jax.Array]


def new_adapter(base: Params, seed: int = 0) -> dict[str, jax.Array]:
    """A is drawn, B is zero, as peft begins."""
    rng = np.random.default_rng(seed)
    adapter: dict[str, jax.Array] = {}
    for module in _modules(base):
        rows, columns = base[f"{module}.weight"].shape
        adapter[f"{module}.lora_A"] = jnp.asarray(rng.normal(0, columns**-0.5, (RANK, columns)), jnp.float32)
        adapter[f"{module}.lora_B"] = jnp.zeros((rows, RANK), jnp.float32)
    return adapter


def merged(base: Params, adapter: Adapter) -> dict[str, jax.Array]:
    """The weights of the model with the adapter: `W + alpha / rank * B @ A`."""
    params = dict(base)
    for module in _modules(base):
        change = adapter[f"{module}.lora_B"] @ adapter[f"{module}.lora_A"]
        params[f"{module}.weight"] = base[f"{module}.weight"] + ALPHA / RANK * change
    return params


def _modules(base: Params) -> list[str]:
    names = (name.removesuffix(".weight") for name in base)
    return [name for name in names if name.rpartition(".")[2] in TARGETS]


def save_adapter(folder: Path, adapter: Adapter, base: Path) -> Path:
    """Write it whole or not at all; `base` is the checkpoint that its config names."""
    unfinished = folder.with_name(f".{folder.name}")
    unfinished.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}.weight": np.asarray(value) for name, value in adapter.items()}
    save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": sorted(TARGETS),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    write_json(unfinished / "adapter_config.json", config)
    return unfinished.replace(folder)
