"""A folder of checkpoints that a trainer's parameters are written to, one directory a version.

Invariant: a directory that is there is whole, and its tensors have the names and shapes of the model it is like; one
that hosts may still be asked for is not deleted.
"""

import importlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollpool.producer.params import on_host, shape_of, some_names
from rollpool.schemas.errors import PolicyRejected, SettingsError
from rollpool.schemas.roots import is_remote, local_path
from rollpool.schemas.sources import CONFIG, INDEX, WEIGHTS, inventory, tensors_of
from rollpool.schemas.stores import open_store

#: Versions that stay besides the one being written: hosts that come late, jobs that may be a few versions old, and
#: going back all ask for earlier ones.
KEEP = 8

#: Bytes of a file at most, as save_pretrained has it: it is read, checked and copied in pieces of this size.
SHARD_BYTES = 5 * 10**9

#: A checkpoint of ours: its version, and a part that makes its name new each time it is written.
_NAME = re.compile(r"(\d+)-[0-9a-f]{8}")

#: What is still being written.
_UNFINISHED = re.compile(r"\.(\d+)-[0-9a-f]{8}\.writing")

#: The dtypes that a tensor may be turned into, as safetensors and numpy call them.
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

#: Of a model whose head is its embedding.
_TIED_HEAD = "lm_head.weight"


