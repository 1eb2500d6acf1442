"""Connections that ask where the pool's server is, each time they connect.

Sentinels are asked for the master, a cluster's nodes for the owner of the pool's slot.

Invariant: a connection that was told, in whatever words, that its server is not the one any more is closed, and the
command is tried again on a connection that asked anew.

redis-py's own Sentinel pools ask only where a connection is taken from its pool: a command whose connection broke is
tried again at the address that just failed. Its cluster client sends every command by its own key, and cannot run a
blocking read beside scripts on one address.
"""

import sys
from collections.abc import Generator, Sequence
from typing import Any

from redis.asyncio import Connection as AsyncConnection
from redis.asyncio import SSLConnection as AsyncSSLConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    ConnectionError,
    MovedError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry

from rollpool.schemas.address import Address, Kind, Node
from rollpool.schemas.errors import SettingsError
from rollpool.schemas.retries import final_error

#: Seconds for one question to a Sentinel or a node: where one is dead, the next is asked.
ASK_S = 2.0

#: What a server says that is not the right one, or not now. In a cluster: the slot moved, is moving, or has no owner.
_MOVED = (ReadOnlyError, AskError, TryAgainError, ClusterDownError)
#: The same, where redis-py has no error of its own: a master without the replicas it must have, as an old one that is
#: cut off; a blocked read on a master that became a replica.
_MOVED_WORDS = ("NOREPLICAS", "UNBLOCKED force unblock")

Search = Generator[Node, Any, Node]


class Guide:
    """Knows whom to ask where the server is, and reads the answer. Shared by the connections of a client.

    Args:
        address: names whom to ask.
        options: of the connections that ask.
    """

    #: What to ask.
    question: tuple[str, ...]
    #: What is wrong when nobody can tell.
    lost: str
    #: Whether one who does not know it now will not know it later either.
    knows_at_once: bool

    def __init__(self, address: Address, options: dict[str, Any]) -> None:
        self.options = options
        self.tls = address.tls
        #: The one that knew last first.
        self.nodes: Sequence[Node] = address.nodes

    def search(self) -> Search:
        """Yield whom to ask, be sent the reply or the error, return where the server is."""
        outer = sys.exception()
        silent: list[str] = []
        said: list[str] = []
        for node in self.nodes:
            reply = yield node
            if isinstance(reply, RedisError):
                if (final := final_error(reply, outer)) is not None:
                    raise _of(node, final)
                (said if isinstance(reply, ResponseError) else silent).append(f"{node}: {reply}")
            elif (found := self.answer(reply, node)) is not None:
                self.nodes = [node, *(other for other in self.nodes if other != node)]
                return found
            else:
                (said if self.knows_at_once else silent).append(f"{node} does not know it")
        what = f"{self.lost}: {'; '.join([*said, *silent])}"
        if silent:
            raise ConnectionError(what)
        raise SettingsError(f"{what}; check what the URL names")

    def answer(self, reply: Any, asked: Node) -> Node | None:
        """Where the server is, by the reply of whom was asked."""
        raise NotImplementedError

    def learn(self, error: ResponseError, said_by: Node) -> None:
        """What a wrong server tells of the right one."""


class SentinelGuide(Guide):
    """Asks Sentinels for the master of a service."""

    knows_at_once = True

    def __init__(self, address: Address, options: dict[str, Any]) -> None:
        super().__init__(address, options | address.sentinel_login)
        self.question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.service)
        self.lost = f"no Sentinel tells the master of {address.service!r}"

    def answer(self, reply: Any, asked: Node) -> Node | None:
        """A pair, or nothing where no such service is watched."""
        return Node(reply[0].decode(), int(reply[1])) if reply else None


class ClusterGuide(Guide):
    """Asks cluster nodes for the owner of one slot.

    Args:
        address: names some nodes; the others are learnt from them.
        options: of the connections that ask.
        slot_key: a key of the pool; None: the slot is learnt from the first command that another node owns.
    """

    question = ("CLUSTER", "SLOTS")
    lost = "no cluster node tells who owns the pool's slot"
    knows_at_once = False

    def __init__(self, address: Address, options: dict[str, Any], slot_key: str | None) -> None:
        super().__init__(address, options)
        self.slot = None if slot_key is None else key_slot(slot_key.encode())

    def answer(self, reply: Any, asked: Node) -> Node | None:
        """Ranges of slots, each with its owner and the owner's replicas."""
        owner = asked if self.slot is None else None
        nodes = list(self.nodes)
        for first, last, *members in reply:
            # A node that does not know its own address leaves it empty.
            told = [Node(host.decode() if host else asked.host, port) for host, port, *_ in members]
            nodes += [node for node in told if node not in nodes]
            if self.slot is not None and first <= self.slot <= last:
                owner = told[0]
        self.nodes = nodes
        return owner

    def learn(self, error: ResponseError, said_by: Node) -> None:
        """The slot, and a node that knows better."""
        if isinstance(error, MovedError):
            self.slot = error.slot_id
            owner = Node(error.host or said_by.host, error.port)
            self.nodes = [owner, *(node for node in self.nodes if node != owner)]


