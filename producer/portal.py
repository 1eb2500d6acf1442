"""From blocking code into an event loop of its own, in a daemon thread.

Invariant: a caller that is interrupted (Ctrl-C) leaves no coroutine running behind its back; and it does not matter
whether the caller's thread has a running loop of its own, as in Jupyter.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from rollpool.schemas.errors import RollpoolError

T = TypeVar("T")


class Portal:
    """Runs coroutines for blocking callers, from any thread but its own."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="rollpool", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run to the end and return the result, or raise what it raised.

        Raises:
            RollpoolError: The pool is closed, or this process is a fork of the one that made it.
        """
        try:
            self._check()
        except RollpoolError:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            # KeyboardInterrupt reaches this thread alone: pass it on. After an error of the coroutine it does nothing.
            future.cancel()
            raise

    def close(self) -> None:
        """End the thread; a second call does nothing, and so does one in a forked child, which has no thread."""
        if self._loop.is_closed() or os.getpid() != self._pid:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        # The garbage collector may close a forgotten pool from any thread, this one included.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def usable(self) -> bool:
        """True when `run` may be called here."""
        return (
            os.getpid() == self._pid and not self._loop.is_closed() and threading.current_thread() is not self._thread
        )

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise RollpoolError(
                "this pool was made before the process forked, and its connection belongs to the parent: make a "
                "RolloutPool in each process, after the fork"
            )
        if self._loop.is_closed() or not self._thread.is_alive():
            raise RollpoolError("this pool is closed; make another RolloutPool")
        if threading.current_thread() is self._thread:
            raise RollpoolError("a blocking pool was called from its own event loop; use AsyncRolloutPool there")

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
