"""How to connect: the one place that knows timeouts and retries, and makes a client of a URL.

Invariant: a call either returns or raises within a known time; a reader that blocks has a connection of its own whose
socket timeout is longer than its block.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from redis import ConnectionPool, Redis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.connection import parse_url as parse_url_async
from redis.backoff import ExponentialWithJitterBackoff
from redis.connection import parse_url
from redis.exceptions import ConnectionError, NoPermissionError, ReadOnlyError, RedisError, TimeoutError

from rollpool.schemas.address import Address, Kind, parse_address, refused
from rollpool.schemas.address import without_password as without_password
from rollpool.schemas.errors import NotPermitted
from rollpool.schemas.following import SSL, Following, FollowingAsync, FollowingAsyncSSL, FollowingSSL, guide_of
from rollpool.schemas.jobs import NAME_PATTERN
from rollpool.schemas.keys import Keys
from rollpool.schemas.retries import PatientAsyncRetry, PatientRetry

DEFAULT_URL = "redis://127.0.0.1:6379/0"
DEFAULT_POOL = "default"

#: Seconds a command may take: the longest is enqueueing a batch of hundreds of megabytes.
SOCKET_TIMEOUT_S = 20.0

#: Retries of a command whose connection broke, over some seconds: long enough for a server that restarts. Every
#: script may be repeated, so a retry after a lost reply is harmless.
RETRIES = 6
#: The same where another server takes over, over some 40 seconds: by default a Sentinel needs 30 to call a master dead,
#: and a cluster's nodes 15.
FAILOVER_RETRIES = 24
_BACKOFF_CAP_S = 2.0
_BACKOFF_BASE_S = 0.1

T = TypeVar("T")


def connect(
    url: str, *, timeout_s: float = SOCKET_TIMEOUT_S, retries: int | None = None, slot_key: str | None = None
) -> Redis:
    """A blocking client, for threads of their own.

    Args:
        url: of the server, in one of the `FORMS`.
        timeout_s: that a command may take.
        retries: of a command; None: enough for a restart of the server, or for a failover.
        slot_key: a key of the pool, by which a cluster's node is found. Without it the first command may be refused by
            another node, which tells the slot and costs a retry.

    Raises:
        SettingsError: the URL is malformed, or names a file that is not there.
    """
    address = parse_address(url)
    retry = PatientRetry(_backoff(), _retries(address) if retries is None else retries, tls=address.tls)

    def made() -> Redis:
        given = parse_url(address.plain)  # type: ignore[no-untyped-call]
        options = _options(address, given, timeout_s, slot_key)
        if "guide" in options:
            options["connection_class"] = FollowingSSL if address.tls else Following
        elif address.tls:
            options["connection_class"] = SSL
        pool = ConnectionPool(retry=retry, **options)
        pool.connection_class(**pool.connection_kwargs)  # refuses what is wrong before the first command does
        return Redis.from_pool(pool)

    return _checked(made, url)


def connect_async(url: str, *, timeout_s: float = SOCKET_TIMEOUT_S, slot_key: str | None = None) -> AsyncRedis:
    """An asyncio client; arguments and errors are those of `connect`."""
    address = parse_address(url)
    retry = PatientAsyncRetry(_backoff(), _retries(address), tls=address.tls)

    def made() -> AsyncRedis:
        given: Any = parse_url_async(address.plain)
        options = _options(address, given, timeout_s, slot_key)
        if "guide" in options:
            options["connection_class"] = FollowingAsyncSSL if address.tls else FollowingAsync
        # Beyond its limit it waits for a connection, where the default pool would raise.
        pool = BlockingConnectionPool(retry=retry, **{"timeout": None, **options})
        pool.connection_class(**pool.connection_kwargs)
        return AsyncRedis.from_pool(pool)

    return _checked(made, url)


def _options(address: Address, given: Mapping[str, Any], timeout_s: float, slot_key: str | None) -> dict[str, Any]:
    """Of a pool of connections; what the URL says wins."""
    options = {
        "socket_timeout": timeout_s,
        # A master that became a replica is connected to anew: its name may lead to another server by now.
        "retry_on_error": [ConnectionError, TimeoutError, ReadOnlyError],
        # Lists where RESP3 has maps, which is what the readers of streams here expect.
        "protocol": 2,
        **given,
    }
    if (guide := guide_of(address, options, timeout_s, slot_key)) is not None:
        del options["host"], options["port"]
        options["guide"] = guide
    return options


def _checked(make: Callable[[], T], url: str) -> T:
    try:
        return make()
    except TypeError as error:  # an argument that no connection has
        raise refused(url, re.sub(r"^.*got an unexpected keyword argument", "it has no option", str(error))) from None
    except (ValueError, RedisError) as error:
        raise refused(url, str(error)) from None


def _retries(address: Address) -> int:
    return RETRIES if address.kind is Kind.SERVER else FAILOVER_RETRIES


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(_BACKOFF_CAP_S, _BACKOFF_BASE_S)


async def runs_of(client: AsyncRedis, keys: Keys) -> list[str]:
    """The names of all runs that ever enqueued to this pool, sorted."""
    members: Any = await client.smembers(keys.runs)
    return _names(members)


def runs_now(client: Redis, keys: Keys) -> list[str]:
    """The same on a blocking client."""
    members: Any = client.smembers(keys.runs)
    return _names(members)


def _names(members: Iterable[bytes]) -> list[str]:
    names = (member.decode(errors="replace") for member in members)
    return sorted(name for name in names if re.fullmatch(NAME_PATTERN, name))  # else somebody's own doing


def not_permitted(error: NoPermissionError, what: str) -> NotPermitted:
    """The error to raise when the server's access list refused `what`."""
    return NotPermitted(f"{what}: the server refused it ({error}); connect as a user whose role allows it")
