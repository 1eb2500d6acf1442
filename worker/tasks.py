"""Small helpers around asyncio's tasks.

Invariant: no task that is started here outlives the call that started it.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds before a task that goes on is cancelled again. Python before 3.12 loses a cancellation that comes as
#: `asyncio.wait_for` returns (gh-86296), and redis-py sends every command under it. Longer than an engine takes to end,
#: which a second cancellation would leave to itself.
CANCEL_AGAIN_S = 5.0


async def cancelled(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    """Cancel tasks, and return when they have ended; those that ended before keep their results."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)


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
