"""An engine that is an sglang-jax server on this host.

Invariants: nothing is asked of a server but generating until it has generated, since 0.0.1.post1 answers
nothing else before; every failure is told as one of the two faults; cancelling a call closes its connection, by which
the server ends the request within two seconds; and `identify` returns `facts.identity` while the same process answers,
through every change of its weights that was made here.
"""

import asyncio
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import aiohttp

from rollpool.worker.engines.changes import confirm_change, swap_body
from rollpool.worker.engines.dialects import Dialect, check_fits, error_message, pick_dialect
from rollpool.worker.engines.http_calls import decode, get_document, get_info, new_session, raise_for
from rollpool.worker.engines.progress import ProgressWatch
from rollpool.worker.engines.protocol import (
    Adapter,
    ChatRequest,
    Completion,
    EngineFacts,
    EngineLoad,
    EngineUnavailable,
    SampleRequest,
    WeightsRefused,
    aborted_in_queue,
    probe_request,
)
from rollpool.worker.engines.surface import (
    ABOUT,
    DOCUMENT,
    FLUSH_CACHE,
    LOAD_ADAPTER,
    SWAP,
    UNLOAD_ADAPTER,
    Surface,
    routes_of,
)
from rollpool.worker.engines.witness import Witness

log = logging.getLogger(__name__)

#: Seconds that a question about the server's state may take; the scheduler answers between two batches.
_ASK_S = 10.0

#: Seconds for the first question of all: 0.0.1.post1 never answers it before its first request.
_FRESH_ASK_S = 2.0

#: Seconds between two looks at a server that is not ready.
_POLL_S = 0.25

#: Seconds after which an abort is sent once more: one that overtakes its request on the way is not heard.
_ABORT_AGAIN_S = 0.5

