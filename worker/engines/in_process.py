"""An engine in this process, on some of its devices, behind the same protocol as a server.

The second system: trainer and rollouts in one process on one TPU host, since a second process would meet the TPU's
lock. It needs the main line of sglang-jax.

Invariant: all that is asked of the engine is asked in the event loop that opened it, and every answer is read by the
same rules as a server's.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from rollpool.worker.engines.changes import confirm_change, swap_body
from rollpool.worker.engines.dialects import Dialect, check_fits, pick_dialect
from rollpool.worker.engines.embedded import EmbeddedEngine
from rollpool.worker.engines.protocol import (
    Adapter,
    ChatRequest,
    Completion,
    EngineFacts,
    EngineLoad,
    EngineUnavailable,
    RequestRefused,
    SampleRequest,
    WeightsRefused,
    aborted_in_queue,
    probe_request,
)
from rollpool.worker.engines.surface import FLUSH_CACHE, LOAD_ADAPTER, SWAP, UNLOAD_ADAPTER, Surface

log = logging.getLogger(__name__)

#: Seconds the scheduler may take to say what it runs: it answers between two batches.
_ASK_S = 5.0

#: Seconds after which an abort is sent once more: one that overtakes its request on the way is not heard.
_ABORT_AGAIN_S = 0.5


class InProcessEngine:
    """An engine in this process; made by `InProcessEngine.start`."""

    def __init__(self, embedded: EmbeddedEngine, side: Any, dialect: Dialect, facts: EngineFacts) -> None:
        self.embedded = embedded
        self._side = side
        self._dialect = dialect
        self._facts = facts
        self._aborted: set[str] = set()
        self._inflight: dict[str, asyncio.Event] = {}

    @classmethod
    async def start(cls, arguments: dict[str, Any], *, version: int) -> "InProcessEngine":
        """Launch an engine's threads, and return once it has generated.

        Args:
            arguments: of sglang-jax's `ServerArgs`, by name.
            version: of the weights it is launched on.

        Raises:
            EngineUnavailable: it does not start, or is not as it is expected.
        """
        try:
            embedded = await asyncio.to_thread(EmbeddedEngine, arguments)
        except EngineUnavailable:
            raise
        except Exception as error:
            log.error("the engine does not start", exc_info=error)
            raise EngineUnavailable(f"the engine does not start: {type(error).__name__}: {error}") from error
        try:
            return await cls._introduced(embedded, version)
        except BaseException:
            await embedded.close()
            raise

    @classmethod
    async def _introduced(cls, embedded: EmbeddedEngine, version: int) -> "InProcessEngine":
        from rollpool.worker.launch.hot_swap_routes import HttpSide

        embedded.handle_answers()
        embedded.side.begin_with(str(version))
        about = embedded.side.facts
        side = HttpSide(embedded.manager, about, str(version))
        info = embedded.info(await embedded.manager.get_internal_state())
        dialect = pick_dialect(str(info["version"]))
        routes = {SWAP, LOAD_ADAPTER, UNLOAD_ADAPTER, FLUSH_CACHE}
        surface = Surface(frozenset(routes), {"hot_swap": about.hot_swap, "lora": about.lora, "reason": about.reason})
        facts = dialect.parse_facts(info, surface, identity="")
        engine = cls(embedded, side, dialect, facts)
        engine._facts = replace(facts, identity=engine._identity(facts.model_path))
        await engine.generate(probe_request())
        return engine

    @property
    def facts(self) -> EngineFacts:
        """What the engine is; only `swap` changes it."""
        return self._facts

    async def generate(self, request: SampleRequest) -> Completion:
        """Generate one sample; there is no limit of time, since the caller knows what it waits for."""
        from sgl_jax.srt.managers.io_struct import GenerateReqInput

        check_fits(self._facts, request)
        body = self._dialect.generate_body(request)

        async def ask() -> Any:
            return await anext(self.embedded.manager.generate_request(GenerateReqInput(**body), None))

        reply, aborted = await self._tracked(request.rid, ask)
        return self._dialect.parse_generate(reply, request, aborted=aborted)

    async def chat(self, request: ChatRequest) -> Completion:
        """Answer one chat."""
        from sgl_jax.srt.entrypoints.openai.protocol import ChatCompletionRequest
        from sgl_jax.srt.entrypoints.openai.serving_chat import OpenAIServingChat

        serving = OpenAIServingChat(self.embedded.manager, self.embedded.templates)
        body = ChatCompletionRequest(**self._dialect.chat_body(request, self._facts.model_path))

        async def ask() -> Any:
            return await serving.handle_request(body, None)

        reply, aborted = await self._tracked(request.rid, ask)
        if hasattr(reply, "body"):
            status, payload = reply.status_code, bytes(reply.body)
            if aborted and self._dialect.aborted_chat(status, payload):
                return aborted_in_queue()
            raise (RequestRefused if status == 400 else EngineUnavailable)(
                f"the engine refused the chat: {payload[:500].decode(errors='replace')}"
            )
        return self._dialect.parse_chat(reply.model_dump(), request, aborted=aborted)

    async def abort(self, rids: Iterable[str]) -> None:
        """End those of `rids` that are in flight here; returns when all their calls have ended."""
        mine = {rid: ended for rid in rids if (ended := self._inflight.get(rid)) is not None}
        self._aborted.update(mine)
        for rid, ended in mine.items():
            while not ended.is_set():
                self.embedded.manager.abort_request(rid)
                try:
                    await asyncio.wait_for(ended.wait(), timeout=_ABORT_AGAIN_S)
                except TimeoutError:
                    continue

    async def load(self) -> EngineLoad | None:
        """What the engine runs now; None while it compiles."""
        self._check_alive()
        try:
            async with asyncio.timeout(_ASK_S):
                states = await self.embedded.manager.get_internal_state()
        except TimeoutError:
            return None
        return self._dialect.parse_load(self.embedded.info(states))

    async def swap(self, checkpoint: str, version: int) -> None:
        """Serve other weights from now on: of a checkpoint, or of parameters that were deposited for its directory."""
        from rollpool.worker.launch.hot_swap_routes import UpdateWeightsBody

        what = f"change to the weights of {checkpoint}"
        reply = await self._change(self._side.update_weights(UpdateWeightsBody(**swap_body(checkpoint, version))), what)
        self._facts = replace(self._facts, model_path=checkpoint, identity=self._identity(checkpoint))
        log.info(
            "the engine serves %s as version %d: %s requests went on under it, after %s s",
            *(checkpoint, version, reply.get("num_paused_requests"), reply.get("stall_seconds")),
        )

    async def load_adapter(self, adapter: Adapter) -> None:
        """Load an adapter; one that is there already is none too many."""
        from rollpool.worker.launch.hot_swap_routes import LoadAdapterBody

        self._check_lora(adapter.name)
        body = LoadAdapterBody(lora_name=adapter.name, lora_path=adapter.path)
        await self._change(self._side.load_adapter(body), f"load the adapter {adapter.name} from {adapter.path}")

    async def unload_adapter(self, name: str) -> None:
        """Free an adapter's slot."""
        from rollpool.worker.launch.hot_swap_routes import UnloadAdapterBody

        self._check_lora(name)
        await self._change(self._side.unload_adapter(UnloadAdapterBody(lora_name=name)), f"unload the adapter {name}")

    async def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        self._check_alive()
        flushed = await self.embedded.manager.flush_cache()
        if not flushed.success:
            raise WeightsRefused(f"the engine did not flush its prefix cache: {flushed.error_msg}")

    async def identify(self) -> str:
        """The identity of what answers now."""
        self._check_alive()
        return self._facts.identity

    async def close(self) -> None:
        """Nothing is between it and the engine."""

    async def _tracked(self, rid: str, ask: Callable[[], Any]) -> tuple[Any, bool]:
        """One request that generates: its reply, and whether it was aborted on purpose."""
        self._check_alive()
        ended = self._inflight[rid] = asyncio.Event()
        try:
            reply = await self._or_failure(ask)
            return reply, rid in self._aborted
        except ValueError as error:  # so the engine says that the request is at fault
            raise RequestRefused(f"the engine refused the request: {error}") from error
        except asyncio.CancelledError:
            self.embedded.manager.abort_request(rid)
            raise
        finally:
            del self._inflight[rid]
            ended.set()
            self._aborted.discard(rid)

    async def _or_failure(self, ask: Callable[[], Any]) -> Any:
        """The answer, unless the engine fails before it comes."""
        asking, failing = asyncio.ensure_future(ask()), asyncio.ensure_future(self.embedded.watch())
        try:
            await asyncio.wait([asking, failing], return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise EngineUnavailable(failing.result())
            return asking.result()
        finally:
            for task in (asking, failing):
                task.cancel()

    async def _change(self, change: Any, what: str) -> dict[str, Any]:
        self._check_alive()
        status, content = await self._or_failure(lambda: change)
        return confirm_change(status, json.dumps(content).encode(), what, restart_may_help=False)

    def _check_lora(self, name: str) -> None:
        if self._facts.lora != "runtime":
            raise WeightsRefused(
                f"this engine was launched without adapters, so {name} is neither loaded nor unloaded: set "
                "max_lora_rank"
            )

    def _check_alive(self) -> None:
        if self.embedded.failure or self.embedded.scheduler is None:
            raise EngineUnavailable(self.embedded.failure or "the engine was ended; run the request on its successor")

    def _identity(self, model_path: str) -> str:
        return f"in process|{id(self.embedded):x}|{model_path}"
