"""New weights for a running model: loaded by the engine's own loader, compared with the live ones, put in their place.

The live `nnx.Variable`s are written, and the compiled model's arguments are split from them anew: loading an adapter
splits the model too, and would undo a change of the arguments alone.

Invariant: the model's arguments are always those of its variables, in the order and form it was compiled for; and until
every tensor of the new weights was seen to be there, of the same shape, type and sharding, and finite, no variable is
written.
"""

import copy
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING or __package__:
    from rollpool.worker.launch.hot_swap_files import some
    from rollpool.worker.launch.hot_swap_messages import Refused
    from rollpool.worker.launch.hot_swap_params import Tensors, assign, check_names
else:
    from hot_swap_files import some
    from hot_swap_messages import Refused
    from hot_swap_params import Tensors, assign, check_names

#: Where a tensor is in a model, as dotted names.
Name = str

#: What an adapter adds to a model: variables that no checkpoint has.
_BUFFERS = ("A_buffer", "B_buffer")

#: The module between a layer that can take adapters and its own weights.
_WRAPPER = "base_layer"

#: What config.json says that changes nothing that is computed.
_CONFIG_IGNORED = frozenset(
    {"_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range"}
)

#: Kept free on each device beside a second copy: what loading takes in passing.
_HEADROOM_BYTES = 512 * 2**20

#: By thread: whoever wants each tensor as soon as it is loaded, and what takes the place of the files.
_streaming = threading.local()


def variables(model: Any) -> dict[Name, Any]:
    """The live variables of a model that a checkpoint fills, by the names they have without adapters."""
    found = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and path[-1] not in _BUFFERS:
            found[".".join(str(part) for part in path if part != _WRAPPER)] = node
    return found


def config_of(model_config_class: Any, server_args: Any, model_path: str) -> Any:
    """The engine's reading of a checkpoint's config.

    Raises:
        Refused: It cannot be read.
    """
    from sgl_jax.srt import hf_transformers_utils

    if clear := getattr(hf_transformers_utils.get_config, "cache_clear", None):
        clear()  # It remembers directories by name, though another may have taken the name since.
    try:
        return model_config_class.from_server_args(server_args, model_path=model_path)
    except Exception as error:
        raise Refused(f"the engine cannot read the config of {model_path}: {error}") from error


def check_config(served: Any, new: Any) -> None:
    """See that a checkpoint is of the model that was compiled.

    Args:
        served: The config of what serves, as the engine read it, before it was changed for the mesh.
        new: Of the checkpoint.

    Raises:
        Refused: They differ in what the compiled model or the scheduler took from the first.
    """
    old_values, new_values = _plain(served), _plain(new)
    different = sorted(
        key for key in old_values.keys() | new_values.keys() if old_values.get(key) != new_values.get(key)
    )
    if different:
        told = [f"{key}: {new_values.get(key)!r} where {old_values.get(key)!r} serves" for key in different]
        message = f"{new.model_path} is of another model than the one that serves: {some(told)}"
        raise Refused(message, restart_may_help=True)


def _plain(config: Any) -> dict[str, Any]:
    values = {key: value for key, value in config.hf_config.to_dict().items() if key not in _CONFIG_IGNORED}
    return values | {"computed in": str(config.dtype), "ends at": sorted(config.hf_eos_token_id or ())}


