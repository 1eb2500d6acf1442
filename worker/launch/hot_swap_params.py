"""Weights that come from memory, in the place of a checkpoint's files.

The tensors have the names and the form that a checkpoint's have (`model.layers.0.self_attn.q_proj.weight` [out, in]),
and go through the engine's own rules for its own: transposed, split, padded and laid out over its devices.

Invariant: a tensor reaches the engine's devices by copies alone, and nothing that is computed on them afterwards makes
one device wait for another: it may run beside the model's own programs, started from another thread.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING or __package__:
    from rollpool.worker.launch.hot_swap_files import some
    from rollpool.worker.launch.hot_swap_messages import Refused
else:
    from hot_swap_files import some
    from hot_swap_messages import Refused

#: By a checkpoint's names, arrays of JAX, on whatever devices, or of numpy.
Tensors: TypeAlias = Mapping[str, Any]

#: Names by which the engine's rules stand for many tensors at once.
_MANY = ("*", "__MOE_EXPERTS__", "__KV_", "__FUSED_QKV_")


def check_names(tensors: Tensors, rules: Mapping[str, Any]) -> None:
    """See that there is a tensor for each of the engine's rules, and a rule for each tensor.

    Raises:
        Refused: There is not; or a rule is for many tensors, as those for experts are.
    """
    if many := sorted(name for name in rules if any(part in name for part in _MANY)):
        raise Refused(f"weights in memory are not known to work with {some(many)}: publish a checkpoint instead")
    if missing := sorted(rules.keys() - tensors.keys()):
        raise Refused(f"there is no tensor for {some(missing)}")
    if unknown := sorted(tensors.keys() - rules.keys()):
        raise Refused(f"the model has no {some(unknown)}")


def assign(loader: Any, rules: Mapping[str, Any], tensors: Tensors) -> None:
    """Put the tensors of some rules into the loader's model.

    Args:
        loader: The engine's `WeightLoader`.
        rules: Its `WeightMapping`s, by tensor.
        tensors: All tensors.
    """
    state = nnx.state(loader.model)
    for name, rule in rules.items():
        placed = jax.device_put(tensors[name], _before(loader, rule, name))
        loader._process_and_assign_weight(state, name, placed, rule)
    nnx.update(loader.model, state)


def _before(loader: Any, rule: Any, name: str) -> NamedSharding:
    """How a tensor lies so that the rule leaves it as it is to lie; where the rule cuts it up, whole on each device."""
    replicated = PartitionSpec()
    heads = rule.kv_head_padding and loader.model_config.needs_kv_head_replication(loader.sharding_size)
    plain = isinstance(rule.target_path, str) and rule.reshape is None and rule.repeat is None
    if not plain or heads or rule.head_dim_padding or rule.sharding is None or rule.transpose_axes is not None:
        return NamedSharding(loader.mesh, replicated)
    turned = rule.transpose and not name.endswith(".bias")
    return NamedSharding(loader.mesh, PartitionSpec(*(rule.sharding[::-1] if turned else rule.sharding)))
