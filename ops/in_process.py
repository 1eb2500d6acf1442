"""A pool whose one host is this process: trainer and rollouts on disjoint devices of one TPU host.

Invariant: it is a pool like any other, over the same queue, with the same worker; only the engine is here, and
parameters reach it without files. Closing it ends everything it started, in this order: the trainer's side, the host
with its engine, the server.
"""

import asyncio
import atexit
import contextlib
import functools
import logging
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from rollpool.ops.devices import refuse_multi_host, refuse_overlap
from rollpool.ops.local.server import LocalServer
from rollpool.producer.blocking import RolloutPool
from rollpool.schemas import EngineUnavailable, PoolTimeout, RollpoolError, SettingsError
from rollpool.worker.engines.in_process_owner import InProcessOwner, InProcessSettings
from rollpool.worker.host import Host
from rollpool.worker.settings import WorkerSettings
from rollpool.worker.sources import Sources

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds between looks whether the engine serves.
_LOOK_S = 0.1

#: Seconds a lease lasts here: while JAX traces a large program, other threads get few turns. Nobody waits for it: a
#: process that ended is known to have.
_LEASE_S = 60.0

#: Seconds until the host has given back its work and its engine has ended.
_STOP_S = 90.0


def _while_served(method: Callable[Concatenate["LocalPool", P], R]) -> Callable[Concatenate["LocalPool", P], R]:
    """A method for which somebody has to serve the pool."""

    @functools.wraps(method)
    def call(self: "LocalPool", /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.check()
        return method(self, *args, **kwargs)

    return call


class LocalPool(RolloutPool):
    """A `RolloutPool` with its host in this process; made by `local_pool`.

    Should the host end by a fault, what is open is cancelled, so that nobody collects for ever, and enqueueing,
    publishing and waiting for a policy raise EngineUnavailable, with the reason. An engine that fails is no such fault:
    the host starts it anew.
    """

    def __init__(self, host: "_HostThread", stack: contextlib.ExitStack, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._host = host
        self._stack = stack
        host.on_end = self._nobody_serves
        _at_the_end(self)

    def close(self) -> None:
        """End the pool, its host, its engine and its server; harmless to repeat."""
        self._host.on_end = _nothing
        super().close()
        self._stack.close()

    enqueue_prompts = _while_served(RolloutPool.enqueue_prompts)
    publish_policy = _while_served(RolloutPool.publish_policy)
    wait_for_policy = _while_served(RolloutPool.wait_for_policy)

    def check(self) -> None:
        """Raise EngineUnavailable where the host has ended."""
        self._host.check()

    def _nobody_serves(self) -> None:
        with contextlib.suppress(RollpoolError):
            self.cancel()


def local_pool(
    model_path: str | Path,
    *,
    rollout_devices: Any,
    train_devices: Any = None,
    url: str | None = None,
    pool: str = "local",
    run: str | None = None,
    start_timeout: float = 1800.0,
    engine: Mapping[str, Any] | None = None,
    host: Mapping[str, Any] | None = None,
    **options: Any,
) -> LocalPool:
    """Start an engine on some devices of this process, and return a pool that it serves.

    The pool is used as any `RolloutPool`; beside `checkpoint=` and `lora_path=` its `publish_policy` takes
    `params=`: the parameters go from the trainer's devices to the engine's, without files. Use it as a context
    manager, or close it; at the end of the process it closes by itself.

    Args:
        model_path: Directory in Hugging Face layout, served as version 0 until a policy is published.
        rollout_devices: A mesh, devices, or their numbers, counted from the first of this process.
        train_devices: The trainer's, only to see that they are others.
        url: A server, so that others may look on, or join in; None: one of its own, as a child process.
        pool: The pool's name.
        run: The training run; by default $ROLLPOOL_RUN, then `default`.
        start_timeout: Seconds until the engine must serve: compiling for a TPU with a cold cache takes long.
        engine: Fields of `InProcessSettings` beside model, devices and platform.
        host: Fields of `WorkerSettings`, as `oversubscription` or `drain_s`.
        options: Of `RolloutPool`: `backlog_limit`, `staleness_rule`, ….

    Raises:
        SettingsError: The devices overlap, are none of this process's, or this is one of several processes of a JAX
            program; or a setting cannot be.
        EngineUnavailable: The engine does not start; the message says why.
    """
    indexes = _indexes(rollout_devices, train_devices)
    with contextlib.ExitStack() as stack:
        if url is None:
            url = stack.enter_context(LocalServer()).url
        owner, worker = _owner(str(model_path), indexes, engine or {}, host or {}, stack)
        thread = stack.enter_context(_HostThread(Host(url, pool, f"in-process-{pool}", worker, owner)))
        thread.until_serving(start_timeout)
        return LocalPool(thread, stack.pop_all(), url, pool=pool, run=run, params=owner, **options)


def _indexes(rollout: Any, train: Any) -> tuple[int, ...]:
    import jax

    refuse_multi_host(jax.process_count())
    here = [device.id for device in jax.devices()]
    first, second = (_numbers(devices, here) for devices in (rollout, train))
    refuse_overlap(first, second)
    return first


def _numbers(devices: Any, here: Sequence[int]) -> tuple[int, ...]:
    """Positions among this process's devices, of a mesh, of devices, or of numbers that are positions already."""
    if devices is None:
        return ()
    listed = devices.devices.flat if hasattr(devices, "devices") else devices
    numbers = [here.index(each.id) if hasattr(each, "id") else int(each) for each in listed]
    if not set(numbers) <= set(range(len(here))):
        raise SettingsError(f"devices {numbers}: there are {len(here)} here, 0 to {len(here) - 1}")
    return tuple(numbers)


def _owner(
    model_path: str,
    indexes: tuple[int, ...],
    engine: Mapping[str, Any],
    host: Mapping[str, Any],
    stack: contextlib.ExitStack,
) -> tuple[InProcessOwner, WorkerSettings]:
    import jax
    from pydantic import ValidationError

    try:
        settings = InProcessSettings(
            model_path=model_path, device_indexes=indexes, device=jax.default_backend(), **engine
        )
        # The environment's settings are those of the user's other hosts.
        given = {"lease_s": _LEASE_S, "drain_s": 0.0, "engine": {"model_path": model_path}, **host}
        worker = WorkerSettings.model_validate(WorkerSettings.model_construct().model_dump() | given)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        raise SettingsError(f"local_pool: {'.'.join(map(str, found['loc']))}: {found['msg']}") from error
    stage = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rollpool-stage-")))
    sources = Sources(stage, roots=worker.model_roots, budget_bytes=int(worker.stage_gib * (1 << 30)))
    return InProcessOwner(settings, sources), worker


def _at_the_end(pool: LocalPool) -> None:
    """Close a pool that is forgotten when the program ends.

    The host ends by means of threads, of which there are no new ones when `atexit` has its turn; what
    `concurrent.futures` itself uses has it before.
    """
    forgotten = weakref.ref(pool)

    def close() -> None:
        if (pool := forgotten()) is not None:
            pool.close()

    getattr(threading, "_register_atexit", atexit.register)(close)


def _nothing() -> None:
    """Where nobody is to be told."""


class _HostThread:
    """A host, and the thread that runs it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="rollpool-host", daemon=True)
        self._error: BaseException | None = None
        self.on_end: Callable[[], None] = _nothing

    def __enter__(self) -> "_HostThread":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it ends at this moment
                self._loop.call_soon_threadsafe(self._host.stop_now)
        self._thread.join(_STOP_S)
        if self._thread.is_alive():
            log.error("the host did not end within %.0f s; it ends with the process", _STOP_S)

    def check(self) -> None:
        """Raise EngineUnavailable where the host has ended."""
        if self._error is not None or not self._thread.is_alive():
            raise EngineUnavailable(f"the host in this process ended: {self._error}") from self._error

    def until_serving(self, timeout: float) -> None:
        """Wait until the engine serves. Raises EngineUnavailable with the reason why it does not."""
        until, shown = time.monotonic() + timeout, ""
        while (status := self._host.status()).state != "serving":
            self.check()
            if status.state == "broken" and status.error:
                raise EngineUnavailable(status.error)
            if status.error and status.error != shown:
                log.warning("%s", shown := status.error)
            if time.monotonic() > until:
                raise PoolTimeout(f"the engine in this process does not serve after {timeout:.0f} s: {status.state}")
            time.sleep(_LOOK_S)

    def _run(self) -> None:
        # Not by `asyncio.run`: at the end it starts a thread, which cannot be once the program ends.
        loop = self._loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._host.run())
            loop.run_until_complete(loop.shutdown_asyncgens())
        except BaseException as error:
            self._error = error
            log.exception("the host in this process ended")
            self.on_end()
        finally:
            loop.close()
