"""What an operator runs, and what runs a whole pool on one machine.

`local_pool` and `split_devices` are imported when they are asked for: they need the worker's packages, which whoever
only looks at a pool has not installed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollpool.ops.devices import DeviceSplit, split_devices
    from rollpool.ops.in_process import LocalPool, local_pool

__all__ = ["DeviceSplit", "LocalPool", "local_pool", "split_devices"]

_MODULES = {"DeviceSplit": "devices", "split_devices": "devices", "LocalPool": "in_process", "local_pool": "in_process"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
