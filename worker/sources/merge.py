"""An adapter merged into its base: a checkpoint for engines that take no adapters.

Invariant: each matrix that the adapter is on becomes `W + scale * B @ A`, computed in float32 and rounded once to the
base's type, and every other byte of the weights is the base's; an adapter of which that cannot be said is refused. Of
the matrices only some rows are in memory at a time.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rollpool.schemas import PolicyRejected
from rollpool.worker.engines.protocol import OnProgress
from rollpool.worker.sources.adapter import AdapterFacts, Target, adapter_facts
from rollpool.worker.sources.tensors import FLOATS, Floats, Tensor, layout, read_rows, write_rows

INDEX_FILE = "model.safetensors.index.json"

#: Elements of a matrix that are worked on at once: 64 MiB in float32, and a few such pieces are alive at a time.
_PIECE = 1 << 24

#: Bytes copied at once.
_CHUNK = 1 << 24

#: Weights in formats that are not merged, and so must not stand beside the merged ones.
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}

#: Names of the two ends of a model, which share one matrix where they are tied.
_ENDS = ("embed_tokens", "lm_head", "wte")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """What becomes of each file of the base."""

    base: Path
    facts: AdapterFacts
    #: Shards to rewrite, relative to the base, each with its tensors and the targets in it.
    rewritten: Mapping[str, Sequence[tuple[Tensor, Target]]]
    #: Files that stay as they are, relative to the base. They are copied: a link would change with the base.
    copied: Sequence[str]

    @property
    def bytes(self) -> int:
        """Size of the merged checkpoint."""
        return sum((self.base / name).stat().st_size for name in (*self.rewritten, *self.copied))


def merge_adapter(base: Path, adapter: Path, out: Path, on_progress: OnProgress = lambda _done, _all: None) -> None:
    """Write the checkpoint `out`: all of it, or nothing.

    Args:
        base: directory of a checkpoint in safetensors.
        adapter: directory of an adapter in peft's layout.
        out: the directory to make; it must not be there.
        on_progress: told bytes written and bytes in all; what it raises ends the merge.

    Raises:
        PolicyRejected: the adapter does not fit the base, or cannot be merged exactly.
    """
    plan = plan_merge(base, adapter)
    if out.exists():
        raise PolicyRejected(f"cannot merge into {out}: it is there already; remove it, or name another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        carry_out(plan, temporary, on_progress)
        temporary.chmod(0o755)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plan_merge(base: Path, adapter: Path) -> MergePlan:
    """Decide all of a merge from headers and configs.

    Raises:
        PolicyRejected: as `merge_adapter`.
    """
    facts = adapter_facts(adapter)
    if facts.oddities:
        raise PolicyRejected(f"the adapter {adapter} cannot be merged exactly: {'; '.join(facts.oddities)}")
    config = _read_json(base / "config.json", base)
    shards = {file.name: layout(file) for file in sorted(base.glob("*.safetensors"))}
    if not shards:
        raise PolicyRejected(f"{base} has no weights in safetensors, the only format adapters are merged into")
    _check_index(base, shards)
    _check_plain_base(config, shards, base, facts)
    rewritten: dict[str, list[tuple[Tensor, Target]]] = {}
    for target in facts.targets:
        shard = _shard_of(f"{target.module}.weight", shards, base)
        tensor = shards[shard][f"{target.module}.weight"]
        _check_fit(target, tensor, base)
        rewritten.setdefault(shard, []).append((tensor, target))
    _check_saved_along(facts, shards, base)
    copied = [name for name in _files(base) if name not in rewritten]
    return MergePlan(base=base, facts=facts, rewritten=rewritten, copied=copied)


def _read_json(file: Path, base: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except FileNotFoundError:
        raise PolicyRejected(f"{base} has no {file.name}: the base must be a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise PolicyRejected(f"cannot read {file}: {error}; write the checkpoint anew") from error
    if not isinstance(read, dict):
        raise PolicyRejected(f"{file} is not an object; write the checkpoint anew")
    return read


def _check_index(base: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Where there is an index, what it names must be there."""
    if not (base / INDEX_FILE).is_file():
        return
    for name, file in _read_json(base / INDEX_FILE, base).get("weight_map", {}).items():
        if name not in shards.get(file, {}):
            raise PolicyRejected(f"{base} is not whole: {INDEX_FILE} says {name} is in {file}, and it is not")


def _check_plain_base(
    config: Mapping[str, Any], shards: Mapping[str, Mapping[str, Tensor]], base: Path, facts: AdapterFacts
) -> None:
    if config.get("quantization_config"):
        raise PolicyRejected(f"{base} is quantized: an adapter merged into it would be rounded away; name another base")
    ends = [target.module for target in facts.targets if target.module.rpartition(".")[2] in _ENDS]
    if ends and _tied(config, shards):
        raise PolicyRejected(
            f"the adapter {facts.path} is on {', '.join(ends)}, and {base} ties its embeddings: a merge would change "
            "both ends of the model, which the adapter does not; train it without them"
        )


