"""Files of tensors in the safetensors format, as small as a simulated engine needs them; of bytes, no I/O.

The format: eight bytes with the length of the header, the header as JSON, and the tensors' bytes one after another.

Invariant: what is decoded is whole: a file that was cut off, grew, or whose header does not fit its bytes is refused.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]

_LENGTH = 8

#: How each kind of number is stored; bfloat16 is the upper half of float32, which numpy does not know by name.
_STORED: dict[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def encode(tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """A file of float32 tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # as transformers asks of a checkpoint
    body = b""
    for name, tensor in tensors.items():
        written = tensor.astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(written)],
        }
        body += written
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % _LENGTH)  # the tensors begin at a multiple of eight
    return len(words).to_bytes(_LENGTH, "little") + words + body


def decode(file: bytes) -> Tensors:
    """The tensors of a file, as float32.

    Raises:
        ValueError: it is not whole, or of another format.
    """
    length = int.from_bytes(file[:_LENGTH], "little")
    words, body = file[_LENGTH : _LENGTH + length], file[_LENGTH + length :]
    if len(file) < _LENGTH or len(words) < length:
        raise ValueError(f"{len(file)} bytes are less than its header")
    header = json.loads(words)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    try:
        tensors = {name: _tensor(body, entry) for name, entry in header.items()}
        size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"its header is none of safetensors ({error!r})") from error
    if size != len(body):
        raise ValueError(f"its header speaks of {size} bytes of tensors, and there are {len(body)}")
    return tensors


def _tensor(body: bytes, entry: Mapping[str, Any]) -> NDArray[np.float32]:
    begin, end = entry["data_offsets"]
    if end > len(body):
        raise ValueError(f"its header speaks of {end} bytes of tensors, and there are {len(body)}")
    stored = np.frombuffer(body[begin:end], _STORED[entry["dtype"]]).reshape(entry["shape"])
    if entry["dtype"] == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
