"""An engine that is an sglang-jax server on this host.

Invariants: nothing is asked of a server but generating until it has generated, since 0.0.1.post1 answers
nothing else before; every failure is told as one of the two faults; and cancelling a call closes its
connection, by which the server ends the request within two seconds.
"""

import asyncio
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit

import aiohttp
import numpy as np

from rollpool.schemas.jobs import SamplingParams
from rollpool.worker.engines.dialects import Dialect, check_fits, error_message, pick_dialect
from rollpool.worker.engines.listener import Listener
from rollpool.worker.engines.progress import ProgressWatch
from rollpool.worker.engines.protocol import (
    ChatRequest,
    Completion,
    EngineFacts,
    EngineLoad,
    EngineUnavailable,
    RequestRefused,
    SampleRequest,
    new_rid,
)

log = logging.getLogger(__name__)

#: Statuses by which a server says that the request itself is at fault.
_REFUSED = frozenset({400, 413, 422})

#: Seconds to open a connection on this host; a server that is up accepts at once, unless its loop is blocked.
_CONNECT_S = 10.0

#: Seconds that an idle connection is kept. The server closes its own after 5: reusing one that is being
#: closed would look like a dead engine.
_KEEPALIVE_S = 2.0

#: Seconds that a question about the server's state may take; the scheduler answers between two batches.
_ASK_S = 10.0

#: Seconds for the first question of all: 0.0.1.post1 never answers it before its first request.
_FRESH_ASK_S = 2.0

#: Seconds between two looks at a server that is not ready.
_POLL_S = 0.25

#: Tokens of the first request: two, so that it decodes as well as prefills.
_PROBE_TOKENS = 2


