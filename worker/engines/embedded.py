"""sglang-jax's parts as threads of this process: launched without taking the process over, watched, and ended.

The engine's own launch is made for a process of its own: it replaces signal handlers, logging and the event loop's
policy, kills the whole process when a part fails, and every child of the process at its end. None of that happens here.

Invariants: what the launch changes in this process is put back, but for the patches of the engine's own classes; a part
that fails is told to whoever watches and to nobody else; and after `stop` no thread of the engine runs.
"""

import asyncio
import atexit
import contextlib
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rollpool.schemas import EngineUnavailable

log = logging.getLogger(__name__)

#: Milliseconds that an idle scheduler waits for a request at a time: as it is, it asks again at once, and a trainer in
#: the same process would get every other turn of the interpreter.
_IDLE_MS = 20

#: Seconds that the threads may take to end: a decoding step, or a compilation that has begun.
_STOP_S = 60.0

_patching = threading.Lock()
_patched = False


class _End:
    """Ends the detokenizer, which waits for outputs."""


class _Ended(BaseException):
    """Leaves the scheduler's loop, which catches no such thing."""


class EmbeddedEngine:
    """The threads of one engine.

    Args:
        arguments: of sglang-jax's `ServerArgs`, by name.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._threads: list[threading.Thread] = []
        self._ending = threading.Event()
        self._parts: list[Any] = []
        #: Why a part failed; empty while none has.
        self.failure = ""
        self._failed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.scheduler: Any = None
        self._engine = self._launched(arguments)
        #: Of `sgl_jax.srt.managers.tokenizer_manager`: all requests go through it, in one event loop.
        self.manager = self._engine.tokenizer_manager
        self.templates = self._engine.template_manager
        self._parts += [self._engine, self.manager]
        self._handling: asyncio.Task[None] | None = None

    def _launched(self, arguments: Mapping[str, Any]) -> Any:
        with _as_it_was(), _engine_module() as module:
            patch_engine()
            with _replaced(
                module,
                _set_envs_and_config=_leave_process_alone,
                configure_logger=_leave_process_alone,
                run_scheduler_loop_thread_after_create=self._run_scheduler,
                run_detokenizer_thread=self._run_detokenizer,
            ):
                try:
                    engine = module.Engine(**arguments, enable_single_process=True)
                except BaseException:
                    self._ending.set()  # what had begun before it failed
                    raise
        # Its own end kills all children of this process, the trainer's data loaders included.
        atexit.unregister(engine.shutdown)
        engine.loop.close()  # it would be asked in a loop of its own
        if self.scheduler.rollpool_side is None:
            reason = self.scheduler.rollpool_facts.reason
            self._engine = engine
            self.stop()
            raise EngineUnavailable(f"weights of this engine cannot be changed in its process: {reason}")
        return engine

    @property
    def side(self) -> Any:
        """The `SchedulerSide`: changes of weights and adapters."""
        return self.scheduler.rollpool_side

    @property
    def runner(self) -> Any:
        """The engine's `ModelRunner`."""
        return self.scheduler.tp_worker.worker.model_runner

    def info(self, states: list[Any]) -> dict[str, Any]:
        """What `/get_server_info` says.

        Args:
            states: of the scheduler, as it told.
        """
        import dataclasses

        from sgl_jax.version import __version__

        about = {key: value for key, value in self._engine.scheduler_info.items() if key != "scheduler"}
        server = dataclasses.asdict(self.manager.server_args)
        return {**server, **about, "internal_states": states, "version": __version__}

    def handle_answers(self) -> None:
        """Hand on answers to whoever waits for them, in the running event loop; in no other may the engine be asked."""
        # Its own way kills the process when this ends by an error, and takes over SIGTERM.
        self.manager.no_create_loop = True
        self._handling = asyncio.create_task(self.manager.handle_loop())
        self._handling.add_done_callback(self._handled)
        self._loop = asyncio.get_running_loop()
        if self.failure:  # before there was anybody to tell
            self._failed.set()

    def _handled(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail("the engine's answers", error)

    async def close(self) -> None:
        """As `stop`, in the event loop of `handle_answers`."""
        if self._handling is not None:
            self._handling.cancel()
        await asyncio.to_thread(self.stop)

    async def watch(self) -> str:
        """Return the reason once a part has failed."""
        await self._failed.wait()
        return self.failure

    def stop(self) -> None:
        """End all threads, and let go of what is on the devices. Raises EngineUnavailable where one does not end."""
        self._ending.set()
        for thread in self._threads:
            thread.join(_STOP_S)
        if alive := [thread.name for thread in self._threads if thread.is_alive()]:
            raise EngineUnavailable(f"{', '.join(alive)} did not end within {_STOP_S:.0f} s")
        if self.scheduler is not None:
            self._let_go()

    def _let_go(self) -> None:
        """Free weights, caches of keys and values, and sockets: whoever holds on to the engine holds none of them."""
        import jax
        import zmq

        client, runner = self.scheduler.tp_worker, self.runner
        client.worker.sync_queue.put(None)
        if client is not client.worker:
            client.input_queue.put((None,) * 4)
        sockets = [value for part in self._parts for value in vars(part).values() if isinstance(value, zmq.Socket)]
        for context in {id(socket.context): socket.context for socket in sockets}.values():
            context.destroy(linger=0)
        for name, place in vars(self._engine.port_args).items():
            if name.endswith("_ipc_name"):
                Path(str(place).removeprefix("ipc://")).unlink(missing_ok=True)
        for leaf in jax.tree_util.tree_leaves([runner.model_state_leaves, _buffers(runner)]):
            if isinstance(leaf, jax.Array) and not leaf.is_deleted():
                leaf.delete()
        self._engine.scheduler_info.pop("scheduler", None)
        self._parts.clear()
        self.scheduler = None

    # In threads of their own.

    def _run_scheduler(self, server_args: Any, port_args: Any) -> dict[str, Any]:
        from sgl_jax.srt.managers.scheduler import Scheduler, dispatch_scheduler_event_loop
        from sgl_jax.srt.managers.tp_worker import ModelWorker

        with (
            # A batch that takes long, as one that is compiled, would end the process that started this one.
            _replaced(Scheduler, watchdog_thread=_leave_process_alone),
            _replaced(ModelWorker, _sync_experts_ids_d2h=_until_none),
        ):
            scheduler = self.scheduler = Scheduler(server_args, port_args)
        self._parts.append(scheduler)
        for part in (scheduler, scheduler.tp_worker, scheduler.tp_worker.worker):
            part.parent_process = _Teller(self._fail)  # which they would end by a signal
        scheduler.process_input_requests = _patient(scheduler, self._ending)

        def loop() -> None:
            try:
                dispatch_scheduler_event_loop(scheduler, server_args)
            except _Ended:
                pass
            except BaseException as error:
                self._fail("the engine's scheduler", error)
            finally:
                scheduler.send_to_detokenizer.send_pyobj(_End())

        self._begin("scheduler", loop)
        return {
            "status": "ready",
            "max_total_num_tokens": scheduler.max_total_num_tokens,
            "max_req_input_len": scheduler.max_req_input_len,
            "scheduler": scheduler,
        }

    def _run_detokenizer(self, server_args: Any, port_args: Any) -> None:
        """Called in a thread that the engine made; it ends as the scheduler does."""
        from sgl_jax.srt.managers.detokenizer_manager import DetokenizerManager

        self._threads.append(threading.current_thread())
        try:
            detokenizer = DetokenizerManager(server_args, port_args)
            self._parts.append(detokenizer)
            while not isinstance(output := detokenizer.recv_from_scheduler.recv_pyobj(), _End):
                detokenizer.send_to_tokenizer.send_pyobj(detokenizer._request_dispatcher(output))
        except BaseException as error:
            self._fail("the engine's detokenizer", error)

    def _begin(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=f"rollpool-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _fail(self, part: str, error: BaseException) -> None:
        log.error("%s failed", part, exc_info=error)
        self.failure = self.failure or f"{part} failed: {type(error).__name__}: {error}"
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody watches
                self._loop.call_soon_threadsafe(self._failed.set)


def _until_none(worker: Any) -> None:
    """The worker's own loop of this name, which never ends."""
    from sgl_jax.srt.layers.routed_experts_capturer import get_global_experts_capturer

    while (output := worker.sync_queue.get()) is not None:
        get_global_experts_capturer().on_forward_end(*output)


class _Teller:
    """In the place of the process that a failing thread would end."""

    def __init__(self, fail: Callable[[str, BaseException], None]) -> None:
        self._fail = fail

    def send_signal(self, _: int) -> None:
        """Tell of the failure, which the thread has logged."""
        self._fail("a thread of the engine", RuntimeError("see the log"))


def _patient(scheduler: Any, ending: threading.Event) -> Callable[[Any], None]:
    """The scheduler's taking up of requests, waiting a moment for more where there is nothing else to do."""
    process = scheduler.process_input_requests

    @functools.wraps(process)
    def process_input_requests(requests: Any) -> None:
        if ending.is_set():
            raise _Ended
        process(requests)
        if scheduler.last_batch is None and not requests and not scheduler.waiting_queue:
            scheduler.recv_from_tokenizer.poll(_IDLE_MS)

    return process_input_requests


def _buffers(runner: Any) -> list[Any]:
    """The caches of keys and values."""
    pool = getattr(runner, "token_to_kv_pool", None)
    return [value for value in vars(pool).values() if isinstance(value, list | tuple)] if pool else []


def _leave_process_alone(*_: Any, **__: Any) -> None:
    """In the place of what changes signal handlers or logging of the whole process."""


def patch_engine() -> None:
    """Patch the engine's classes so that weights and adapters can be changed while they serve; once is enough.

    Raises:
        EngineUnavailable: the installed engine is not as the patches expect it.
    """
    global _patched
    with _patching:
        if _patched:
            return
        from rollpool.worker.launch import hot_swap, hot_swap_internals

        if fault := hot_swap_internals.unexpected(hot_swap_internals.EXPECTED_IN_PROCESS):
            raise EngineUnavailable(
                f"the installed sglang-jax is not as an engine in this process needs it ({fault}); install the main "
                "line, at the commit that docs/howto-one-process.md names"
            )
        hot_swap.patch_all()
        _patched = True


@contextlib.contextmanager
def _engine_module() -> Iterator[ModuleType]:
    try:
        from sgl_jax.srt.entrypoints import engine
    except ImportError as error:
        raise EngineUnavailable(
            f"an engine in this process needs sglang-jax here ({error}): install its main line into the trainer's own "
            "environment; 0.0.1.post1 has no single-process mode"
        ) from error
    yield engine


@contextlib.contextmanager
def _replaced(owner: Any, **names: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in names}
    for name, value in names.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Put back what importing the engine, and constructing it, changes in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in the engine's own dependencies are no fault of the trainer
        policy = asyncio.get_event_loop_policy()
        register = threading._register_atexit  # type: ignore[attr-defined]
        try:
            yield
        finally:
            asyncio.set_event_loop_policy(policy)
            threading._register_atexit = register  # type: ignore[attr-defined]
