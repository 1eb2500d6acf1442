"""What is wrong with the files of a checkpoint or an adapter, found from names, sizes and headers alone.

The engine's own loader only warns of a tensor that no file has, and reads a file that was cut short as far as it goes.

Invariant: a directory that passes has whole safetensors files, and every tensor that its index promises.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from rollpool.worker.launch.hot_swap_messages import Refused
else:
    from hot_swap_messages import Refused

#: Bytes of a header at most, as the format's own reader has it: more is not a header.
_MAX_HEADER = 100_000_000

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def check_checkpoint(directory: str) -> dict[str, Tensor]:
    """See that a checkpoint is whole.

    Args:
        directory: Holds config.json and one or more safetensors files.

    Returns:
        All its tensors, by name.

    Raises:
        Refused: It is not whole; the message names the file.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise Refused(f"{directory} is no directory on this host")
    read_json(folder / "config.json")
    tensors = read_tensors(folder)
    index = folder / _INDEX
    if index.exists():
        promised = read_json(index).get("weight_map")
        if not isinstance(promised, dict):
            raise Refused(f"{index} has no weight_map")
        if missing := sorted({str(file) for file in promised.values() if not (folder / str(file)).is_file()}):
            raise Refused(f"{directory} lacks {some(missing)}, which {_INDEX} names")
        if lost := sorted(name for name in promised if name not in tensors):
            raise Refused(f"{directory} lacks the tensors {some(lost)}, which {_INDEX} names")
    return tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the headers of all safetensors files of a directory.

    Raises:
        Refused: There is none, one is cut short, or a tensor is in two of them.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Refused(f"{folder} holds no *.safetensors file")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in tensors:
                # Some models come so, in pieces that the engine joins.
                twice = f"{folder} has the tensor {name} twice, in {tensors[name].file} and in {file.name}"
                raise Refused(twice, restart_may_help=True)
            tensors[name] = tensor
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """Read an object.

    Raises:
        Refused: It is not there, or not an object.
    """
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise Refused(f"{file} does not hold a JSON object")
    return value


def some(names: list[str], most: int = 4) -> str:
    """The first few of a list, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _read_header(file: Path) -> dict[str, Tensor]:
    """Read one header, and see that the file is as long as it says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(opened.read(length))
        tensors = {
            name: Tensor(about["dtype"], tuple(about["shape"]), file.name)
            for name, about in header.items()
            if name != "__metadata__"
        }
        ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise Refused(f"{file} is no whole safetensors file: {error}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise Refused(f"{file} has {size} bytes where its header promises {expected}: it was not written to its end")
    return tensors
