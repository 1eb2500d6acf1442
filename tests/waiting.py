"""Waiting for what happens elsewhere: a condition, looked at until it holds or a generous time is over."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

#: Seconds until a wait fails; far over what a loaded machine needs.
LONG = 60.0

#: Seconds between looks.
_LOOK = 0.01


async def until(condition: Callable[[], object | Awaitable[object]], what: str = "") -> None:
    """Wait, in a loop, until `condition` returns or resolves to something true."""
    end = time.monotonic() + LONG
    while True:
        met = condition()
        if inspect.isawaitable(met):
            met = await met
        if met:
            return
        assert time.monotonic() < end, f"not within {LONG:.0f} s: {what or inspect.getsource(condition).strip()}"
        await asyncio.sleep(_LOOK)


def until_blocking(condition: Callable[[], object], what: str, *, within_s: float = LONG) -> None:
    """The same without a loop."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s:.0f} s: {what}"
        time.sleep(_LOOK)
