"""Makes sure that an attached engine was the same one during a whole call.

Invariant: a completion is returned only if the engine's identity, asked after the call, is still the one
learned when it was attached; an identity never comes back, so the engine was the same before and during the
call too. Which weights it has is its owner's to say: by the identity, never by the versions that it calls them.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from rollpool.schemas import EngineUnavailable
from rollpool.worker.engines.protocol import (
    Adapter,
    ChatRequest,
    Completion,
    Engine,
    EngineFacts,
    EngineLoad,
    SampleRequest,
    WeightsRefused,
)


class GuardedEngine:
    """An engine somebody else may replace at any time.

    Args:
        engine: as attached.
        patience_s: how long it may be silent, as while it compiles, before it counts as gone.
    """

    def __init__(self, engine: Engine, *, patience_s: float) -> None:
        self._engine = engine
        self._facts = replace(engine.facts, swaps=False)
        self._patience_s = patience_s
        self._asking: asyncio.Task[str] | None = None
        self._next: asyncio.Task[str] | None = None
        self._successor = ""
        #: Set once the engine is known to be another.
        self.replaced = asyncio.Event()

    @property
    def facts(self) -> EngineFacts:
        """As learned when it was attached; its weights are not this worker's to change."""
        return self._facts

    async def generate(self, request: SampleRequest) -> Completion:
        """Generate one sample, by the engine that was attached or not at all."""
        self._refuse_another()
        completion = await self._engine.generate(request)
        await self.confirm()
        return _of_one_version(completion, request.rid)

    async def chat(self, request: ChatRequest) -> Completion:
        """Answer one chat, by the engine that was attached or not at all."""
        self._refuse_another()
        completion = await self._engine.chat(request)
        await self.confirm()
        return completion

    async def abort(self, rids: Iterable[str]) -> None:
        """As the engine does."""
        await self._engine.abort(rids)

    async def load(self) -> EngineLoad | None:
        """As the engine does, while it is the one that was attached."""
        self._refuse_another()
        return await self._engine.load()

    async def swap(self, checkpoint: str, version: int) -> None:
        """Refused: somebody else says what it serves."""
        del version
        raise WeightsRefused(
            f"the engine is attached, so its weights are not this worker's to change; have whoever launched it serve "
            f"{checkpoint}"
        )

    async def load_adapter(self, adapter: Adapter) -> None:
        """As the engine does, while it is the one that was attached: adapters lie beside its weights."""
        self._refuse_another()
        await self._engine.load_adapter(adapter)
        await self.confirm()

    async def unload_adapter(self, name: str) -> None:
        """As the engine does, while it is the one that was attached."""
        self._refuse_another()
        await self._engine.unload_adapter(name)
        await self.confirm()

    async def flush_cache(self) -> None:
        """As the engine does, while it is the one that was attached."""
        self._refuse_another()
        await self._engine.flush_cache()
        await self.confirm()

    async def identify(self) -> str:
        """As the engine does."""
        return await self._engine.identify()

    async def close(self) -> None:
        """As the engine does."""
        await self._engine.close()

    async def confirm(self) -> None:
        """Ask who answers now. Raises EngineUnavailable when it is not the engine that was attached.

        Calls that end together share one question, which is asked after all of them ended.
        """
        identity = await asyncio.shield(self._question())
        if identity != self.facts.identity:
            self._successor = identity
            self.replaced.set()
        self._refuse_another()

    def _refuse_another(self) -> None:
        if self.replaced.is_set():
            raise EngineUnavailable(
                f"the engine was replaced while it was in use (was {self.facts.identity}, is {self._successor}); "
                "what it made is not used, since nobody can say which weights made it"
            )

    def _question(self) -> asyncio.Task[str]:
        """The next question to begin: one under way may have been answered before this call ended."""
        if self._next is None:
            self._next = asyncio.create_task(self._ask(self._asking))
        return self._next

    async def _ask(self, before: asyncio.Task[str] | None) -> str:
        if before is not None:
            await asyncio.wait([before])
        self._asking, self._next = self._next, None
        try:
            async with asyncio.timeout(self._patience_s):
                return await self._identity()
        except TimeoutError:
            raise EngineUnavailable(f"the engine did not tell who it is within {self._patience_s:.0f} s") from None

    async def _identity(self) -> str:
        while True:
            try:
                return await self._engine.identify()
            except EngineUnavailable:
                # Raises as well where the engine is gone; one that is only silent is asked again.
                await self._engine.load()


def _of_one_version(completion: Completion, rid: str) -> Completion:
    """Without the engine's own names for its weights, which are not the pool's versions; of several nothing is used."""
    if len({span.version for span in completion.version_spans}) > 1:
        raise EngineUnavailable(
            f"the weights of the engine were changed while it generated {rid}; run the request again, since nobody "
            "can say which weights made what"
        )
    return replace(completion, version_spans=())
