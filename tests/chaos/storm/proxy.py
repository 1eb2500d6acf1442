"""A TCP proxy between the server and everybody who uses it, which fails on demand.

Invariant: what it forwards it forwards unchanged and in order; a connection that lost a byte is cut before another byte
passes. So what it does to its users is what a network does: it cuts, refuses, holds up, or loses replies, and never
invents. It runs on a thread and loop of its own, and ends with its `with` block.
"""

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

_HOST = "127.0.0.1"
_CHUNK = 1 << 16


class _Connection:
    """One client and its own connection to the server."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        #: What the server says is swallowed from now on; the connection must be cut then.
        self.mute = False

    def cut(self) -> None:
        """Reset both ends: nothing that waits in a buffer is sent any more."""
        for writer in (self.client, self.server):
            with contextlib.suppress(OSError, RuntimeError):
                writer.transport.abort()


class Proxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`upstream`; its faults may be asked for from any thread."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="storm-proxy", daemon=True)
        self._connections: set[_Connection] = set()
        self._refusing = 0
        self._flowing = asyncio.Event()
        self._stalls = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._port: int | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._port is not None, "start it first"
        return self._port

    @property
    def url(self) -> str:
        """What to connect to in place of the server."""
        return f"redis://{_HOST}:{self.port}/0"

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    # Faults.

    def cut(self, share: float, seed: int) -> int:
        """Cut a share of the connections; returns how many."""
        return self._ask(lambda: self._cut(share, random.Random(seed)))

    def refuse(self) -> None:
        """Cut all connections, and each new one at once, until `accept`; calls count."""
        self._ask(self._refuse)

    def accept(self) -> None:
        """Undo one `refuse`."""
        self._ask(self._accept)

    def stall(self) -> None:
        """Let nothing pass, either way, until `flow`; calls count."""
        self._ask(self._stall)

    def flow(self) -> None:
        """Undo one `stall`."""
        self._ask(self._flow)

    def mute(self) -> None:
        """From now on lose what the server answers on the connections there are: requests still reach it."""
        self._ask(self._mute)

    def cut_muted(self) -> int:
        """Cut the connections that lost something; returns how many."""
        return self._ask(lambda: self._cut_those(lambda connection: connection.mute))

    # On the loop.

    def _cut(self, share: float, rng: random.Random) -> int:
        return self._cut_those(lambda _: rng.random() < share)

    def _cut_those(self, chosen: Callable[[_Connection], bool]) -> int:
        cut = [connection for connection in self._connections if chosen(connection)]
        for connection in cut:
            connection.cut()
        return len(cut)

    def _refuse(self) -> None:
        self._refusing += 1
        self._cut_those(lambda _: True)

    def _accept(self) -> None:
        self._refusing -= 1

    def _refuses(self) -> bool:
        return self._refusing > 0

    def _stall(self) -> None:
        self._stalls += 1
        self._flowing.clear()

    def _flow(self) -> None:
        self._stalls -= 1
        if not self._stalls:
            self._flowing.set()

    def _mute(self) -> None:
        for connection in self._connections:
            connection.mute = True

    async def _connected(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._refuses():
                client.transport.abort()
                return
            try:
                upstream, server = await asyncio.open_connection(_HOST, self._upstream)
            except OSError:
                client.transport.abort()
                return
            connection = _Connection(client, server)
            if self._refuses():  # since we asked
                connection.cut()
                return
            await self._forward(connection, reader, upstream)
        finally:
            self._tasks.discard(task)

    async def _forward(
        self, connection: _Connection, reader: asyncio.StreamReader, upstream: asyncio.StreamReader
    ) -> None:
        self._connections.add(connection)
        pumps = [
            asyncio.create_task(self._pump(reader, connection.server, lambda: False)),
            asyncio.create_task(self._pump(upstream, connection.client, lambda: connection.mute)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._connections.discard(connection)
            connection.cut()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, swallow: Callable[[], bool]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK):
                await self._flowing.wait()
                if not swallow():
                    sink.write(data)
                    await sink.drain()

    # Its life.

    def _ask(self, what: Callable[[], T]) -> T:
        async def call() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _listen(self) -> asyncio.Server:
        self._flowing.set()
        return await asyncio.start_server(self._connected, _HOST, 0)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._cut_those(lambda _: True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
