"""Changing weights and adapters of sglang-jax main while it serves, without edits to the package.

`install` is called in the server's main process, before the server is launched. The scheduler and the detokenizer are
spawned: they import modules anew, so each is started through a function of this module, which patches its own process
and then becomes the engine's own.

Invariant: all patches are applied or none; with none the engine is served as it is, and `GET /rollpool_engine` says
why.
"""

import contextlib
import functools
import importlib.metadata
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from rollpool.worker.launch.hot_swap_internals import unexpected
    from rollpool.worker.launch.hot_swap_messages import SPANS, VERSION_ENV, EngineFacts, facts_of
else:
    from hot_swap_internals import unexpected
    from hot_swap_messages import SPANS, VERSION_ENV, EngineFacts, facts_of

#: Set to 0, it leaves the engine as it is.
SWITCH_ENV = "ROLLPOOL_HOT_SWAP"

#: Releases that are served as they are, without a word: they have nothing that this could be added to.
_PLAIN_RELEASES = ("0.0.1.post1",)

#: An engine that has this route needs nothing of ours.
_UPDATE_ROUTE = "/update_weights_from_disk"

#: By this name the scheduler's facts travel to the HTTP process, in what it sends when it is ready.
_FACTS = "rollpool_engine"

#: What the scheduler of this process can do; set by its construction.
_scheduler_facts: EngineFacts | None = None