class HttpEngine:
    """One server, through its HTTP surface; make it with `attach`."""

    def __init__(
        self,
        url: str,
        facts: EngineFacts,
        dialect: Dialect,
        session: aiohttp.ClientSession,
        *,
        progress: ProgressWatch | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._facts = facts
        self._dialect = dialect
        self._session = session
        self._progress = progress or ProgressWatch(time.monotonic, float("inf"))
        self._witness = _Witness(self._url)
        self._identifying = asyncio.Lock()
        self._inflight: set[str] = set()
        self._aborted: set[str] = set()

    @classmethod
    async def attach(
        cls,
        url: str,
        *,
        timeout_s: float = 60.0,
        api_key: str | None = None,
        progress: ProgressWatch | None = None,
    ) -> "HttpEngine":
        """Wait until the server at `url` really generates, and learn what it is.

        Args:
            url: `http://host:port`.
            timeout_s: how long to wait; compiling the first request on a TPU can take minutes.
            api_key: sent as a bearer token.
            progress: is told of every request.

        Raises:
            EngineUnavailable: it did not generate in time, refuses the key, or is no sglang-jax server.
        """
        session = _new_session(api_key)
        try:
            return await _Attaching(url.rstrip("/"), session, timeout_s, progress).run()
        except BaseException:
            await session.close()
            raise

    @property
    def facts(self) -> EngineFacts:
        """What the engine is; learned once."""
        return self._facts

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self._url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def generate(self, request: SampleRequest) -> Completion:
        """Generate one sample; there is no limit of time, since the caller knows what it waits for."""
        check_fits(self._facts, request)
        reply, aborted = await self._ask("/generate", request.rid, self._dialect.generate_body(request))
        return self._dialect.parse_generate(reply, request, aborted=aborted)

    async def chat(self, request: ChatRequest) -> Completion:
        """Answer one chat."""
        body = self._dialect.chat_body(request, self._facts.model_path)
        reply, aborted = await self._ask("/v1/chat/completions", request.rid, body)
        return self._dialect.parse_chat(reply, request, aborted=aborted)

    async def abort(self, rids: Iterable[str]) -> None:
        """End those of `rids` that are in flight here.

        The server matches by prefix, which ids of one length make exact. On the main line a request that
        still waits in its queue is leaked by this, and the process then ends only by SIGKILL.
        """
        mine = [rid for rid in rids if rid in self._inflight]
        self._aborted.update(mine)
        await asyncio.gather(*(self._post("/abort_request", {"rid": rid}, parse=False) for rid in mine))

    async def load(self) -> EngineLoad | None:
        """What the engine runs now; None when it does not answer in time, as while it compiles.

        `/get_load` is not asked: it answers 500 in both lines, with a traceback in the log that would pass
        for the cause of a later death.
        """
        try:
            load = self._dialect.parse_load(await self._info())
        except TimeoutError:
            return None
        self._progress.observed(load)
        return load

    async def identify(self) -> str:
        """The identity of what answers now."""
        try:
            info = await self._info()
        except TimeoutError:
            raise EngineUnavailable(f"the engine at {self._url} did not tell who it is within {_ASK_S:.0f} s") from None
        return await self._witness.identity(self._dialect, info)

    async def close(self) -> None:
        """Close the connections; requests in flight end, in the server too."""
        await self._session.close()

    async def _ask(self, path: str, rid: str, body: dict[str, Any]) -> tuple[Any, bool]:
        """Post one request that generates; the reply, and whether it was aborted on purpose meanwhile."""
        self._inflight.add(rid)
        self._progress.started()
        completed = False
        try:
            reply = await self._post(path, body)
            completed = True
            return reply, rid in self._aborted
        finally:
            self._progress.ended(completed=completed)
            self._inflight.discard(rid)
            self._aborted.discard(rid)

    async def _post(self, path: str, body: dict[str, Any], *, parse: bool = True) -> Any:
        self._check_open()
        try:
            async with self._session.post(self._url + path, data=json.dumps(body).encode()) as response:
                status, payload = response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:
            self._witness.lost_sight()
            raise EngineUnavailable(
                f"lost the engine at {self._url} during {path}: {error or type(error).__name__}; "
                "run the request again when it is back"
            ) from error
        if status != 200:
            _raise_for(status, payload, f"{self._url}{path}")
        return _decode(payload, f"{self._url}{path}") if parse else None

    def _check_open(self) -> None:
        if self._session.closed:
            raise EngineUnavailable(f"the engine at {self._url} was closed; run the request on its successor")

    async def _info(self) -> dict[str, Any]:
        self._check_open()
        return await _get_info(self._session, self._url, _ASK_S, self._witness)

    async def _introduce(self, info: dict[str, Any]) -> None:
        """Complete what attaching learned."""
        identity = await self._witness.identity(self._dialect, info)
        self._facts = replace(self._facts, identity=identity)


class _Witness:
    """What is seen from outside of which process answers at a URL.

    A server somebody else started tells nothing of its own that changes with the process. So: the process
    that listens, where it can be seen; a count that only rises within one process, where the line tells
    one; and every lost connection counts as a possible restart.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        here = parts.hostname in {"127.0.0.1", "localhost", "::1"}
        self._listener = Listener(parts.port or 80) if here else None
        self._epoch = 0
        self._counter = 0

    def lost_sight(self) -> None:
        self._epoch += 1

    async def identity(self, dialect: Dialect, info: dict[str, Any]) -> str:
        counter = dialect.progress_counter(info)
        if counter is not None:
            if counter < self._counter:
                self._epoch += 1
            self._counter = counter
        place = await asyncio.to_thread(self._listener.identity) if self._listener else ""
        return f"{dialect.identity(info)}|{place}|{self._epoch}"


class _Attaching:
    """The way from a URL to an engine that generates."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, timeout_s: float, progress: ProgressWatch | None
    ) -> None:
        self._url = url
        self._session = session
        self._timeout_s = timeout_s
        self._progress = progress
        self._last = "no connection was tried"

    async def run(self) -> HttpEngine:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._until_it_listens()
                await self._until_warmed()
                await self._until_it_generates()
                return await self._learn()
        except TimeoutError:
            raise EngineUnavailable(
                f"the engine at {self._url} did not generate within {self._timeout_s:.0f} s; last: {self._last}"
            ) from None

    async def _until_it_listens(self) -> None:
        """A server listens once its model is loaded; `/get_model_info` answers in both lines from then on."""
        while True:
            try:
                async with self._session.get(f"{self._url}/get_model_info") as response:
                    status, payload = response.status, await response.read()
                if status == 200:
                    return
                if status < 500:
                    _raise_for(status, payload, f"{self._url}/get_model_info")
                self._last = f"status {status}: {error_message(payload)}"
            except (aiohttp.ClientError, OSError) as error:
                self._last = str(error) or type(error).__name__
            await asyncio.sleep(_POLL_S)

    async def _until_warmed(self) -> None:
        """Let a stock server's own warm-up pass: without log-probs, it would kill the server beside ours."""
        while True:
            try:
                info = await _get_info(self._session, self._url, _FRESH_ASK_S)
            except TimeoutError:
                # A fresh 0.0.1.post1 answers this only after its first request, which is then ours to make.
                return
            if pick_dialect(str(info.get("version"))).warmed(info):
                return
            self._last = "it has not finished its own warm-up"
            await asyncio.sleep(_POLL_S)

    async def _until_it_generates(self) -> None:
        self._last = "it accepts requests but has not generated yet"
        request = SampleRequest(
            rid=new_rid(),
            input_ids=np.ones(1, np.int32),
            sampling=SamplingParams(max_new_tokens=_PROBE_TOKENS, ignore_eos=True),
        )
        dialect = pick_dialect("")  # both lines take the same body for this
        body = json.dumps(dialect.generate_body(request)).encode()
        try:
            async with self._session.post(f"{self._url}/generate", data=body) as response:
                status, payload = response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnavailable(f"the engine at {self._url} died on its first request: {error}") from error
        if status != 200:
            _raise_for(status, payload, f"{self._url}/generate", first=True)
        dialect.parse_generate(_decode(payload, self._url), request)

    async def _learn(self) -> HttpEngine:
        self._last = "it generates, but does not answer /get_server_info"
        info = await _get_info(self._session, self._url, _ASK_S)
        dialect = pick_dialect(str(info.get("version")))
        facts = dialect.parse_facts(info, identity="")
        engine = HttpEngine(self._url, facts, dialect, self._session, progress=self._progress)
        await engine._introduce(info)
        return engine


async def _get_info(
    session: aiohttp.ClientSession, url: str, timeout_s: float, witness: _Witness | None = None
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
        _raise_for(status, payload, where, first=True)
    info = _decode(payload, where)
    if not isinstance(info, dict):
        raise EngineUnavailable(f"{where} answered no object: {info!r:.200}")
    return info


def _new_session(api_key: str | None) -> aiohttp.ClientSession:
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


def _raise_for(status: int, payload: bytes, where: str, *, first: bool = False) -> NoReturn:
    """The fault that a status other than 200 stands for; the first request is ours, never a job's."""
    message = error_message(payload)
    if status in _REFUSED and not first:
        raise RequestRefused(f"the engine refused the request: {message}")
    if status in {401, 403}:
        raise EngineUnavailable(f"{where} refuses the key ({message}); set engine.api_key to the server's")
    raise EngineUnavailable(f"{where} answered {status}: {message}")


def _decode(payload: bytes, where: str) -> Any:
    try:
        return json.loads(payload)
    except ValueError:
        raise EngineUnavailable(f"{where} answered no JSON: {payload[:200]!r}") from None
