"""How a server is called over HTTP, and what its answers stand for.

Invariant: every failure is told as one of the two faults of the protocol.
"""

import json
from typing import Any, NoReturn

import aiohttp

from rollpool.worker.engines.dialects import error_message
from rollpool.worker.engines.protocol import EngineUnavailable, RequestRefused
from rollpool.worker.engines.witness import Witness

#: Statuses by which a server says that the request itself is at fault.
_REFUSED = frozenset({400, 413, 422})

#: Seconds to open a connection on this host; a server that is up accepts at once, unless its loop is blocked.
_CONNECT_S = 10.0

#: Seconds that an idle connection is kept. The server closes its own after 5: reusing one that is being
#: closed would look like a dead engine.
_KEEPALIVE_S = 2.0


def new_session(api_key: str | None) -> aiohttp.ClientSession:
    """A session without limits of its own: the host bounds what it sends."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def get_info(
    session: aiohttp.ClientSession, url: str, timeout_s: float, witness: Witness | None = None
) -> dict[str, Any]:
    """`/get_server_info`.

    Raises:
        TimeoutError: the scheduler did not answer; it may compile, or be dead.
        EngineUnavailable: the server is gone, or answers something else.
    """
    where = f"{url}/get_server_info"
    try:
        async with session.get(where, timeout=aiohttp.ClientTimeout(total=timeout_s)) as response:
            status, payload = response.status, await response.read()
    except TimeoutError:
        raise
    except (aiohttp.ClientError, OSError) as error:
        if witness is not None:
            witness.lost_sight()
        raise EngineUnavailable(f"lost the engine at {url}: {error or type(error).__name__}") from error
    if status != 200:
        raise_for(status, payload, where, first=True)
    info = decode(payload, where)
    if not isinstance(info, dict):
        raise EngineUnavailable(f"{where} answered no object: {info!r:.200}")
    return info


async def get_document(session: aiohttp.ClientSession, where: str, timeout_s: float) -> Any:
    """What a route that a server need not have answers as JSON; None where it has none.

    Raises:
        TimeoutError: it did not answer.
        EngineUnavailable: the server is gone.
    """
    try:
        async with session.get(where, timeout=aiohttp.ClientTimeout(total=timeout_s)) as response:
            status, payload = response.status, await response.read()
    except TimeoutError:
        raise
    except (aiohttp.ClientError, OSError) as error:
        raise EngineUnavailable(f"lost the engine at {where}: {error or type(error).__name__}") from error
    if status != 200:
        return None
    try:
        return json.loads(payload)
    except ValueError:
        return None


def raise_for(status: int, payload: bytes, where: str, *, first: bool = False) -> NoReturn:
    """The fault that a status other than 200 stands for; the first request is ours, never a job's."""
    message = error_message(payload)
    if status in _REFUSED and not first:
        raise RequestRefused(f"the engine refused the request: {message}")
    if status in {401, 403}:
        raise EngineUnavailable(f"{where} refuses the key ({message}); set engine.api_key to the server's")
    raise EngineUnavailable(f"{where} answered {status}: {message}")


def decode(payload: bytes, where: str) -> Any:
    """The JSON of a reply."""
    try:
        return json.loads(payload)
    except ValueError:
        raise EngineUnavailable(f"{where} answered no JSON: {payload[:200]!r}") from None