def install() -> None:
    """Prepare this process to launch an engine whose weights can change."""
    try:
        if importlib.metadata.version("sglang-jax") in _PLAIN_RELEASES:
            return
    except importlib.metadata.PackageNotFoundError:
        return  # Something else in its place.
    # An extension that has to be loaded before JAX, where it is asked for.
    with contextlib.suppress(ImportError):
        from sgl_jax.raiden import preload_raiden_if_requested

        preload_raiden_if_requested()
    reason = _why_not()
    _say(reason)
    try:
        _install(reason)
    except Exception as error:
        print(f"rollpool: the engine is served as it is: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _say(reason: str) -> None:
    if reason:
        print(f"rollpool: weights cannot change while this engine serves: {reason}", file=sys.stderr, flush=True)


def _why_not() -> str:
    if os.environ.get(SWITCH_ENV, "1") == "0":
        return f"{SWITCH_ENV}=0"
    version = importlib.metadata.version("sglang-jax")
    try:
        from sgl_jax.srt.entrypoints import http_server

        if _UPDATE_ROUTE in {getattr(route, "path", None) for route in http_server.app.routes}:
            return f"sglang-jax {version} has {_UPDATE_ROUTE} of its own"
        fault = unexpected()
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    return f"sglang-jax {version} is not as the patches expect it: {fault}" if fault else ""


def _install(reason: str) -> None:
    from sgl_jax.srt.entrypoints import http_server

    if not reason:
        from sgl_jax.srt.entrypoints import engine
        from sgl_jax.srt.managers.tokenizer_manager import TokenizerManager

        patch_tokenizer_manager(TokenizerManager)
        engine.run_scheduler_process = run_scheduler_process
        engine.run_detokenizer_process = run_detokenizer_process
    launch_parts = http_server._launch_subprocesses_or_threads

    @functools.wraps(launch_parts)
    def launch_parts_and_add_routes(*args: Any, **options: Any) -> Any:
        manager, templates, info = launch_parts(*args, **options)
        if manager is not None:  # On other hosts than the first there is none.
            facts = info.pop(_FACTS, None)
            _add_routes(http_server, manager, facts, reason or "the engine was not launched through its patches")
        return manager, templates, info

    http_server._launch_subprocesses_or_threads = launch_parts_and_add_routes


def _add_routes(http_server: Any, manager: Any, facts: EngineFacts | None, reason: str) -> None:
    if TYPE_CHECKING or __package__:
        from rollpool.worker.launch.hot_swap_routes import HttpSide, add_routes
    else:
        from hot_swap_routes import HttpSide, add_routes

    if facts is None:
        facts = facts_of(manager.server_args, reason)
    elif not facts.hot_swap:
        _say(facts.reason)
    side = HttpSide(manager, facts, os.environ.get(VERSION_ENV, "0"))
    add_routes(http_server, side, facts)


class _WithFacts:
    """The pipe on which the scheduler says that it is ready, and what it can do."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def send(self, message: Any) -> None:
        """Send."""
        if isinstance(message, dict) and _scheduler_facts is not None:
            message = {**message, _FACTS: _scheduler_facts}
        self._pipe.send(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def patch_all() -> None:
    """Patch this process, in which all parts of the engine are to run."""
    from sgl_jax.srt.managers.detokenizer_manager import DetokenizerManager
    from sgl_jax.srt.managers.scheduler import Scheduler
    from sgl_jax.srt.managers.tokenizer_manager import TokenizerManager
    from sgl_jax.srt.utils import weight_utils

    if TYPE_CHECKING or __package__:
        from rollpool.worker.launch.hot_swap_weights import install_streaming
    else:
        from hot_swap_weights import install_streaming

    install_streaming(weight_utils)
    patch_scheduler(Scheduler)
    patch_detokenizer(DetokenizerManager)
    patch_tokenizer_manager(TokenizerManager)


def run_scheduler_process(server_args: Any, port_args: Any, dp_rank: Any, pipe_writer: Any) -> None:
    """The scheduler's process, in the place of the engine's function of this name."""
    from sgl_jax.srt.managers import scheduler
    from sgl_jax.srt.utils import weight_utils

    if TYPE_CHECKING or __package__:
        from rollpool.worker.launch.hot_swap_weights import install_streaming
    else:
        from hot_swap_weights import install_streaming

    install_streaming(weight_utils)
    patch_scheduler(scheduler.Scheduler)
    scheduler.run_scheduler_process(server_args, port_args, dp_rank, _WithFacts(pipe_writer))


def run_detokenizer_process(server_args: Any, port_args: Any) -> None:
    """The detokenizer's process, in the place of the engine's function of this name."""
    from sgl_jax.srt.managers import detokenizer_manager

    patch_detokenizer(detokenizer_manager.DetokenizerManager)
    detokenizer_manager.run_detokenizer_process(server_args, port_args)


def patch_scheduler(scheduler_class: Any) -> None:
    """Give every scheduler that is constructed from now on a side of ours."""
    if TYPE_CHECKING or __package__:
        from rollpool.worker.launch.hot_swap_scheduler import SchedulerSide, unsupported
    else:
        from hot_swap_scheduler import SchedulerSide, unsupported

    construct = scheduler_class.__init__
    process_input = scheduler_class.process_input_requests
    handle_generate = scheduler_class.handle_generate_request

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807 - it takes that one's place
        global _scheduler_facts
        construct(self, *args, **options)
        self.rollpool_side = None
        reason = unsupported(self)
        if not reason:
            try:
                self.rollpool_side = SchedulerSide(self)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        self.rollpool_facts = self.rollpool_side.facts if self.rollpool_side else facts_of(self.server_args, reason)
        _scheduler_facts = self.rollpool_facts

    @functools.wraps(process_input)
    def process_input_requests(self: Any, recv_reqs: Any) -> None:
        process_input(self, recv_reqs)
        if self.rollpool_side is not None:
            self.rollpool_side.between_batches()

    @functools.wraps(handle_generate)
    def handle_generate_request(self: Any, recv_req: Any) -> None:
        side, lora_id = self.rollpool_side, recv_req.lora_id
        if side is None or side.knows_adapter(lora_id):
            handle_generate(self, recv_req)
            return
        # The engine would fill a slot with zeros, and answer as if there were no adapter.
        recv_req.lora_id = None
        handle_generate(self, recv_req)
        for request in (*self.waiting_queue[-1:], *self.grammar_queue[-1:]):
            if request.rid == recv_req.rid:
                request.set_finish_with_abort("the adapter that this request names was unloaded meanwhile")

    scheduler_class.__init__ = __init__
    scheduler_class.process_input_requests = process_input_requests
    scheduler_class.handle_generate_request = handle_generate_request


def patch_detokenizer(detokenizer_class: Any) -> None:
    """Let the detokenizer hand on the spans that came with the tokens."""
    handle = detokenizer_class.handle_batch_token_id_out

    @functools.wraps(handle)
    def handle_batch_token_id_out(self: Any, recv_obj: Any) -> Any:
        output = handle(self, recv_obj)
        setattr(output, SPANS, getattr(recv_obj, SPANS, None))
        return output

    detokenizer_class.handle_batch_token_id_out = handle_batch_token_id_out


def patch_tokenizer_manager(manager_class: Any) -> None:
    """Let each answer say which versions made its tokens."""
    handle_output = manager_class._handle_batch_output
    handle_abort = manager_class._handle_abort_req

    @functools.wraps(handle_output)
    def _handle_batch_output(self: Any, recv_obj: Any) -> None:
        states = [self.rid_to_state.get(rid) for rid in recv_obj.rids]
        handle_output(self, recv_obj)
        for state, of_one in zip(states, getattr(recv_obj, SPANS, None) or (), strict=False):
            if state is not None:
                # Whoever waits for the answer is woken in a later turn of this loop.
                state.out_list[-1]["meta_info"]["weight_versions"] = _as_json(of_one)

    @functools.wraps(handle_abort)
    def _handle_abort_req(self: Any, recv_obj: Any) -> None:
        state = self.rid_to_state.get(recv_obj.rid)
        if state is None:
            return  # Answered already. The engine's own would end the server here.
        handle_abort(self, recv_obj)
        state.out_list[-1]["meta_info"]["weight_versions"] = []
        # The engine's own keeps it for ever, and then waits for it at its end.
        self.rid_to_state.pop(recv_obj.rid, None)

    manager_class._handle_batch_output = _handle_batch_output
    manager_class._handle_abort_req = _handle_abort_req


def _as_json(spans: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    return [{"version": version, "start": start, "end": end} for version, start, end in spans]
