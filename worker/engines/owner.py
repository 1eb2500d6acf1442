"""Who owns the engine of a host: the worker that launched it, or somebody else at a URL.

Invariant: between `open` and `close` there is one engine, and `watch` returns, with the reason, once it can
no longer be trusted to be that engine. A launched one has ended before the next begins, since a TPU serves one process.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from rollpool.schemas import EngineUnavailable, Policy, PolicyRejected
from rollpool.worker.engines.attached import GuardedEngine
from rollpool.worker.engines.dialects import Dialect, pick_dialect
from rollpool.worker.engines.http_engine import HttpEngine
from rollpool.worker.engines.jit_cache import programs_in
from rollpool.worker.engines.preflight import HostLock, check_model, preflight
from rollpool.worker.engines.process import EngineProcess
from rollpool.worker.engines.protocol import Adapter, Engine, EngineOwner, OnProgress
from rollpool.worker.engines.settings import EngineSettings
from rollpool.worker.sources import Sources, adapter_facts, check_for_engine

#: Seconds between looks at an attached engine: between two calls nothing else would show that it was
#: replaced.
LOOK_EVERY_S = 5.0


class LaunchedEngine:
    """The worker's own engine: it alone owns the host's TPU, and ends its engine with itself.

    Args:
        settings: of the engine.
        log_path: where it writes.
        sources: fetches and keeps what it is launched on.
        clock: monotonic seconds.
    """

    controls_weights = True

    def __init__(
        self,
        settings: EngineSettings,
        log_path: Path,
        sources: Sources,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._log_path = log_path
        self._sources = sources
        self._clock = clock
        self._lock = HostLock(settings.host_lock)
        self._dialect: Dialect | None = None
        self._process: EngineProcess | None = None
        self._engine: HttpEngine | None = None
        self._opened = ""
        #: Seconds that the last launch took, until the engine had generated.
        self.opened_s = 0.0

    @property
    def url(self) -> str:
        """Where the engine answers."""
        return self._engine.url if self._engine else ""

    @property
    def opened(self) -> str:
        """How long the last launch took, and how many programs the JIT cache had for it, and had not."""
        return self._opened

    async def stage(self, policy: Policy, on_progress: OnProgress) -> str:
        """Fetch and verify, and see that an engine could be launched on it: the one that serves need not end for that.

        What is there may be used by a swap or a launch as it is.
        """
        directory = await self._sources.stage(policy, on_progress)
        if policy.checkpoint is not None:
            _reject_no_model(directory)
        return directory

    async def merge(self, base: str, policy: Policy, adapter: str) -> str:
        """Merge, as the sources do."""
        return await self._sources.merge(base, policy, adapter)

    def keep(self, paths: Iterable[str]) -> None:
        """As the sources do."""
        self._sources.keep(paths)

    async def open(self, checkpoint: str, *, version: int, adapters: Sequence[Adapter] = ()) -> Engine:
        """Launch an engine on `checkpoint`, once the one before it has ended."""
        await self.close()
        self._lock.acquire()
        dialect = await self._known_dialect(checkpoint)
        await asyncio.to_thread(self._check_adapters, dialect, adapters)
        cache, began = self._settings.jit_cache_dir, self._clock()
        before = await asyncio.to_thread(programs_in, cache)
        self._process = EngineProcess(self._settings, dialect, log_path=self._log_path)
        self._engine = await self._process.start(checkpoint, version=version, adapters=adapters)
        self.opened_s = self._clock() - began
        after = await asyncio.to_thread(programs_in, cache)
        anew = len(after - before)
        self._opened = f"{self.opened_s:.1f} s, JIT cache: {anew} programs compiled anew, {len(before)} were there"
        return self._engine

    async def _known_dialect(self, checkpoint: str) -> Dialect:
        """The engine's dialect: the devices and the interpreter do not change while this process lives."""
        if self._dialect is None:
            report = await preflight(self._settings.model_copy(update={"model_path": checkpoint}))
            self._dialect = pick_dialect(report.sglang_jax)
        return self._dialect

    def _check_adapters(self, dialect: Dialect, adapters: Sequence[Adapter]) -> None:
        """Refuse what the server would die of, or pass over silently."""
        if adapters and not dialect.supports_lora:
            raise EngineUnavailable(
                f"sglang-jax {dialect.line} has no LoRA, so it cannot be launched with {adapters[0].name}: merge it "
                "into a checkpoint"
            )
        if len(adapters) > self._settings.adapter_slots:
            raise EngineUnavailable(
                f"{len(adapters)} adapters are over the {self._settings.adapter_slots} slots of an engine: set "
                "engine.adapter_slots"
            )
        for adapter in adapters:
            _refuse_odd(adapter, self._settings.max_lora_rank)

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

    def __init__(self, settings: EngineSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        assert settings.url is not None
        self._settings = settings
        self._clock = clock
        self._engine: GuardedEngine | None = None
        self._opened = ""
        #: Seconds until it had generated.
        self.opened_s = 0.0

    @property
    def url(self) -> str:
        """Where the engine answers."""
        return self._settings.url or ""

    @property
    def opened(self) -> str:
        """How long it took to attach."""
        return self._opened

    async def stage(self, policy: Policy, on_progress: OnProgress) -> str:
        """Nothing to fetch: whoever owns the engine sees to what it reads."""
        del on_progress
        return policy.source

    async def merge(self, base: str, policy: Policy, adapter: str) -> str:
        """Refused: no checkpoint made here would ever be served."""
        raise PolicyRejected(
            f"policy {policy.version} cannot be merged into {base} here, since the engine at {self.url} is not this "
            "worker's to restart: launch it with LoRA, or on the merged checkpoint"
        )

    def keep(self, paths: Iterable[str]) -> None:
        """Nothing was staged."""

    async def open(self, checkpoint: str, *, version: int, adapters: Sequence[Adapter] = ()) -> Engine:
        """Attach; what it serves is in the facts, `checkpoint` is only what one hopes for."""
        del checkpoint, version, adapters
        began = self._clock()
        key = self._settings.api_key.get_secret_value() if self._settings.api_key else None
        self._engine = GuardedEngine(
            await HttpEngine.attach(self.url, timeout_s=self._settings.start_timeout_s, api_key=key),
            patience_s=self._settings.stall_timeout_s,
        )
        self.opened_s = self._clock() - began
        self._opened = f"attached in {self.opened_s:.1f} s"
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


def owner_for(settings: EngineSettings, log_path: Path, sources: Sources) -> EngineOwner:
    """Attach where a URL is set, launch otherwise."""
    return AttachedEngine(settings) if settings.url else LaunchedEngine(settings, log_path, sources)


def _reject_no_model(directory: str) -> None:
    try:
        check_model(directory)
    except EngineUnavailable as error:
        raise PolicyRejected(str(error)) from error


def _refuse_odd(adapter: Adapter, max_rank: int | None) -> None:
    try:
        odd = check_for_engine(adapter_facts(adapter.path), max_rank=max_rank)
    except PolicyRejected as error:
        raise EngineUnavailable(f"no engine is launched with the adapter {adapter.name}: {error}") from error
    if odd:
        raise EngineUnavailable(
            f"the engine would not apply the whole of the adapter {adapter.name} ({'; '.join(odd)}): merge it into a "
            "checkpoint"
        )