def guide_of(address: Address, options: dict[str, Any], timeout_s: float, slot_key: str | None) -> Guide | None:
    """Who tells where the server of this URL is; None where the URL itself does.

    Args:
        address: the URL.
        options: of a connection to the server, as the URL has them.
        timeout_s: what a command to the server may take.
        slot_key: a key of the pool.
    """
    patience = min(ASK_S, timeout_s)
    asking = {name: value for name, value in options.items() if name.startswith("ssl_")}
    asking |= {"socket_timeout": patience, "socket_connect_timeout": patience, "protocol": 2}
    match address.kind:
        case Kind.SENTINEL:
            return SentinelGuide(address, asking)
        case Kind.CLUSTER:
            login = {name: options[name] for name in ("username", "password") if name in options}
            return ClusterGuide(address, asking | login, slot_key)
    return None


def moved(error: ResponseError) -> bool:
    """True when another server is asked instead."""
    return isinstance(error, _MOVED) or str(error).startswith(_MOVED_WORDS)


def _of(node: Node, final: Exception) -> Exception:
    """The same error, with who said it."""
    return type(final)(f"{node}: {final}") if isinstance(final, AuthenticationError | ResponseError) else final


def _elsewhere(node: Node, error: ResponseError) -> ConnectionError:
    return ConnectionError(f"{node} is not the server any more, or not now: {error}")


# Blocking connections.


class Following(Connection):
    """A connection that asks its guide where to connect."""

    def __init__(self, *, guide: Guide, **options: Any) -> None:
        self._guide = guide
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        """As in redis-py, without retries of its own: the command is retried, and would multiply them."""
        super().connect_check_health(check_health=check_health, retry_socket_connect=False)

    def _connect(self) -> Any:
        self.host, self.port = _find(self._guide)
        return super()._connect()  # type: ignore[no-untyped-call]

    def read_response(self, *args: Any, **options: Any) -> Any:
        """As in redis-py; what a wrong server says is a lost connection."""
        try:
            return super().read_response(*args, **options)
        except ResponseError as error:
            if not moved(error):
                raise
            self.disconnect()  # type: ignore[no-untyped-call]
            self._guide.learn(error, Node(self.host, self.port))
            raise _elsewhere(Node(self.host, self.port), error) from error


class SSL(SSLConnection):
    """TLS of which the handshake may take as long as connecting, and not as long as a command."""

    def _wrap_socket_with_ssl(self, sock: Any) -> Any:
        sock.settimeout(self.socket_connect_timeout)
        wrapped = super()._wrap_socket_with_ssl(sock)  # type: ignore[no-untyped-call]
        wrapped.settimeout(self.socket_timeout)
        return wrapped


class FollowingSSL(Following, SSL):
    """A following connection over TLS."""


def _find(guide: Guide) -> Node:
    search = guide.search()
    try:
        node = next(search)
        while True:
            node = search.send(_ask(guide, node))
    except StopIteration as found:
        return found.value  # type: ignore[no-any-return]


def _ask(guide: Guide, node: Node) -> Any:
    """The reply, or the error."""
    made = SSLConnection if guide.tls else Connection
    connection: Any = made(host=node.host, port=node.port, retry=Retry(NoBackoff(), 0), **guide.options)
    try:
        connection.connect()
        connection.send_command(*guide.question)
        return connection.read_response()
    except RedisError as error:
        return error
    finally:
        connection.disconnect()


# Asyncio connections.


class FollowingAsync(AsyncConnection):
    """A connection that asks its guide where to connect."""

    def __init__(self, *, guide: Guide, **options: Any) -> None:
        self._guide = guide
        super().__init__(**options)

    async def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        """As in redis-py, without retries of its own: the command is retried, and would multiply them."""
        await super().connect_check_health(check_health=check_health, retry_socket_connect=False)

    async def _connect(self) -> None:
        self.host, self.port = await _find_async(self._guide)
        await super()._connect()  # type: ignore[no-untyped-call]

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """As in redis-py; what a wrong server says is a lost connection."""
        try:
            return await super().read_response(*args, **options)
        except ResponseError as error:
            if not moved(error):
                raise
            await self.disconnect(nowait=True)
            self._guide.learn(error, Node(self.host, self.port))
            raise _elsewhere(Node(self.host, self.port), error) from error


class FollowingAsyncSSL(FollowingAsync, AsyncSSLConnection):
    """A following connection over TLS."""


async def _find_async(guide: Guide) -> Node:
    search = guide.search()
    try:
        node = next(search)
        while True:
            node = search.send(await _ask_async(guide, node))
    except StopIteration as found:
        return found.value  # type: ignore[no-any-return]


async def _ask_async(guide: Guide, node: Node) -> Any:
    """The reply, or the error."""
    made = AsyncSSLConnection if guide.tls else AsyncConnection
    connection: Any = made(host=node.host, port=node.port, retry=AsyncRetry(NoBackoff(), 0), **guide.options)
    try:
        await connection.connect()
        await connection.send_command(*guide.question)
        return await connection.read_response()
    except RedisError as error:
        return error
    finally:
        await connection.disconnect()
