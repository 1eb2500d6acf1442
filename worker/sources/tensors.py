"""The layout of safetensors files, and tensors read and written in place.

Invariant: what `layout` returns lies within the file and has the size its shape and type say, so whoever reads or
writes by it touches that tensor and nothing else.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rollpool.schemas import PolicyRejected

Floats = NDArray[np.float32]

#: Bits of one element, by the format's own names; what is not here is not a plain number.
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

#: Those that arithmetic in float32 holds exactly.
FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}

#: The format's own bound on its header.
_MAX_HEADER_BYTES = 100_000_000


class Tensor(NamedTuple):
    """Where a tensor lies."""

    dtype: str
    shape: tuple[int, ...]
    #: Of its first byte, from the start of the file.
    offset: int
    #: Bytes.
    size: int


def layout(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; nothing of them is read.

    Raises:
        PolicyRejected: it is not a whole safetensors file.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(opened.read(length))
        data, end = 8 + length, file.stat().st_size
        return {name: _tensor(entry, data, end) for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise PolicyRejected(f"cannot read {file}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolicyRejected(f"{file} is not a whole safetensors file: {error}; write it anew") from error


def _tensor(entry: Mapping[str, Any], data: int, end: int) -> Tensor:
    first, last = (int(offset) for offset in entry["data_offsets"])
    dtype, shape = str(entry["dtype"]), tuple(int(length) for length in entry["shape"])
    if dtype not in _BITS:
        raise ValueError(f"it holds {dtype}, which is not known")
    if not 0 <= first <= last <= end - data or (last - first) * 8 != prod(shape) * _BITS[dtype]:
        raise ValueError(f"a tensor {dtype} {list(shape)} is said to be at {first} to {last} of {end - data} bytes")
    return Tensor(dtype, shape, data + first, last - first)


def read_rows(file: BinaryIO, tensor: Tensor, start: int, stop: int) -> Floats:
    """Some rows of a matrix, as float32: exact for the types in `FLOATS`."""
    columns = tensor.shape[1]
    kind = FLOATS[tensor.dtype]
    file.seek(tensor.offset + start * columns * kind.itemsize)
    wanted = (stop - start) * columns * kind.itemsize
    raw = file.read(wanted)
    if len(raw) != wanted:
        raise PolicyRejected(f"{file.name} ends in the middle of a tensor: it was changed meanwhile")
    return to_float32(np.frombuffer(raw, dtype=kind), tensor.dtype).reshape(stop - start, columns)


def write_rows(file: BinaryIO, tensor: Tensor, start: int, values: Floats) -> None:
    """Replace some rows of a matrix, rounded to its type."""
    file.seek(tensor.offset + start * tensor.shape[1] * FLOATS[tensor.dtype].itemsize)
    file.write(from_float32(values, tensor.dtype).tobytes())


def to_float32(stored: NDArray[Any], dtype: str) -> Floats:
    """Numbers as they are stored, widened."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def from_float32(values: Floats, dtype: str) -> NDArray[Any]:
    """Numbers as they are stored: rounded to nearest, ties to even.

    Raises:
        OverflowError: one of them is not finite in that type.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        stored = _round_bfloat16(values) if dtype == "BF16" else values.astype(FLOATS[dtype])
    if not np.isfinite(to_float32(stored, dtype)).all():
        raise OverflowError(f"not finite in {dtype}")
    return stored


def _round_bfloat16(values: Floats) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # A NaN's payload could be rounded away, to an infinity or to zero.
    rounded = np.where(np.isnan(values), np.uint32(0x7FC00000), bits + 0x7FFF + ((bits >> 16) & 1))
    return (rounded >> 16).astype(np.uint16)
