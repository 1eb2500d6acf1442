"""Who owns the engine of a host: the worker that launched it, or somebody else at a URL.

Invariant: between `open` and `close` there is one engine, and `watch` returns, with the reason, once it can
no longer be trusted to be that engine.
"""

import asyncio
from contextlib import suppress
from pathlib import Path

from rollpool.schemas import EngineUnavailable
from rollpool.worker.engines.attached import GuardedEngine
from rollpool.worker.engines.dialects import Dialect, pick_dialect
from rollpool.worker.engines.http_engine import HttpEngine
from rollpool.worker.engines.preflight import HostLock, check_model, preflight
from rollpool.worker.engines.process import EngineProcess
from rollpool.worker.engines.protocol import Engine, EngineOwner
from rollpool.worker.engines.settings import EngineSettings

#: Seconds between looks at an attached engine: between two calls nothing else would show that it was
#: replaced.
LOOK_EVERY_S = 5.0


class LaunchedEngine:
    """The worker's own engine: it alone owns the host's TPU, and ends its engine with itself."""

    controls_weights = True

    def __init__(self, settings: EngineSettings, log_path: Path) -> None:
        self._settings = settings
        self._log_path = log_path
        self._lock = HostLock(settings.host_lock)
        self._dialect: Dialect | None = None
        self._process: EngineProcess | None = None
        self._engine: HttpEngine | None = None

    @property
    def url(self) -> str:
        """Where the engine answers."""
        return self._engine.url if self._engine else ""

    async def check(self, checkpoint: str) -> None:
        """See that there is a model at `checkpoint`: the engine that serves now need not end to find that out."""
        check_model(checkpoint)

    async def open(self, checkpoint: str) -> Engine:
        """Launch an engine on `checkpoint`."""
        self._lock.acquire()
        if self._dialect is None:  # the devices and the interpreter do not change while this process lives
            report = await preflight(self._settings.model_copy(update={"model_path": checkpoint}))
            self._dialect = pick_dialect(report.sglang_jax)
        self._process = EngineProcess(self._settings, self._dialect, log_path=self._log_path)
        self._engine = await self._process.start(checkpoint)
        return self._engine

    async def watch(self) -> str:
        """Return when the process, its scheduler, or its progress ended."""
        assert self._process is not None, "open first"
        return await self._process.watch()

    async def close(self) -> None:
        """End the engine."""
        if self._process is not None:
            await self._process.stop()
        self._process = self._engine = None


class AttachedEngine:
    """An engine somebody else launched; its weights change when they say so."""

    controls_weights = False

    def __init__(self, settings: EngineSettings) -> None:
        assert settings.url is not None
        self._settings = settings
        self._engine: GuardedEngine | None = None

    @property
    def url(self) -> str:
        """Where the engine answers."""
        return self._settings.url or ""

    async def check(self, checkpoint: str) -> None:
        """Nothing: its weights are not ours to choose."""

    async def open(self, checkpoint: str) -> Engine:
        """Attach; what it serves is in the facts, `checkpoint` is only what one hopes for."""
        del checkpoint
        key = self._settings.api_key.get_secret_value() if self._settings.api_key else None
        self._engine = GuardedEngine(
            await HttpEngine.attach(self.url, timeout_s=self._settings.start_timeout_s, api_key=key),
            patience_s=self._settings.stall_timeout_s,
        )
        return self._engine

    async def watch(self) -> str:
        """Return when another engine answers, or none."""
        assert self._engine is not None, "open first"
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._engine.replaced.wait(), LOOK_EVERY_S)
            try:
                await self._engine.confirm()
            except EngineUnavailable as error:
                return str(error)

    async def close(self) -> None:
        """Close the connections; the engine goes on."""
        if self._engine is not None:
            await self._engine.close()
        self._engine = None


def owner_for(settings: EngineSettings, log_path: Path) -> EngineOwner:
    """Attach where a URL is set, launch otherwise."""
    return AttachedEngine(settings) if settings.url else LaunchedEngine(settings, log_path)
