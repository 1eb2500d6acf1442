"""What a source must hold to be served, and what it held when it was published.

Invariant: a source that passed is whole: every file that its own index names is there and has the size that its header
says, so a copy that was cut short, or a checkpoint that is still being written, is found before any host is told.
"""

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from rollpool.schemas.errors import PolicyRejected
from rollpool.schemas.policies import SourceFile
from rollpool.schemas.roots import check_roots as check_roots
from rollpool.schemas.roots import is_hub_name as is_hub_name
from rollpool.schemas.roots import is_remote as is_remote
from rollpool.schemas.roots import local_path as local_path
from rollpool.schemas.stores import Store, digest_of, open_store

Kind = Literal["checkpoint", "adapter"]

#: Told of the bytes that were read for digests, and of how many there are to read.
Progress = Callable[[int, int], None]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

#: What tokenizers and engines read beside config and weights, where it is there.
_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "preprocessor_config.json",
    "hf_quant_config.json",
)

#: Bytes of a JSON file at most: the index of the largest models has some 10 MB, a tokenizer some 30.
_MOST_JSON = 128 << 20

#: Bytes of a safetensors header at most, as safetensors itself has it.
_MOST_HEADER = 100_000_000

#: Threads that make digests: one reads while another computes; more would only turn the disk's head.
_THREADS = 4


def inventory(
    location: str,
    kind: Kind,
    *,
    digests: bool,
    on_progress: Progress | None = None,
    roots: Sequence[str] = (),
) -> tuple[SourceFile, ...]:
    """What a source holds, whole. Blocks, for long where it makes digests.

    Args:
        location: a directory, or a URL that fsspec knows.
        kind: of weights.
        digests: read every file here for its sha256; of files behind URLs, ask their server for what it knows.
        on_progress: hears of the bytes read for digests; from several threads, one at a time.
        roots: where it must lie, with each of its files; empty: anywhere.

    Returns:
        Its files; none for a name on a hub, which only the engine can look up.

    Raises:
        PolicyRejected: it is outside the roots, something is missing or broken, or it cannot be read.
    """
    check_roots(location, roots)
    if is_hub_name(location):
        return ()
    store = open_store(location)
    names = list(dict.fromkeys(_checkpoint(store) if kind == "checkpoint" else _adapter(store)))
    for name in names:
        # A file may be a link to one elsewhere.
        check_roots(store.path(name), roots)
    sizes = [_size(store, name) for name in names]
    tags = _tags(store, names, sizes, on_progress) if digests else itertools.repeat("")
    return tuple(SourceFile(*file) for file in zip(names, sizes, tags, strict=False))


def digest_matches(path: Path, file: SourceFile) -> bool | None:
    """Whether a local copy is the file that was published; None where its digest is of a kind that is not made here."""
    try:
        if path.stat().st_size != file.size:
            return False
        algorithm, _, digest = file.digest.partition(":")
        return digest_of(path, algorithm) == digest if algorithm in ("sha256", "md5") else None
    except FileNotFoundError:
        return False


def _tags(store: Store, names: Sequence[str], sizes: Sequence[int], on_progress: Progress | None) -> list[str]:
    total, done, lock = sum(sizes), 0, threading.Lock()

    def growing(name: str) -> PolicyRejected:
        return PolicyRejected(f"{store.path(name)} is being written; publish it when it is finished")

    def tag(name: str, size: int) -> str:
        mine = 0

        def read(count: int) -> None:
            nonlocal mine, done
            mine += count
            if mine > size:  # at once: it may grow as fast as it is read
                raise growing(name)
            with lock:
                done += count
                if on_progress:
                    on_progress(done, total)

        told = store.tag(name, read)
        if mine not in (0, size):
            raise growing(name)
        return told

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="rollpool-digest") as threads:
        return list(threads.map(tag, names, sizes))


def _size(store: Store, name: str) -> int:
    size = store.size(name)
    if size is None:
        raise PolicyRejected(f"{store.path(name)} is missing; write the source whole, then publish it")
    return size


def _checkpoint(store: Store) -> Iterator[str]:
    """The names of a checkpoint's files, each of which was looked at."""
    if store.size(CONFIG) is None:
        note = f"; {ADAPTER_CONFIG} is there: give an adapter as lora_path" if store.size(ADAPTER_CONFIG) else ""
        raise PolicyRejected(
            f"{store.path(CONFIG)} is missing: a checkpoint is a directory in Hugging Face's layout, as "
            f"save_pretrained writes it{note}"
        )
    _json(store, CONFIG)
    yield CONFIG
    yield from _weights(store)
    for name in _BESIDE:
        if store.size(name) is not None:
            if name.endswith(".json"):
                _json(store, name, of=(dict, list))
            yield name


def _weights(store: Store) -> Iterator[str]:
    whole, index = store.size(WEIGHTS) is not None, store.size(INDEX) is not None
    if not whole and not index:
        raise PolicyRejected(
            f"{store.path(WEIGHTS)} is missing, and so is {INDEX}: weights are read from safetensors alone, since "
            "other files can run code; save with save_pretrained(…, safe_serialization=True)"
        )
    if whole:
        tensors_of(store, WEIGHTS)
        yield WEIGHTS
    if index:
        yield INDEX
        yield from _shards(store)


