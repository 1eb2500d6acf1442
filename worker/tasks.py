"""Small helpers around asyncio's tasks.

Invariant: no task that is started here outlives the call that started it.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def cancelled(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    """Cancel tasks, and return when they have ended; those that ended before keep their results."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


async def first_of(*waits: Coroutine[Any, Any, Any], timeout: float | None = None) -> None:
    """Return when one of them has, or after `timeout` seconds."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancelled(tasks)


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when `event` was set before it was there."""
    task, stop = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancelled([task, stop])
    return None if task.cancelled() else task.result()
