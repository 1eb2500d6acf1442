"""Slow work with files, in threads, that ends soon when it is cancelled.

Invariant: work that was told to stop raises `Stopped` at its next look, and nothing it began is taken for done.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from rollpool.worker.engines.protocol import OnProgress

T = TypeVar("T")

#: Seconds that a cancelled call waits for its thread: a look comes with each chunk, and a call into another library
#: may not come back for longer; its thread then ends by itself.
STOP_WITHIN_S = 5.0


class Stopped(Exception):  # noqa: N818 - not an error: it was asked for
    """The work was told to stop."""


class Stop:
    """Tells work in other threads to end."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Tell it."""
        self._event.set()

    def check(self) -> None:
        """Raise Stopped once it was told."""
        if self._event.is_set():
            raise Stopped

    def sleep(self, seconds: float) -> None:
        """Sleep, and look: returns early only by raising."""
        self._event.wait(seconds)
        self.check()


class Meter:
    """Bytes done of all, counted by several threads.

    Args:
        total: bytes in all.
        on_progress: told both, in the thread that counted.
        stop: looked at with each count.
    """

    def __init__(self, total: int, on_progress: OnProgress, stop: Stop) -> None:
        self._total, self._done = total, 0
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self.stop = stop
        self.add(0)

    def add(self, size: int) -> None:
        """Count; a negative size is of what has to be done again."""
        self.stop.check()
        with self._lock:
            self._done += size
            self._on_progress(min(self._done, self._total), self._total)


async def in_thread(work: Callable[[Stop], T], undo: Callable[[T], None] = lambda _: None) -> T:
    """The result of `work`, done in a thread of its own.

    Args:
        work: looks at what it is given as often as it can.
        undo: called with the result when nobody is there to take it. Cancelling tells the work to stop, and waits
            until it has.
    """
    loop = asyncio.get_running_loop()
    stop = Stop()
    pool = ThreadPoolExecutor(1, thread_name_prefix="rollpool-source")
    done = asyncio.ensure_future(loop.run_in_executor(pool, work, stop))
    pool.shutdown(wait=False)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        stop.set()
        done.add_done_callback(lambda ended: None if ended.cancelled() or ended.exception() else undo(ended.result()))
        await asyncio.wait([done], timeout=STOP_WITHIN_S)
        raise


def for_each(items: Iterable[T], work: Callable[[T], None], *, at_once: int, failed: Stop) -> None:
    """Do something with each, a few at a time, and return when all are done.

    Args:
        items: in the order in which they are begun.
        work: looks at `failed` as often as it can.
        at_once: threads.
        failed: is set when one raised, so that the others end; what it raised is raised here.
    """
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="rollpool-files")
    running = [pool.submit(work, item) for item in items]
    try:
        done, _ = wait(running, return_when=FIRST_EXCEPTION)
        errors = [error for future in done if (error := future.exception()) is not None]
        # One that was stopped says nothing of why.
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error
    finally:
        failed.set()
        pool.shutdown(cancel_futures=True)


def on_loop(on_progress: OnProgress) -> OnProgress:
    """The same function for other threads: called in the loop that runs now."""
    loop = asyncio.get_running_loop()

    def tell(done: int, total: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(on_progress, done, total)

    return tell