def _shards(store: Store) -> Iterator[str]:
    """The shards of an index, each with all of the tensors that it is to have."""
    where = _json(store, INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise PolicyRejected(f"{store.path(INDEX)} has no weight_map, which says what is in which shard")
    wanted: dict[str, set[str]] = {}
    for tensor, shard in where.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise PolicyRejected(
                f"{store.path(INDEX)}: {tensor} is in {shard!r}; a shard is a safetensors file beside its index"
            )
        wanted.setdefault(shard, set()).add(tensor)
    absent = [shard for shard in wanted if store.size(shard) is None]
    if absent:
        raise PolicyRejected(
            f"{store.path(absent[0])} is missing, one of {len(absent)} of {len(wanted)} shards that {INDEX} names; "
            "write the checkpoint whole, then publish it"
        )
    for shard, tensors in wanted.items():
        lacking = tensors - tensors_of(store, shard).keys()
        if lacking:
            raise PolicyRejected(
                f"{store.path(shard)} lacks {min(lacking)}, which {INDEX} places there; they are of different saves"
            )
        yield shard


def _adapter(store: Store) -> Iterator[str]:
    """The names of an adapter's files, each of which was looked at."""
    if store.size(ADAPTER_CONFIG) is None:
        note = f"; {CONFIG} is there: give a checkpoint as checkpoint" if store.size(CONFIG) else ""
        raise PolicyRejected(
            f"{store.path(ADAPTER_CONFIG)} is missing: an adapter is a directory in peft's layout, as save_pretrained "
            f"of a PeftModel writes it{note}"
        )
    config = _json(store, ADAPTER_CONFIG)
    _check_adapter_config(store.path(ADAPTER_CONFIG), config)
    yield ADAPTER_CONFIG
    if store.size(ADAPTER_WEIGHTS) is None:
        raise PolicyRejected(
            f"{store.path(ADAPTER_WEIGHTS)} is missing: adapters are read from safetensors alone; write the adapter "
            "whole, then publish it"
        )
    if not tensors_of(store, ADAPTER_WEIGHTS):
        raise PolicyRejected(f"{store.path(ADAPTER_WEIGHTS)} holds no tensor: nothing was trained, or nothing saved")
    yield ADAPTER_WEIGHTS


def _check_adapter_config(path: str, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise PolicyRejected(f"{path}: peft_type is {config.get('peft_type')!r}; adapters are LORA")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise PolicyRejected(f"{path}: r is {rank!r}; expected the rank, at least 1")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise PolicyRejected(f"{path}: lora_alpha is {alpha!r}; expected a number")
    if not isinstance(targets, str | list) or not targets:
        raise PolicyRejected(f"{path}: target_modules is {targets!r}; expected the names of the adapted modules")


def _json(store: Store, name: str, of: type | tuple[type, ...] = dict) -> Any:
    size = _size(store, name)
    if size > _MOST_JSON:
        raise PolicyRejected(f"{store.path(name)} has {size} bytes; that is no {name}")
    return _parsed(store.path(name), store.read(name, size), of)


def _parsed(path: str, body: bytes, of: type | tuple[type, ...] = dict) -> Any:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise PolicyRejected(f"{path} is not whole JSON: {error}; write it whole, then publish") from None
    if not isinstance(value, of):
        raise PolicyRejected(f"{path} is not a JSON object but {type(value).__name__}")
    return value


def tensors_of(store: Store, name: str) -> dict[str, Any]:
    """The tensors of a safetensors file by name, as its header describes them; the file is known to be whole.

    Raises:
        PolicyRejected: its header is none, or its size is not what the header says.
    """
    path, size = store.path(name), _size(store, name)
    length = int.from_bytes(store.read(name, 8).ljust(8, b"\0"), "little")
    if size < 8 or not 2 <= length <= min(_MOST_HEADER, size - 8):
        raise PolicyRejected(f"{path} has {size} bytes and no whole safetensors header; write it whole, then publish")
    header = _parsed(f"the header of {path}", store.read(name, 8 + length)[8:])
    header.pop("__metadata__", None)
    data = _end_of(path, header.values())
    if size != 8 + length + data:
        raise PolicyRejected(
            f"{path} has {size} bytes where its header says {8 + length + data}: it is still being written, or was cut "
            "short; write it whole, then publish"
        )
    return dict(header)


def _end_of(path: str, tensors: Iterable[Any]) -> int:
    """Bytes of the tensors, which lie one after another."""
    spans = sorted(_span(path, tensor) for tensor in tensors)
    end = 0
    for start, stop in spans:
        if start != end or stop < start:
            raise PolicyRejected(f"the header of {path} places tensors over one another, or leaves holes; save it anew")
        end = stop
    return end


def _span(path: str, tensor: Any) -> tuple[int, int]:
    span = tensor.get("data_offsets") if isinstance(tensor, dict) else None
    if not isinstance(span, list) or len(span) != 2 or not all(type(offset) is int for offset in span):
        raise PolicyRejected(f"the header of {path} describes a tensor without data_offsets; save it anew")
    return span[0], span[1]
