"""An adapter (LoRA) of a simulated policy, in peft's layout; its weights are its signature.

Invariant: an adapter that was merged into its base by anybody's exact arithmetic, `W + B A` times its scale, makes a
checkpoint of the same policy as the base served with the adapter beside it.
"""

import json
from pathlib import Path

import numpy as np

from rollpool.ops.sim import safetensors
from rollpool.ops.sim.model import HIDDEN_SIZE, WEIGHT, read_json, read_tensors, signature_in, write_whole

#: Its rank. Scale is 1: `lora_alpha` is the same.
RANK = 8

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LAYER = f"base_model.model.{WEIGHT.removesuffix('.weight')}"
_A, _B = f"{_LAYER}.lora_A.weight", f"{_LAYER}.lora_B.weight"


def make_sim_adapter(path: Path, signature: int, *, base: Path | str = "") -> Path:
    """Write the adapter of one signature, or find it written.

    Args:
        path: the directory to make.
        signature: which adapter; 1 to 2^63 - 1.
        base: the checkpoint of `make_sim_model` that it is said to belong on; it fits all of the usual size.

    Returns:
        `path`.

    Raises:
        FileExistsError: `path` holds another adapter.
        ValueError: there is no such signature.
    """
    path = Path(path)
    if not 0 < signature < 2**63:
        raise ValueError(f"signature {signature} is not between 1 and 2^63 - 1")
    if (path / _CONFIG).exists():
        if (found := adapter_signature_of(path)) != signature:
            raise FileExistsError(f"{path} holds another adapter, {found}, not {signature}: name another path")
        return path
    path.mkdir(parents=True, exist_ok=True)
    down, up = np.zeros((RANK, HIDDEN_SIZE), np.float32), np.zeros((HIDDEN_SIZE, RANK), np.float32)
    down[0, 0] = 1.0
    up[:, 0] = np.frombuffer(signature.to_bytes(HIDDEN_SIZE, "little"), np.uint8)
    write_whole(path / _WEIGHTS, safetensors.encode({_A: down, _B: up}))
    write_whole(path / _CONFIG, json.dumps(_config(str(base)), indent=2).encode() + b"\n")
    return path


def adapter_signature_of(path: Path | str, *, most_rank: int | None = None) -> int:
    """Which adapter a directory holds.

    Args:
        path: the directory.
        most_rank: what an engine was launched for.

    Raises:
        ValueError: it is not one of `make_sim_adapter`, is not whole, or is of a higher rank.
    """
    directory = Path(path)
    config = read_json(directory / _CONFIG)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise ValueError(f"{directory / _CONFIG} is no config of a LoRA; make it with make_sim_adapter")
    if most_rank is not None and rank > most_rank:
        raise ValueError(f"the adapter in {directory} has rank {rank}, over the engine's {most_rank}")
    tensors = read_tensors(directory / _WEIGHTS)
    if _A not in tensors or _B not in tensors:
        raise ValueError(f"{directory / _WEIGHTS} lacks {_A} or {_B}; make it with make_sim_adapter")
    added = (alpha / rank * tensors[_B] @ tensors[_A]).astype(np.float32)
    if not (signature := signature_in(added)):
        raise ValueError(f"the adapter in {directory} changes nothing")
    return signature


def _config(base: str) -> dict[str, object]:
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