#: Times that a server is asked what it is after a change of its weights, each for `_ASK_S`: with other weights it may
#: compile first.
_ASKS_AFTER_SWAP = 30


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
        self._witness = Witness(self._url)
        #: Held while the weights are changed, which sets back what the process is recognised by, and while it is asked.
        self._changing = asyncio.Lock()
        #: Requests that were not answered yet, each with what is set once it is.
        self._inflight: dict[str, asyncio.Event] = {}
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
        session = new_session(api_key)
        try:
            return await _Attaching(url.rstrip("/"), session, timeout_s, progress).run()
        except BaseException:
            await session.close()
            raise

    @property
    def facts(self) -> EngineFacts:
        """What the engine is; learned once, and of its weights anew with each swap."""
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
        return self._dialect.parse_chat(reply, request, aborted=aborted) if reply else aborted_in_queue()

    async def abort(self, rids: Iterable[str]) -> None:
        """End those of `rids` that are in flight here; returns when all their calls have ended.

        The server matches by prefix, which ids of one length make exact. It is asked again where a call goes on, since
        it hears nothing of an abort that overtakes its request. A request that still waits in the server's queue is
        leaked by this, in both lines: the process then ends by SIGKILL alone, so the progress watch is told.
        """
        mine = [rid for rid in rids if rid in self._inflight]
        self._aborted.update(mine)
        self._progress.gave_up(len(mine))
        while mine:
            await asyncio.gather(*map(self._abort, mine))
            await self._ended(mine, _ABORT_AGAIN_S)
            mine = [rid for rid in mine if rid in self._inflight]

    async def swap(self, checkpoint: str, version: int) -> None:
        """Serve other weights from now on; there is no limit of time, as with `generate`."""
        if not self._facts.swaps:
            raise WeightsRefused(
                f"the engine at {self._url} cannot change its weights while it serves; restart it on {checkpoint}",
                restart_may_help=True,
            )
        async with self._changing:
            what = f"change to the weights of {checkpoint}"
            try:
                reply = await self._change(SWAP, swap_body(checkpoint, version), what, restart_may_help=True)
            except WeightsRefused:
                raise
            except BaseException:
                self._witness.lost_sight()  # nobody knows which weights it has
                raise
            self._witness.flushed()
            info = await self._info_after_swap()
            identity = await self._witness.identity(self._dialect, info)
            self._facts = replace(self._facts, model_path=checkpoint, identity=identity)
        log.info(
            "the engine at %s serves %s as version %d: %s requests went on under it, after %s s",
            *(self._url, checkpoint, version, reply.get("num_paused_requests"), reply.get("stall_seconds")),
        )

    async def load_adapter(self, adapter: Adapter) -> None:
        """Load an adapter; one that is there already is none too many for the server."""
        self._check_runtime_lora(adapter.name)
        async with self._changing:
            body = {"lora_name": adapter.name, "lora_path": adapter.path}
            await self._change(LOAD_ADAPTER, body, f"load the adapter {adapter.name} from {adapter.path}")

    async def unload_adapter(self, name: str) -> None:
        """Free an adapter's slot."""
        self._check_runtime_lora(name)
        async with self._changing:
            await self._change(UNLOAD_ADAPTER, {"lora_name": name}, f"unload the adapter {name}")

    async def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        if not self._dialect.flushes:
            raise WeightsRefused(
                f"sglang-jax {self._facts.line} cannot flush its prefix cache; restart the engine at {self._url}",
                restart_may_help=True,
            )
        async with self._changing:
            await self._change(FLUSH_CACHE, {}, "flush its prefix cache")
            self._witness.flushed()

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
        """The identity of what answers now; told after a change that is under way."""
        async with self._changing:
            try:
                info = await self._info()
            except TimeoutError:
                raise EngineUnavailable(
                    f"the engine at {self._url} did not tell who it is within {_ASK_S:.0f} s"
                ) from None
            return await self._witness.identity(self._dialect, info)

    async def close(self) -> None:
        """Close the connections; requests in flight end, in the server too."""
        await self._session.close()

    async def _ask(self, path: str, rid: str, body: dict[str, Any]) -> tuple[Any, bool]:
        """Post one request that generates.

        Returns:
            The reply, None for a chat that was aborted before it began; and whether it was aborted on purpose.
        """
        ended = self._inflight[rid] = asyncio.Event()
        self._progress.started()
        completed = False
        try:
            status, payload = await self._send(path, body)
            aborted = rid in self._aborted
            if aborted and self._dialect.aborted_chat(status, payload):
                return None, True
            reply = self._reply(status, payload, path)
            completed = True
            return reply, aborted
        finally:
            self._progress.ended(completed=completed)
            del self._inflight[rid]
            ended.set()
            self._aborted.discard(rid)

    async def _ended(self, rids: Iterable[str], timeout_s: float) -> None:
        """Wait until these requests were answered, or the time is over."""
        events = [self._inflight[rid] for rid in rids if rid in self._inflight]
        try:
            async with asyncio.timeout(timeout_s):
                for event in events:
                    await event.wait()
        except TimeoutError:
            pass

    def _reply(self, status: int, payload: bytes, path: str) -> Any:
        if status != 200:
            raise_for(status, payload, f"{self._url}{path}")
        return decode(payload, f"{self._url}{path}")

    async def _abort(self, rid: str) -> None:
        status, payload = await self._send("/abort_request", {"rid": rid})
        if status != 200:
            raise_for(status, payload, f"{self._url}/abort_request", first=True)

    async def _change(
        self, path: str, body: dict[str, Any], what: str, *, restart_may_help: bool = False
    ) -> dict[str, Any]:
        """Post what changes the engine, which may stand still for it; the reply."""
        with self._progress.changing():
            status, payload = await self._send(path, body)
        return confirm_change(status, payload, what, restart_may_help=restart_may_help)

    async def _send(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        self._check_open()
        try:
            async with self._session.post(self._url + path, data=json.dumps(body).encode()) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:
            self._witness.lost_sight()
            raise EngineUnavailable(
                f"lost the engine at {self._url} during {path}: {error or type(error).__name__}; "
                "ask again when it is back"
            ) from error

    def _check_runtime_lora(self, name: str) -> None:
        if self._facts.lora != "runtime":
            raise WeightsRefused(
                f"the engine at {self._url} takes no adapters while it serves, so {name} is neither loaded nor "
                "unloaded: restart it",
                restart_may_help=True,
            )

    def _check_open(self) -> None:
        if self._session.closed:
            raise EngineUnavailable(f"the engine at {self._url} was closed; run the request on its successor")

    async def _info(self) -> dict[str, Any]:
        self._check_open()
        return await get_info(self._session, self._url, _ASK_S, self._witness)

    async def _info_after_swap(self) -> dict[str, Any]:
        for _ in range(_ASKS_AFTER_SWAP):
            try:
                return await self._info()
            except TimeoutError:
                continue
        raise EngineUnavailable(
            f"the engine at {self._url} changed its weights, but did not tell who it is within "
            f"{_ASKS_AFTER_SWAP * _ASK_S:.0f} s"
        )

    async def _introduce(self, info: dict[str, Any]) -> None:
        """Complete what attaching learned."""
        identity = await self._witness.identity(self._dialect, info)
        self._facts = replace(self._facts, identity=identity)


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
                    raise_for(status, payload, f"{self._url}/get_model_info")
                self._last = f"status {status}: {error_message(payload)}"
            except (aiohttp.ClientError, OSError) as error:
                self._last = str(error) or type(error).__name__
            await asyncio.sleep(_POLL_S)

    async def _until_warmed(self) -> None:
        """Let a stock server's own warm-up pass: without log-probs, it would kill the server beside ours."""
        while True:
            try:
                info = await get_info(self._session, self._url, _FRESH_ASK_S)
            except TimeoutError:
                # A fresh 0.0.1.post1 answers this only after its first request, which is then ours to make.
                return
            if pick_dialect(str(info.get("version"))).warmed(info):
                return
            self._last = "it has not finished its own warm-up"
            await asyncio.sleep(_POLL_S)

    async def _until_it_generates(self) -> None:
        self._last = "it accepts requests but has not generated yet"
        request = probe_request()
        dialect = pick_dialect("")  # both lines take the same body for this
        body = json.dumps(dialect.generate_body(request)).encode()
        try:
            async with self._session.post(f"{self._url}/generate", data=body) as response:
                status, payload = response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnavailable(f"the engine at {self._url} died on its first request: {error}") from error
        if status != 200:
            raise_for(status, payload, f"{self._url}/generate", first=True)
        dialect.parse_generate(decode(payload, self._url), request)

    async def _learn(self) -> HttpEngine:
        self._last = "it generates, but does not answer /get_server_info"
        info = await get_info(self._session, self._url, _ASK_S)
        dialect = pick_dialect(str(info.get("version")))
        self._last = "it generates, but does not say what else it can do"
        surface = await self._surface()
        facts = dialect.parse_facts(info, surface, identity="")
        if facts.line == "main" and not facts.swaps:
            log.info("the engine at %s restarts for other weights: %s", self._url, surface.no_swap)
        engine = HttpEngine(self._url, facts, dialect, self._session, progress=self._progress)
        await engine._introduce(info)
        return engine

    async def _surface(self) -> Surface:
        routes = routes_of(await get_document(self._session, self._url + DOCUMENT, _ASK_S))
        about = await get_document(self._session, self._url + ABOUT, _ASK_S) if ABOUT in routes else None
        return Surface(routes, about if isinstance(about, dict) else {})
