"""A trainer's parameters under the names and in the layout of a Hugging Face checkpoint.

Invariant: a tensor comes out under one name or the whole is refused, and what is refused is named; no tensor is made
before it is asked for, so that a second copy of the weights never lies on the trainer's devices at once.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from rollpool.schemas.errors import PolicyRejected, SettingsError

#: What the engine's paths, in which Tunix's mappings end, call the weights of an embedding and of a norm.
_ENGINE_KINDS = ("embedding", "scale")

#: Ends of the modules whose weights are kept with one row a token: in no line are they the other way round.
_TABLES = ("embed_tokens",)

#: Attention projections of [embed, heads, head] and of [heads, head, embed], as Tunix keeps them.
_PER_HEAD_OUT = ("q_proj", "k_proj", "v_proj")
_PER_HEAD_IN = ("o_proj",)

#: Names that an error lists at most.
_NAMED = 5


class ParamsSink(Protocol):
    """Where a trainer's parameters go, so that hosts can take them up: a folder of checkpoints, or an engine here."""

    @property
    def check(self) -> bool:
        """Whether the publisher may look at what was put: False where it is no checkpoint with files."""

    def put(self, version: int, tensors: Mapping[str, Any]) -> str:
        """Take the tensors of a version, and return the checkpoint to publish.

        Runs in the thread that called `publish_policy`. When it returns, the trainer may overwrite or donate its
        arrays.

        Args:
            version: About to be published.
            tensors: Arrays by Hugging Face name, in Hugging Face layout. Each is made as it is asked for.

        Raises:
            PolicyRejected: they are not those of the model, or cannot be put there.
        """

    def holds(self, checkpoint: str) -> bool:
        """Whether what `put` returned before is still there. Where not, a repeated `publish_policy` puts it again."""