def load(runner: Any, config: Any, tensors: Tensors | None = None) -> Any:
    """Load weights as the engine does at its start, quantization included.

    Args:
        runner: The `ModelRunner` that serves; it is left as it is.
        config: The checkpoint's, not yet changed for the mesh.
        tensors: In the place of the checkpoint's own; see `hot_swap_params`.

    Returns:
        A model of the same kind.

    Raises:
        Refused: The loader fails.
    """
    shell = copy.copy(runner)
    shell.model_config = config
    _streaming.tensors = tensors
    try:
        type(runner).load_model(shell)
    except Refused:
        raise
    except Exception as error:
        # The same config loaded before: so it is the files', unless there was no room for them or no way to them.
        elsewhere = isinstance(error, OSError) or is_out_of_memory(error)
        message = f"the engine cannot load {config.model_path}: {type(error).__name__}: {error}"
        raise Refused(message, restart_may_help=elsewhere) from error
    finally:
        _streaming.tensors = None
    return shell.model


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether a device had no room."""
    return "RESOURCE_EXHAUSTED" in str(error)


def fits_beside(runner: Any) -> bool:
    """Tell whether every device has room for a second copy; True where it does not tell."""
    need: dict[Any, int] = {}
    for variable in variables(runner.model).values():
        for shard in getattr(variable.get_value(), "addressable_shards", ()):
            need[shard.device] = need.get(shard.device, 0) + shard.data.nbytes
    for device, size in need.items():
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats and stats["bytes_limit"] - stats["bytes_in_use"] < size + _HEADROOM_BYTES:
            return False
    return True


class Comparison:
    """Compares new tensors with the live ones of the same name, one by one.

    Args:
        runner: The `ModelRunner` that serves.
        source: Where the new ones are from, for messages.
    """

    def __init__(self, runner: Any, source: str) -> None:
        self._live = variables(runner.model)
        self._source = source
        self._seen: set[Name] = set()

    def see(self, name: Name, value: jax.Array) -> None:
        """See that one tensor can take its live one's place.

        Raises:
            Refused: It cannot.
        """
        if name not in self._live:
            raise Refused(
                f"{self._source} gave the engine a tensor {name} that what serves lacks", restart_may_help=True
            )
        live = self._live[name].get_value()
        if value.shape != live.shape:
            raise Refused(f"{self._source}: {name} has shape {value.shape}; {live.shape} serves")
        if value.dtype != live.dtype:
            message = f"{self._source}: {name} is {value.dtype}; {live.dtype} serves"
            raise Refused(message, restart_may_help=True)
        if not isinstance(live, jax.Array) or not value.sharding.is_equivalent_to(live.sharding, value.ndim):
            message = f"{self._source}: {name} was loaded with another sharding than what serves"
            raise Refused(message, restart_may_help=True)
        if not is_finite(value):
            raise Refused(f"{self._source}: {name} holds numbers that are not finite")
        self._seen.add(name)

    def end(self) -> None:
        """See that no tensor is missing.

        Raises:
            Refused: One is.
        """
        wanted = [name for name, live in self._live.items() if isinstance(live.get_value(), jax.Array)]
        if missing := sorted(name for name in wanted if name not in self._seen):
            raise Refused(f"{self._source} has no tensor for {some(missing)}")


def is_finite(value: jax.Array) -> bool:
    """Tell whether all numbers are finite, by a program in which no device waits for another.

    It runs beside the model's own programs, started from another thread: with a collective in it, devices could take
    up the two in different orders, and wait for each other for ever.
    """
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return True
    if not isinstance(value.sharding, NamedSharding):
        return bool(np.asarray(jnp.isfinite(value).all()))
    return bool(np.asarray(_flags(value.sharding.mesh, value.sharding.spec)(value)).all())


@functools.lru_cache
def _flags(mesh: Any, spec: Any) -> Callable[[jax.Array], jax.Array]:
    """The compiled check of each device's own part: one flag a device."""

    def of_part(part: jax.Array) -> jax.Array:
        return jnp.isfinite(part).all().reshape(1)

    each = PartitionSpec(tuple(mesh.axis_names))
    checked: Callable[[jax.Array], jax.Array] = jax.jit(
        jax.shard_map(of_part, mesh=mesh, in_specs=spec, out_specs=each)
    )
    return checked


class StagedOnDevice:
    """All new weights beside the old ones, compared and ready.

    Args:
        runner: The `ModelRunner` that serves.
        config: The checkpoint's, not yet changed for the mesh.
        tensors: In the place of the checkpoint's own.
    """

    def __init__(self, runner: Any, config: Any, tensors: Tensors | None = None) -> None:
        self._runner = runner
        self._new: dict[Name, jax.Array] = {}
        self._old: dict[Name, jax.Array] = {}
        model = load(runner, config, tensors)
        comparison = Comparison(runner, config.model_path)
        for name, variable in variables(model).items():
            value = variable.get_value()
            if isinstance(value, jax.Array):  # What was not loaded is a mere shape.
                comparison.see(name, value)
                self._new[name] = value
        comparison.end()
        jax.block_until_ready(list(self._new.values()))

    def put(self) -> None:
        """Write the live variables, and take the model's arguments from them."""
        live = variables(self._runner.model)
        self._old = {name: live[name].get_value() for name in self._new}
        for name, value in self._new.items():
            live[name].set_value(value)
        resplit(self._runner)

    def put_back(self) -> None:
        """Serve the old arrays themselves again."""
        live = variables(self._runner.model)
        for name, value in self._old.items():
            live[name].set_value(value)
        resplit(self._runner)

    def forget(self) -> None:
        """Free what does not serve."""
        self._old, self._new = {}, {}
        gc.collect()  # A model refers to itself.