class CheckpointFolder:
    """Writes a trainer's parameters as checkpoints; a `ParamsSink` for pools whose hosts see the same folder.

    The folder belongs to one pool, and is on a file system that every host mounts at the same path. Each version gets
    a directory of its own, `VERSION-XXXXXXXX`, written beside and renamed when it is whole.
    """

    #: What was written is looked at, and read for its digests, before hosts are told.
    check = True

    def __init__(
        self, folder: str | Path, *, like: str | Path, keep: int | None = KEEP, dtype: str | None = None
    ) -> None:
        """Name the folder and the model.

        Args:
            folder: A directory; made where it is not there.
            like: A checkpoint of the same model, as the one that training began with: config and tokenizer are copied
                from it, and every version must have its tensors. A directory, or a URL that fsspec knows.
            keep: Versions that stay besides the newest; older ones are deleted as new ones are written. None: all stay.
            dtype: What floating-point tensors are written as: `bfloat16`, `float16`, `float32` or `float64`; None:
                each as `like` has it.

        Raises:
            SettingsError: `folder` is a URL, or `keep` or `dtype` cannot be.
            PolicyRejected: `like` is no whole checkpoint.
        """
        if is_remote(str(folder)):
            raise SettingsError(
                f"CheckpointFolder {str(folder)!r}: expected a directory; mount the bucket (gcsfuse), or write the "
                "checkpoint yourself and publish its URL by checkpoint="
            )
        if keep is not None and (type(keep) is not int or keep < 1):
            raise SettingsError(f"CheckpointFolder: keep is {keep!r}; expected at least 1, or None to keep all")
        if dtype is not None and dtype not in _FLOATS.values():
            raise SettingsError(f"CheckpointFolder: dtype is {dtype!r}; expected one of {', '.join(_FLOATS.values())}")
        self._folder = Path(os.path.abspath(local_path(str(folder))))  # noqa: PTH100 - links stay
        self._keep = keep
        self._dtype = dtype
        self._like = _Like(str(like))
        self._lock = threading.Lock()

    def put(self, version: int, tensors: Mapping[str, Any]) -> str:
        """Write a version, and return its directory. See `ParamsSink`."""
        names = self._like.checked(tensors)
        with self._lock:
            _import_safetensors()
            name = f"{version}-{secrets.token_hex(4)}"
            unfinished = self._folder / f".{name}.writing"
            try:
                self._delete(_UNFINISHED, lambda _: True)
                unfinished.mkdir(parents=True)
                self._like.copy_to(unfinished)
                self._write(unfinished, tensors, names)
                _flush(unfinished)
                unfinished.rename(self._folder / name)
                self._prune(version)
            except OSError as error:
                raise PolicyRejected(
                    f"policy {version} cannot be written to {self._folder}: {error}; mend that, and publish again"
                ) from error
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return str(self._folder / name)

    def holds(self, checkpoint: str) -> bool:
        """Whether a directory of this folder is still there. See `ParamsSink`."""
        path = Path(checkpoint)
        return path.parent == self._folder and _NAME.fullmatch(path.name) is not None and (path / CONFIG).is_file()

    def _write(self, directory: Path, tensors: Mapping[str, Any], names: Sequence[str]) -> None:
        """The weights, no more than one shard of them in memory."""
        shards = _shards({name: self._bytes(name) for name in names})
        if len(shards) == 1:
            self._write_shard(directory / WEIGHTS, tensors, shards[0])
            return
        placed: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            self._write_shard(directory / file, tensors, shard)
            placed |= dict.fromkeys(shard, file)
        total = sum(self._bytes(name) for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _write_shard(self, file: Path, tensors: Mapping[str, Any], names: Sequence[str]) -> None:
        save_file = _import_safetensors()
        arrays = {name: _cast(name, on_host(tensors, name), self._dtype_of(name)) for name in names}
        save_file(arrays, str(file), metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes its file private, and the hosts may run as other users

    def _dtype_of(self, name: str) -> str | None:
        """What a tensor is written as; None: as it is given."""
        like = _FLOATS.get(self._like.dtypes[name])
        return (self._dtype or like) if like else None

    def _bytes(self, name: str) -> int:
        """About: what `like` has, at the size of the dtype asked for."""
        size = self._like.sizes[name]
        written, like = self._dtype_of(name), _FLOATS.get(self._like.dtypes[name])
        return size if written is None or like is None else size * _width(written) // _width(like)

    def _prune(self, version: int) -> None:
        """Delete what is older than the versions to keep; what is newer, since training went back, is left alone."""
        if self._keep is None:
            return
        older = {number for number in self._versions() if number < version}
        gone = sorted(older)[: -self._keep]
        self._delete(_NAME, lambda number: number in gone)

    def _versions(self) -> Iterator[int]:
        for path in self._folder.iterdir():
            if match := _NAME.fullmatch(path.name):
                yield int(match[1])

    def _delete(self, pattern: re.Pattern[str], is_gone: Any) -> None:
        for path in list(self._folder.iterdir()) if self._folder.is_dir() else []:
            match = pattern.fullmatch(path.name)
            if match and is_gone(int(match[1])) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


class _Like:
    """The checkpoint that every version must be like."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._store = open_store(location)
        files = inventory(location, "checkpoint", digests=False)
        weights = [file.name for file in files if file.name.endswith(".safetensors")]
        self._beside = [file for file in files if file.name not in (*weights, INDEX)]
        headers: dict[str, Any] = {}
        for name in weights:
            headers |= tensors_of(self._store, name)
        self._shapes = {name: tuple(header["shape"]) for name, header in headers.items()}
        #: As safetensors calls them, by tensor.
        self.dtypes = {name: str(header["dtype"]) for name, header in headers.items()}
        #: Bytes, by tensor.
        self.sizes = {name: _span(header) for name, header in headers.items()}
        config = json.loads(self._store.read(CONFIG, 1 << 24))
        self._is_tied = bool(config.get("tie_word_embeddings", False))

    def checked(self, tensors: Mapping[str, Any]) -> list[str]:
        """The names to write, in order; refuse tensors that are not those of the model."""
        given, wanted = set(tensors), set(self._shapes)
        if self._is_tied:
            # Some trainers keep, and some checkpoints have, a head that is the embedding again.
            given, wanted = given - ({_TIED_HEAD} - wanted), wanted - ({_TIED_HEAD} - given)
        if missing := wanted - given:
            raise PolicyRejected(
                f"params lack {some_names(missing)}, which {self._location} has; give the parameters of the whole model"
            )
        if unknown := given - wanted:
            raise PolicyRejected(
                f"params hold {some_names(unknown)}, which {self._location} does not have; give a mapping to its names "
                "(mapping=), or the checkpoint of this model as like="
            )
        for name in sorted(wanted):
            if (shape := shape_of(tensors, name)) != self._shapes[name]:
                raise PolicyRejected(
                    f"params: {name} has shape {shape}, and {self._shapes[name]} in {self._location}; projections are "
                    "[out, in] in a checkpoint, which a mapping of a JAX model sees to (mapping=)"
                )
        return [name for name in self._shapes if name in wanted]

    def copy_to(self, directory: Path) -> None:
        """Config, tokenizer and what else lies beside the weights."""
        for name, size, _ in self._beside:
            (directory / name).write_bytes(self._store.read(name, size))


def _span(header: Mapping[str, Any]) -> int:
    start, end = header["data_offsets"]
    return int(end) - int(start)


def _width(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in the order given, as many to a file as fit; a tensor larger than a file has one of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _cast(name: str, host: NDArray[Any], dtype: str | None) -> NDArray[Any]:
    """A contiguous array of the dtype that is to be written."""
    if dtype is not None and host.dtype.name != dtype:
        if host.dtype.name not in _FLOATS.values():
            raise PolicyRejected(f"params: {name} is of {host.dtype.name}, which is not written as {dtype}; cast it")
        host = host.astype(_numpy_dtype(dtype))
    return np.ascontiguousarray(host)


def _numpy_dtype(name: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        ml_dtypes = importlib.import_module("ml_dtypes")
    except ImportError:
        raise PolicyRejected(
            "to write bfloat16 takes ml_dtypes, which JAX brings: pip install ml_dtypes, or name another dtype"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def _import_safetensors() -> Any:
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise PolicyRejected("to write checkpoints takes safetensors: pip install safetensors") from None
    return save_file


def _flush(directory: Path) -> None:
    """Else a crash of the machine could leave a whole name, and files without their bytes."""
    for file in directory.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