class HfTensors(Mapping[str, Any]):
    """Arrays by Hugging Face name, in Hugging Face layout, each made when it is asked for."""

    def __init__(self, parts: Mapping[str, "_Part"]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> Any:
        return self._parts[name].made()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one, without making it."""
        return self._parts[name].shape

    def on_host(self, name: str) -> NDArray[Any]:
        """One in this process's memory, and turned there: no device makes a copy, however it is sharded."""
        part = self._parts[name]
        return cast(NDArray[Any], replace(part, array=_on_host(name, part.array)).made())


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor: the trainer's array, and what is done to it."""

    array: Any
    #: Reshaped to this first; None: as it is.
    flat: tuple[int, ...] | None = None
    #: Then rows and columns change places.
    is_turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(int(size) for size in (self.flat or self.array.shape))
        return shape[::-1] if self.is_turned else shape

    def made(self) -> Any:
        array = self.array if self.flat is None else self.array.reshape(self.flat)
        return array.transpose((1, 0)) if self.is_turned else array


def hf_tensors(params: Any, mapping: Any = None) -> HfTensors:
    """Name and turn a trainer's parameters as a Hugging Face checkpoint has them. JAX is not needed.

    Args:
        params: Arrays (JAX, numpy) in a flat mapping by name, in nested dicts and lists whose joined keys are the
            names, or in a flax `nnx.State`.
        mapping: None where names and layout are Hugging Face's already. Else Tunix's configuration of the model
            (`MappingConfig`, or a dict with its fields), by which names are translated; weights are then taken to be
            as JAX models keep them, [in, out], and attention per head, and come out as [out, in].

    Returns:
        A mapping of names to arrays; nothing is computed before an array is taken from it.

    Raises:
        PolicyRejected: a name has no translation, two have the same, or a leaf is no array or of a shape that has no
            place in a checkpoint.
        SettingsError: the mapping is none.
    """
    if mapping is None:
        return HfTensors(_unique((name, _Part(array)) for name, array in _leaves(params)))
    tunix = _Mapping.of(mapping)
    return HfTensors(_unique(_turned(name, array) for name, array in tunix.translated(params)))


def shape_of(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The shape of one of the tensors that a sink was given, without making it where that can be."""
    return tensors.shape(name) if isinstance(tensors, HfTensors) else tuple(int(size) for size in tensors[name].shape)


def on_host(tensors: Mapping[str, Any], name: str) -> NDArray[Any]:
    """One of the tensors that a sink was given, in this process's memory.

    Raises:
        PolicyRejected: it cannot be had here.
    """
    return tensors.on_host(name) if isinstance(tensors, HfTensors) else _on_host(name, tensors[name])


def _on_host(name: str, array: Any) -> NDArray[Any]:
    try:
        return np.asarray(array)
    except RuntimeError as error:
        raise PolicyRejected(
            f"params: {name} cannot be copied from its devices: {error}; an array that was donated is gone, and one "
            "that lies on several hosts is gathered first (jax.experimental.multihost_utils.process_allgather)"
        ) from error


def some_names(names: Iterable[str]) -> str:
    """Names for an error: the first few, and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more


def _leaves(params: Any) -> list[tuple[str, Any]]:
    """The arrays of a pytree by their joined paths."""
    if not hasattr(params, "flat_state") and not isinstance(params, Mapping):
        raise PolicyRejected(
            f"params: expected arrays by name, in dicts or in an nnx.State, got {type(params).__name__}; give "
            "nnx.state(model) of a flax model"
        )
    found = [(".".join(path), _array(path, leaf)) for path, leaf in _walk((), params)]
    if not found:
        raise PolicyRejected("params hold no array; give the parameters of the whole model")
    return found


def _walk(path: tuple[str, ...], node: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    pairs: Iterable[tuple[Any, Any]]
    if isinstance(node, Mapping):
        pairs = node.items()
    elif hasattr(node, "flat_state"):
        yield from (((*path, *map(str, keys)), leaf) for keys, leaf in node.flat_state())
        return
    elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
        pairs = enumerate(node)
    else:
        yield path, node
        return
    for key, child in pairs:
        yield from _walk((*path, str(key)), child)


def _array(path: tuple[str, ...], leaf: Any) -> Any:
    """The array of a leaf: itself, or what a flax variable holds."""
    if callable(getattr(leaf, "get_value", None)):
        leaf = leaf.get_value()
    elif not hasattr(leaf, "dtype") and hasattr(leaf, "value"):
        leaf = leaf.value
    if not all(hasattr(leaf, needed) for needed in ("shape", "dtype", "reshape", "transpose")):
        raise PolicyRejected(f"params: {'.'.join(path)} is no array but {type(leaf).__name__}; give arrays alone")
    return leaf


def _unique(parts: Iterable[tuple[str, _Part]]) -> dict[str, _Part]:
    made: dict[str, _Part] = {}
    for name, part in parts:
        if name in made:
            raise PolicyRejected(f"params: two arrays are to be {name}; a checkpoint has one of each name")
        made[name] = part
    return made


@dataclass(frozen=True, slots=True)
class _Mapping:
    """Tunix's way from the trainer's names to the engine's."""

    #: Source to (target, sharding), with `*` for a layer's number.
    names: Mapping[str, Any]
    transposes: Mapping[str, Sequence[int]]
    hooks: Mapping[str, Callable[[Any], Any]]
    preprocess: Callable[[Any], Any] | None

    @classmethod
    def of(cls, given: Any) -> "_Mapping":
        names = _field(given, "to_hf_mappings")
        if not isinstance(names, Mapping) or not names:
            raise SettingsError(
                f"mapping: expected Tunix's MappingConfig, or a dict with its to_hf_mappings, got {given!r:.200}; "
                'MappingConfig.build(model=model, backend="sglang_jax") makes one'
            )
        return cls(
            names=names,
            transposes=_field(given, "to_hf_transpose_keys") or {},
            hooks=_field(given, "to_hf_hook_fns") or {},
            preprocess=_field(given, "preprocess_src_state", is_function=True),
        )

    def translated(self, params: Any) -> Iterator[tuple[str, Any]]:
        """Each array under the engine's name, turned as the mapping asks."""
        leaves = _leaves(self.preprocess(params) if self.preprocess else params)
        # Generators of random numbers are part of a model's state, and of no checkpoint.
        leaves = [(name, array) for name, array in leaves if "rng" not in name]
        targets = self._targets([name for name, _ in leaves])
        for name, array in leaves:
            for target, one in _unrolled(name, array, *targets[name]):
                yield target, self._changed(name, one)

    def _target(self, name: str) -> tuple[str, Any] | None:
        for source, entry in self.names.items():
            pattern = re.escape(source).replace(r"\*", r"(\d+)")
            if match := re.fullmatch(pattern, name):
                target, sharding = (entry, None) if isinstance(entry, str) else (entry[0], entry[1])
                return _filled(target, match.groups()), sharding
        return None

    def _targets(self, names: Sequence[str]) -> dict[str, tuple[str, Any]]:
        found = {name: self._target(name) for name in names}
        if adapters := [name for name in names if "lora" in name]:
            raise PolicyRejected(
                f"params hold an adapter's weights ({some_names(adapters)}), which are not those of a whole model: "
                "merge them into the model's, or write them in peft's layout and publish them by lora_path"
            )
        if unknown := [name for name, target in found.items() if target is None]:
            raise PolicyRejected(
                f"params: the mapping has no name for {some_names(unknown)}; add it to to_hf_mappings, or give the "
                "parameters under their Hugging Face names and no mapping"
            )
        return {name: target for name, target in found.items() if target is not None}

    def _changed(self, name: str, array: Any) -> Any:
        axes = self._axes(name)
        if axes is not None:
            array = array.transpose(tuple(axes))
        return self.hooks[name](array) if name in self.hooks else array

    def _axes(self, name: str) -> Sequence[int] | None:
        """As Tunix looks them up: by the last part of the name, by the name, by a pattern."""
        for key in (name.rpartition(".")[2], name):
            if key in self.transposes:
                return self.transposes[key]
        for key, axes in self.transposes.items():
            if "*" in key and re.fullmatch(re.escape(key).replace(r"\*", ".*"), name):
                return axes
        return None


def _field(given: Any, name: str, *, is_function: bool = False) -> Any:
    value = given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
    return value() if callable(value) and not is_function else value


def _filled(target: str, numbers: Sequence[str]) -> str:
    if any(char in target for char in "|()"):
        raise PolicyRejected(
            f"mapping: {target!r} is a pattern for several names, by which no single one can be made; give one entry "
            "for each layer"
        )
    for number in numbers:
        target = target.replace("*", number, 1)
    return target


def _unrolled(name: str, array: Any, target: str, sharding: Any) -> Iterator[tuple[str, Any]]:
    """The layers of an array that holds all of them, which the mapping marks by an axis called `layer`."""
    axes = list(sharding) if isinstance(sharding, list | tuple) else []
    if "layer" not in axes:
        if "*" in target:
            raise PolicyRejected(f"mapping: {name} is to be {target}, whose number {name} does not tell")
        yield target, array
        return
    axis = axes.index("layer")
    for number in range(array.shape[axis]):
        yield target.replace("*", str(number), 1), array[(slice(None),) * axis + (number,)]


def _turned(target: str, array: Any) -> tuple[str, _Part]:
    """The engine's name and layout to Hugging Face's."""
    module, _, kind = target.rpartition(".")
    shape = tuple(int(size) for size in array.shape)
    if kind in _ENGINE_KINDS:
        return f"{module}.weight", _Part(array)
    if kind == "bias":
        return target, _Part(array, (math.prod(shape),))
    if len(shape) == 1 or module.endswith(_TABLES):
        return target, _Part(array)
    if len(shape) == 2:
        return target, _Part(array, is_turned=True)
    if len(shape) == 3 and module.endswith(_PER_HEAD_OUT):
        return target, _Part(array, (shape[0], shape[1] * shape[2]), is_turned=True)
    if len(shape) == 3 and module.endswith(_PER_HEAD_IN):
        return target, _Part(array, (shape[0] * shape[1], shape[2]), is_turned=True)
    raise PolicyRejected(
        f"params: {target} has shape {shape}, which has no known place in a checkpoint; split or reshape it in "
        "preprocess_src_state of the mapping"
    )