def _tied(config: Mapping[str, Any], shards: Mapping[str, Mapping[str, Tensor]]) -> bool:
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(said := part.get("tie_word_embeddings"), bool):
            return said
    return not any(name.endswith("lm_head.weight") for tensors in shards.values() for name in tensors)


def _shard_of(name: str, shards: Mapping[str, Mapping[str, Tensor]], base: Path) -> str:
    found = [file for file, tensors in shards.items() if name in tensors]
    if not found:
        raise PolicyRejected(f"the adapter is on {name}, which {base} does not have: was it trained on another base?")
    if len(found) > 1:
        raise PolicyRejected(f"{base} has {name} in {' and in '.join(found)}: which of them counts is not known")
    return found[0]


def _check_fit(target: Target, tensor: Tensor, base: Path) -> None:
    if tensor.shape != (target.rows, target.columns):
        raise PolicyRejected(
            f"the adapter's change of {target.module} is {target.rows} by {target.columns}, the weight in {base} is "
            f"{' by '.join(map(str, tensor.shape))}: was it trained on another base?"
        )
    if tensor.dtype not in FLOATS:
        raise PolicyRejected(
            f"{target.module} in {base} is stored as {tensor.dtype}; adapters are merged into float32, float16 and "
            "bfloat16 only"
        )


def _check_saved_along(facts: AdapterFacts, shards: Mapping[str, Mapping[str, Tensor]], base: Path) -> None:
    """Weights that peft saved beside the adapter are the base's own, to the bit, or they were trained."""
    for name, module in facts.saved_along:
        shard = _shard_of(f"{module}.weight", shards, base)
        mine, its = facts.tensors[name], shards[shard][f"{module}.weight"]
        same = (mine.dtype, mine.shape) == (its.dtype, its.shape)
        if not (same and _equal(facts.path / "adapter_model.safetensors", mine, base / shard, its)):
            raise PolicyRejected(
                f"{name} in the adapter {facts.path} differs from {module}.weight in {base}: it was trained along, "
                "or on another base; save the adapter with save_embedding_layers=False if it was not"
            )


def _equal(one: Path, mine: Tensor, other: Path, its: Tensor) -> bool:
    with one.open("rb") as left, other.open("rb") as right:
        left.seek(mine.offset)
        right.seek(its.offset)
        sizes = [_CHUNK] * (mine.size // _CHUNK) + [mine.size % _CHUNK]
        return all(left.read(size) == right.read(size) for size in sizes)


def _files(base: Path) -> Iterator[str]:
    """What belongs to the checkpoint, relative to it, less what is hidden and weights that are not merged."""
    for file in sorted(base.rglob("*")):
        name = file.relative_to(base)
        hidden = any(part.startswith(".") for part in name.parts)
        nested_weights = file.suffix == ".safetensors" and len(name.parts) > 1
        if file.is_file() and not hidden and not nested_weights and file.suffix not in _OTHER_WEIGHTS:
            yield str(name)


def carry_out(plan: MergePlan, out: Path, on_progress: OnProgress) -> None:
    """Write a merged checkpoint into an empty directory; each file is on the disk when this returns."""
    total, done = plan.bytes, 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        on_progress(done, total)

    advance(0)
    for name in plan.copied:
        _copy(plan.base / name, out / name, advance)
    with (plan.facts.path / "adapter_model.safetensors").open("rb") as matrices:
        for name, targets in plan.rewritten.items():
            _copy(plan.base / name, out / name, advance)
            with (out / name).open("r+b") as shard:
                for tensor, target in targets:
                    _add(shard, tensor, target, matrices, plan.facts)
                    advance(0)
                shard.flush()
                os.fsync(shard.fileno())


def _copy(source: Path, to: Path, advance: Callable[[int], None]) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, to.open("xb") as write:
        while chunk := read.read(_CHUNK):
            write.write(chunk)
            advance(len(chunk))
        write.flush()
        os.fsync(write.fileno())


def _add(shard: BinaryIO, tensor: Tensor, target: Target, matrices: BinaryIO, facts: AdapterFacts) -> None:
    """Add the adapter's change to one matrix, some rows at a time."""
    a, b = (_whole(matrices, facts.tensors[name]) for name in (target.a, target.b))
    left, right = (a.T, b.T) if target.transposed else (b, a)
    # Scaled as peft does it: after the product.
    scale = np.float32(facts.scale)
    step = max(1, _PIECE // target.columns)
    for start in range(0, target.rows, step):
        stop = min(start + step, target.rows)
        rows = read_rows(shard, tensor, start, stop)
        rows += (left[start:stop] @ right) * scale
        try:
            write_rows(shard, tensor, start, rows)
        except OverflowError as error:
            raise PolicyRejected(
                f"the adapter {facts.path} merged into {target.module}.weight is {error}: one of the two is broken"
            ) from None


def _whole(file: BinaryIO, tensor: Tensor) -> Floats:
    return read_rows(file, tensor, 0, tensor.shape[0])
