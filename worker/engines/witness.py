"""What is seen from outside of which process answers at a URL.

Invariant: an identity never comes back once another was seen, and what this worker does to an engine itself does not
make it another.

A server somebody else started tells nothing of its own that changes with the process. So: the process that listens,
where it can be seen; a count that only rises within one process, where the line tells one; and every lost connection
counts as a possible restart.
"""

import asyncio
from typing import Any
from urllib.parse import urlsplit

from rollpool.worker.engines.dialects import Dialect
from rollpool.worker.engines.listener import Listener


class Witness:
    """Of one URL."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        here = parts.hostname in {"127.0.0.1", "localhost", "::1"}
        self._listener = Listener(parts.port or 80) if here else None
        self._epoch = 0
        self._counter = 0

    def lost_sight(self) -> None:
        """A connection was lost: whatever answers next may be another process."""
        self._epoch += 1

    def flushed(self) -> None:
        """We had the prefix cache flushed, by which the count begins anew."""
        self._counter = 0

    async def identity(self, dialect: Dialect, info: dict[str, Any]) -> str:
        """Of the process that answered `info`."""
        counter = dialect.progress_counter(info)
        if counter is not None:
            if counter < self._counter:
                self._epoch += 1
            self._counter = counter
        place = await asyncio.to_thread(self._listener.identity) if self._listener else ""
        return f"{dialect.identity(info)}|{place}|{self._epoch}"
