"""A checkpoint of a simulated policy: a config that names its signature, and weights of a few bytes.

Invariants: a directory holds one signature for ever, so what was made from it can be told from all others; what is read
of it was whole. An adapter that was merged into the weights, as for engines without LoRA, is told from them.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from rollpool.ops.sim import safetensors
from rollpool.ops.sim.tokens import VOCABULARY_WITH_FAULTS, adapted

#: What goes wrong with a checkpoint: `start`: an engine launched on it ends; `probe`: it starts, and every request
#: fails; `swap`: an engine that is to change to it finds that it does not generate, and serves on what it served.
SimFault: TypeAlias = Literal["start", "probe", "swap"]

#: Context of the simulated model, as Qwen3 has.
MAX_POSITIONS = 40_960

#: Width of the one layer, unless asked otherwise: that of a signature, one byte a row.
HIDDEN_SIZE = 8

#: The one tensor. Zeros; an adapter puts its signature into the first column, and so does whoever merges it.
WEIGHT = "model.layers.0.self_attn.q_proj.weight"

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SIGNATURE, _FAULT = "sim_signature", "sim_fault"

#: What must be alike for an engine to change from one checkpoint to another without a restart.
_SHAPE = (
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "torch_dtype",
    "tie_word_embeddings",
)


@dataclass(frozen=True, slots=True)
class SimModel:
    """A checkpoint, as an engine loads it."""

    #: Of the weights there are: of another policy, once an adapter was merged into them.
    signature: int
    #: The part of the config that no swap can change.
    shape: dict[str, Any]
    fault: str | None = None


def make_sim_model(
    path: Path, *, signature: int, fault: SimFault | None = None, hidden_size: int = HIDDEN_SIZE
) -> Path:
    """Write the checkpoint of one signature, or find it written.

    There is no tokenizer: prompts are token ids.

    Args:
        path: the directory to make.
        signature: which policy; 0 to 2^63 - 1.
        fault: what is to go wrong with it.
        hidden_size: at least 8; with another one, an engine cannot change to it without a restart.

    Returns:
        `path`.

    Raises:
        FileExistsError: `path` holds another model.
        ValueError: there is no such signature, fault or size.
    """
    path = Path(path)
    if not 0 <= signature < 2**63:
        raise ValueError(f"signature {signature} is not between 0 and 2^63 - 1")
    if fault is not None and fault not in get_args(SimFault):
        raise ValueError(f"fault {fault!r} is none of {', '.join(get_args(SimFault))}")
    if hidden_size < HIDDEN_SIZE:
        raise ValueError(f"hidden_size {hidden_size} is under {HIDDEN_SIZE}")
    config = _config(signature, fault, hidden_size)
    if (path / _CONFIG).exists() and (found := read_json(path / _CONFIG)) != config:
        raise FileExistsError(
            f"{path} holds another model, {_named(found)}, and is not to hold {_named(config)}: name another path"
        )
    path.mkdir(parents=True, exist_ok=True)
    if not (path / _WEIGHTS).exists():
        write_whole(path / _WEIGHTS, safetensors.encode({WEIGHT: np.zeros((hidden_size, hidden_size), np.float32)}))
    write_whole(path / _CONFIG, json.dumps(config, indent=2).encode() + b"\n")  # last: it marks what is whole
    return path


def read_model(checkpoint: Path | str) -> SimModel:
    """Load a checkpoint.

    Raises:
        ValueError: it is not one of `make_sim_model`, or is not whole.
    """
    directory = Path(checkpoint)
    config = read_json(directory / _CONFIG)
    signature = config.get(_SIGNATURE)
    if not isinstance(signature, int):
        raise ValueError(f"{checkpoint} is no model of a simulated engine; make one with make_sim_model")
    tensors: safetensors.Tensors = {}
    for name in _weight_files(directory):
        tensors |= read_tensors(directory / name)
    if WEIGHT not in tensors:
        raise ValueError(f"{checkpoint} holds no tensor {WEIGHT}; make it with make_sim_model")
    if merged := signature_in(tensors[WEIGHT]):
        signature = adapted(signature, merged)
    return SimModel(signature, {name: config.get(name) for name in _SHAPE}, config.get(_FAULT))


def signature_of(checkpoint: Path | str) -> int:
    """Which policy a checkpoint is, with the adapter that was merged into it.

    Raises:
        ValueError: it is not one of `make_sim_model`, or is not whole.
    """
    return read_model(checkpoint).signature


def signature_in(weight: NDArray[np.float32]) -> int:
    """The signature of the adapter that was added to a tensor of zeros; 0: none was.

    Raises:
        ValueError: something else is in it.
    """
    first = weight[:HIDDEN_SIZE, 0] if weight.ndim == 2 else weight
    digits = np.clip(np.nan_to_num(first), 0, 255).astype(np.uint8)
    if len(digits) != HIDDEN_SIZE or (first != digits).any() or np.count_nonzero(weight) != np.count_nonzero(digits):
        raise ValueError(f"{WEIGHT} holds something other than zeros and one adapter of make_sim_adapter")
    return int.from_bytes(digits.tobytes(), "little")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: there is none.
    """
    try:
        read = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}; make it with rollpool.ops.sim") from error
    return read if isinstance(read, dict) else {}


def read_tensors(file: Path) -> safetensors.Tensors:
    """The tensors of one file.

    Raises:
        ValueError: it is missing, or not whole.
    """
    try:
        return safetensors.decode(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"the weights in {file} are not whole: {error}") from error


def write_whole(file: Path, content: bytes) -> None:
    """A reader sees no file or all of it."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(descriptor, "wb") as writer:
        writer.write(content)
    Path(temporary).chmod(0o644)  # a temporary file is private; the engine may run as another user
    Path(temporary).replace(file)


def _weight_files(directory: Path) -> list[str]:
    """One file; or, where somebody merged into several, those that the index names."""
    if not (directory / _INDEX).exists():
        return [_WEIGHTS]
    files = read_json(directory / _INDEX).get("weight_map")
    return sorted(set(files.values())) if isinstance(files, dict) else []


def _named(config: dict[str, Any]) -> str:
    fault = f", fault {config[_FAULT]}" if _FAULT in config else ""
    return f"signature {config.get(_SIGNATURE)}{fault}, hidden_size {config.get('hidden_size')}"


def _config(signature: int, fault: SimFault | None, hidden_size: int) -> dict[str, Any]:
    """As large as the one tensor there is, so that whoever compares them finds nothing wrong."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": hidden_size,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY_WITH_FAULTS,
        _SIGNATURE: signature,
        **({} if fault is None else {_FAULT: fault}),
    }
