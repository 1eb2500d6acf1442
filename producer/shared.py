"""`enqueue_prompts` without a pool object: on one pool of the process, named by the environment.

Invariant: one pool a process, made at the first call; a forked child makes its own.
"""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from rollpool.producer.blocking import Batch, RolloutPool

P = ParamSpec("P")


@functools.cache
def _pool_of(pid: int) -> RolloutPool:
    """Cached by process: a fork inherits the cache and must not use its parent's pool."""
    return RolloutPool()


def _on_shared_pool(method: Callable[Concatenate[RolloutPool, P], Batch]) -> Callable[P, Batch]:
    def call(*args: P.args, **kwargs: P.kwargs) -> Batch:
        return method(_pool_of(os.getpid()), *args, **kwargs)

    call.__name__ = call.__qualname__ = method.__name__
    call.__doc__ = method.__doc__
    signature = inspect.signature(method)
    _, *parameters = signature.parameters.values()
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


#: `RolloutPool.enqueue_prompts` on the pool that ROLLPOOL_URL, ROLLPOOL_POOL and ROLLPOOL_RUN name.
enqueue_prompts = _on_shared_pool(RolloutPool.enqueue_prompts)
