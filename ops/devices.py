"""Dividing the devices of one process between rollouts and training.

Invariant: the two parts have no device in common, each is of a size that a mesh can have, and both are of this process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rollpool.schemas.errors import SettingsError

#: The one axis of each mesh: the engine splits heads along the first, what the trainer does with the other is its own.
ROLLOUT_AXIS, TRAIN_AXIS = "tensor", "train"


@dataclass(frozen=True)
class DeviceSplit:
    """Two meshes (`jax.sharding.Mesh`) of one axis each."""

    #: Of the engine; axis `tensor`.
    rollout: Any
    #: Of the trainer; axis `train`. Reshape its `devices` for a mesh of more axes.
    train: Any


def split_devices(rollout: int | Sequence[int], train: int | Sequence[int] | None = None) -> DeviceSplit:
    """Divide this process's devices between rollouts and training.

    Args:
        rollout: How many devices the engine gets, from the first on; or which, by number. It is the first for a
            reason: sglang-jax switches the persistent compilation cache of the whole process off for an engine
            without device 0, since libtpu was seen to crash with it.
        train: How many the trainer gets, from the next on, or which; None: all others.

    Returns:
        The two meshes.

    Raises:
        SettingsError: They overlap, or are of a size that cannot be; there are not so many devices; or this is one
            of several processes of a JAX program.
    """
    import jax

    refuse_multi_host(jax.process_count())
    devices = jax.devices()
    first, second = divide(len(devices), rollout, train)
    return DeviceSplit(
        _mesh([devices[at] for at in first], ROLLOUT_AXIS), _mesh([devices[at] for at in second], TRAIN_AXIS)
    )


def divide(
    count: int, rollout: int | Sequence[int], train: int | Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of `count` devices each part gets; errors as `split_devices`."""
    first = tuple(range(rollout)) if isinstance(rollout, int) else tuple(rollout)
    others = [at for at in range(count) if at not in first]
    second = tuple(others[:train] if isinstance(train, int) else others if train is None else train)
    wanted = (len(first) + train) if isinstance(train, int) else max((*first, *second), default=0) + 1
    if wanted > count or min((*first, *second), default=0) < 0:
        raise SettingsError(
            f"split_devices(rollout={rollout!r}, train={train!r}): there are {count} devices here, 0 to {count - 1}; "
            "on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight"
        )
    refuse_overlap(first, second)
    _check_size("rollout", len(first), powers_only=True)
    _check_size("train", len(second), powers_only=False)
    return first, second


def refuse_overlap(rollout: Sequence[int], train: Sequence[int]) -> None:
    """Raise SettingsError where a device is in both parts, or in one twice."""
    if both := sorted(set(rollout) & set(train)):
        raise SettingsError(
            f"devices {', '.join(map(str, both))} are in both parts: the engine's cache takes what memory is left on "
            "its devices, and two programs would wait for each other on them; give each part devices of its own"
        )
    for name, part in (("rollout", rollout), ("train", train)):
        if len(set(part)) < len(part):
            raise SettingsError(f"{name} names a device twice: {list(part)}")


def refuse_multi_host(processes: int) -> None:
    """Raise SettingsError where this process is one of several of a JAX program."""
    if processes > 1:
        raise SettingsError(
            f"this is one of {processes} processes of a JAX program. An engine in one of them fails with "
            "`FAILED_PRECONDITION: The program continuator has halted unexpectedly`, since what it runs is not run by "
            "the others. Run the engines as servers on TPU VMs of their own (docs/howto-many-tpu-vms.md): the trainer "
            "changes in the line that makes its pool"
        )


def _check_size(name: str, size: int, *, powers_only: bool) -> None:
    if size == 0:
        raise SettingsError(f"{name} gets no device: give each part at least one")
    if powers_only and size & (size - 1):
        raise SettingsError(
            f"{name} gets {size} devices: the engine splits heads and matrices evenly, over 1, 2, 4 or 8 devices"
        )
    if size > 1 and size % 2:
        raise SettingsError(f"{name} gets {size} devices: chips are joined in pairs, so take an even number, or one")


def _mesh(devices: list[Any], axis: str) -> Any:
    import jax
    import numpy as np

    return jax.sharding.Mesh(np.array(devices), (axis,))
