"""Server time, as this host knows it.

Invariant: times that machines compare are Redis TIME; this clock is never further off than the last round trip to
the server plus the drift since.
"""

import time
from collections.abc import Callable

from redis.asyncio import Redis


class ServerClock:
    """The server's clock, kept by an offset to the local one."""

    def __init__(self, local: Callable[[], float] = time.time) -> None:
        self._local = local
        self._offset_ms = 0

    async def sync(self, client: Redis) -> None:
        """Measure the offset; half the round trip is taken as the reply's age."""
        before = self._local()
        seconds, micros = await client.time()
        after = self._local()
        server_ms = int(seconds) * 1000 + int(micros) // 1000
        self._offset_ms = server_ms - int(500 * (before + after))

    def now_ms(self) -> int:
        """Milliseconds of server time."""
        return int(1000 * self._local()) + self._offset_ms

    def seconds_to(self, time_ms: int) -> float:
        """Seconds from now to a time of the server; negative when it is over."""
        return (time_ms - self.now_ms()) / 1000
