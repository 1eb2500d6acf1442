"""How to connect: the one place that knows URLs, timeouts and retries.

Invariant: a call either returns or raises within a known time; a reader that blocks has a connection of its own whose
socket timeout is longer than its block.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis import Redis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError, NoPermissionError, TimeoutError
from redis.retry import Retry

from rollpool.schemas.errors import NotPermitted, SettingsError
from rollpool.schemas.jobs import NAME_PATTERN
from rollpool.schemas.keys import Keys

DEFAULT_URL = "redis://127.0.0.1:6379/0"
DEFAULT_POOL = "default"

#: Seconds a command may take: the longest is enqueueing a batch of hundreds of megabytes.
SOCKET_TIMEOUT_S = 20.0

#: Retries of a command whose connection broke, over some seconds: long enough for a server that restarts. Every
#: script may be repeated, so a retry after a lost reply is harmless.
RETRIES = 6
_BACKOFF_CAP_S = 2.0
_BACKOFF_BASE_S = 0.1

#: RESP2: lists where RESP3 has maps, which is what the readers of streams here expect.
_OPTIONS: dict[str, Any] = {"retry_on_error": [ConnectionError, TimeoutError], "protocol": 2}

T = TypeVar("T")


def without_password(url: str) -> str:
    """The URL as a message may show it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _checked(make: Callable[[], T], url: str) -> T:
    try:
        return make()
    except ValueError as error:
        raise SettingsError(
            f"url {without_password(url)!r}: {error}; a URL is redis://[user:password@]host:port/db, "
            "or rediss:// for TLS"
        ) from error


def connect(url: str, *, timeout_s: float = SOCKET_TIMEOUT_S, retries: int = RETRIES) -> Redis:
    """A blocking client, for threads of their own. Raises SettingsError on a malformed URL."""
    retry = Retry(_backoff(), retries)
    return _checked(lambda: Redis.from_url(url, socket_timeout=timeout_s, retry=retry, **_OPTIONS), url)


def connect_async(url: str, *, timeout_s: float = SOCKET_TIMEOUT_S) -> AsyncRedis:
    """An asyncio client. Raises SettingsError on a malformed URL."""
    retry = AsyncRetry(_backoff(), RETRIES)
    return _checked(
        lambda: AsyncRedis.from_pool(
            # Beyond its limit it waits for a connection, where the default pool would raise.
            BlockingConnectionPool.from_url(url, timeout=None, socket_timeout=timeout_s, retry=retry, **_OPTIONS)
        ),
        url,
    )


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(_BACKOFF_CAP_S, _BACKOFF_BASE_S)


async def runs_of(client: AsyncRedis, keys: Keys) -> list[str]:
    """The names of all runs that ever enqueued to this pool, sorted."""
    members: Any = await client.smembers(keys.runs)
    names = (member.decode(errors="replace") for member in members)
    return sorted(name for name in names if re.fullmatch(NAME_PATTERN, name))  # else somebody's own doing


def not_permitted(error: NoPermissionError, what: str) -> NotPermitted:
    """The error to raise when the server's access list refused `what`."""
    return NotPermitted(f"{what}: the server refused it ({error}); connect as a user whose role allows it")
