"""A checkpoint of a simulated policy: a config that names its signature, and no weights.

Invariant: a directory holds one signature for ever, so what was made from it can be told from all others.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rollpool.ops.sim.tokens import VOCABULARY_WITH_FAULTS

#: Context of the simulated model, as Qwen3 has.
MAX_POSITIONS = 40_960

_CONFIG, _SIGNATURE = "config.json", "sim_signature"


def make_sim_model(path: Path, *, signature: int) -> Path:
    """Write the checkpoint of one signature, or find it written.

    There is no tokenizer: prompts are token ids.

    Args:
        path: the directory to make.
        signature: which policy; 0 to 2^63 - 1.

    Returns:
        `path`.

    Raises:
        FileExistsError: `path` holds another model.
        ValueError: there is no such signature.
    """
    path = Path(path)
    if not 0 <= signature < 2**63:
        raise ValueError(f"signature {signature} is not between 0 and 2^63 - 1")
    if (path / _CONFIG).exists():
        if (found := _read(path).get(_SIGNATURE)) != signature:
            raise FileExistsError(f"{path} holds another model, signature {found}, not {signature}: name another path")
        return path
    path.mkdir(parents=True, exist_ok=True)
    _write_whole(path / _CONFIG, json.dumps(_config(signature), indent=2) + "\n")
    return path


def signature_of(checkpoint: Path | str) -> int:
    """Which policy a checkpoint is.

    Raises:
        ValueError: it is not one of `make_sim_model`.
    """
    signature = _read(Path(checkpoint)).get(_SIGNATURE)
    if not isinstance(signature, int):
        raise ValueError(f"{checkpoint} is no model of a simulated engine; make one with make_sim_model")
    return signature


def _read(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {directory / _CONFIG}: {error}; make it with make_sim_model") from error
    return config if isinstance(config, dict) else {}


def _write_whole(file: Path, text: str) -> None:
    """A reader sees no file or all of it."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(descriptor, "w") as writer:
        writer.write(text)
    Path(temporary).chmod(0o644)  # a temporary file is private; the engine may run as another user
    Path(temporary).replace(file)


def _config(signature: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": MAX_POSITIONS,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY_WITH_FAULTS,
        _SIGNATURE: signature,
    }
