"""Makes sure that an attached engine was the same one during a whole call.

Invariant: a completion is returned only if the engine's identity, asked after the call, is still the one
learned when it was attached; an identity never comes back, so the engine was the same before and during the
call too.
"""

import asyncio
from collections.abc import Iterable

from rollpool.schemas import EngineUnavailable
from rollpool.worker.engines.protocol import (
    ChatRequest,
    Completion,
    Engine,
    EngineFacts,
    EngineLoad,
    SampleRequest,
)


class GuardedEngine:
    """An engine somebody else may replace at any time.

    Args:
        engine: as attached.
        patience_s: how long it may be silent, as while it compiles, before it counts as gone.
    """

    def __init__(self, engine: Engine, *, patience_s: float) -> None:
        self._engine = engine
        self._patience_s = patience_s
        self._asking: asyncio.Task[str] | None = None
        self._next: asyncio.Task[str] | None = None
        self._successor = ""
        #: Set once the engine is known to be another.
        self.replaced = asyncio.Event()

    @property
    def facts(self) -> EngineFacts:
        """As learned when it was attached."""
        return self._engine.facts

    async def generate(self, request: SampleRequest) -> Completion:
        """Generate one sample, by the engine that was attached or not at all."""
        self._refuse_another()
        completion = await self._engine.generate(request)
        await self.confirm()
        return completion

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