class StagedByLeaf:
    """New weights of which one tensor at a time is on the devices; what it replaces waits in the host's memory.

    They are read twice: once beside the serving model, only to be compared, and once into it.

    Args:
        runner: The `ModelRunner` that serves.
        config_again: The checkpoint's config, each time a new one, not yet changed for the mesh.
        tensors: In the place of the checkpoint's own.
    """

    def __init__(self, runner: Any, config_again: Callable[[], Any], tensors: Tensors | None = None) -> None:
        self._runner = runner
        self._config_again = config_again
        self._tensors = tensors
        self._old: list[tuple[Name, Any, Any]] = []
        config = config_again()
        comparison = Comparison(runner, config.model_path)
        stream(runner, config, comparison.see, tensors)
        comparison.end()

    def put(self) -> None:
        """Load the tensors into the live variables, one after the other."""
        runner, live = self._runner, variables(self._runner.model)
        config = self._config_again()
        comparison = Comparison(runner, config.model_path)

        def replace(name: Name, value: jax.Array) -> None:
            comparison.see(name, value)
            old = live[name].get_value()
            self._old.append((name, jax.device_get(old), old.sharding))
            _set_one(runner, live[name], value)

        stream(runner, config, replace, self._tensors)
        comparison.end()
        resplit(runner)

    def put_back(self) -> None:
        """Serve the old numbers again, bit for bit."""
        live = variables(self._runner.model)
        for name, value, sharding in self._old:
            _set_one(self._runner, live[name], jax.device_put(value, sharding))
        resplit(self._runner)

    def forget(self) -> None:
        """Free the host's memory."""
        self._old, self._tensors = [], None
        gc.collect()


def _set_one(runner: Any, variable: Any, value: jax.Array) -> None:
    """Write one variable, and let go of its old array, which is an argument of the model too."""
    old = variable.get_value()
    runner.model_state_leaves = [value if leaf is old else leaf for leaf in runner.model_state_leaves]
    variable.set_value(value)
    jax.block_until_ready(value)  # Else the next tensor is loaded while this one still is.


def resplit(runner: Any) -> None:
    """Take the model's arguments from its variables, as an adapter that is loaded does.

    Raises:
        Refused: They are not of the form that was compiled.
    """
    _, state = nnx.split(runner.model)
    leaves, form = jax.tree_util.tree_flatten(state)
    if form != runner._model_state_def or len(leaves) != len(runner.model_state_leaves):
        raise Refused("the changed model is not of the form that was compiled", restart_may_help=True)
    # Where the engine itself put an empty array in the place of a mere shape, it stays.
    runner.model_state_leaves = [
        new if isinstance(new, jax.Array) else old for new, old in zip(leaves, runner.model_state_leaves, strict=True)
    ]


def stream(runner: Any, config: Any, take: Callable[[Name, jax.Array], None], tensors: Tensors | None = None) -> None:
    """Load a checkpoint, handing over each tensor as it is loaded, and keeping none.

    Raises:
        Refused: The loader fails, or `take` refuses.
    """
    _streaming.take = take
    try:
        load(runner, config, tensors)
    finally:
        _streaming.take = None
        gc.collect()


def install_streaming(weight_utils: Any) -> None:
    """Let the engine's loader hand over tensors one by one, or take them from memory, in threads that ask for it."""
    loader, bar = weight_utils.WeightLoader, weight_utils.tqdm
    from_files = loader.load_weights_from_safetensors

    def one_by_one(self: Any, weight_mappings: Any, safetensors_partition: int = 1, dummy: bool = False) -> None:
        take, tensors = getattr(_streaming, "take", None), getattr(_streaming, "tensors", None)
        if tensors is not None:
            check_names(tensors, weight_mappings)

        def load_some(mappings: Any) -> None:
            if tensors is None:
                from_files(self, mappings, safetensors_partition, dummy)
            else:
                assign(self, mappings, tensors)

        if take is None:
            load_some(weight_mappings)
            return
        for key, mapping in weight_mappings.items():
            load_some({key: mapping})
            for name, value in _taken_out(self.model):
                take(name, value)

    def progress(things: Any, *args: Any, **options: Any) -> Any:
        # A bar for each tensor is hundreds of them.
        return things if getattr(_streaming, "take", None) else bar(things, *args, **options)

    loader.load_weights_from_safetensors = one_by_one
    weight_utils.tqdm = progress


def _taken_out(model: Any) -> Iterator[tuple[Name, jax.Array]]:
    """Take the loaded tensors out of a model, and leave mere shapes."""
    for name, variable in variables(model).items():
        value = variable.get_value()
        if isinstance(value, jax.Array):
            variable.set_value(jax.ShapeDtypeStruct(value.shape, value.dtype))
            yield name, value
