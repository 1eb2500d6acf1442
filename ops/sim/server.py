"""The HTTP surface of a simulated engine: that of sglang-jax main, as far as a worker uses it.

Invariant: a request is answered when its scheduler says that it is over, with what the policies that it ran under make
of its prompt, or never; its client's going ends it in the scheduler.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from aiohttp import web

from rollpool.ops.sim import replies
from rollpool.ops.sim.arguments import Arguments, parse_arguments
from rollpool.ops.sim.changes import Changes
from rollpool.ops.sim.link import SchedulerLink
from rollpool.ops.sim.model import MAX_POSITIONS
from rollpool.ops.sim.pieces import Pieces
from rollpool.ops.sim.replies import Asked, RefusedError
from rollpool.ops.sim.serving import Serving
from rollpool.ops.sim.tokens import FAIL, FORGET, HANG, KILL, REFUSE, draw_length, draw_nonce

Json = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: Faults that the scheduler brings out.
_SCHEDULERS_FAULTS = {KILL: "kill", HANG: "hang"}

#: Seconds within which `/health_generate` must hear of the scheduler, as the real one waits.
_HEALTH_S = 20.0

#: Seconds between two looks at what a pause has left to end, as the real server polls.
_POLL_S = 0.1

#: Seconds that the last replies may take to be written, once nothing is left to do.
_SHUTDOWN_S = 5.0

#: Names the label of the weights at the launch; without it, that is "0".
VERSION_ENV = "ROLLPOOL_WEIGHT_VERSION"

#: Bytes of a request, at most: no bound that a prompt could meet.
_MOST_BYTES = 1 << 28


@dataclass(slots=True, eq=False)
class _State:
    """A request that was not answered yet; of an aborted one that had waited, it stays for ever, as in the real one."""

    asked: Asked
    over: asyncio.Future[Json]
    #: Who makes its tokens.
    pieces: Pieces
    #: Signature of the adapter that it named.
    adapter: int | None
    #: By which the scheduler knows it; None: it was never told.
    key: int | None = None
    #: Tokens it will have when nothing cuts it off.
    tokens: int = 0
    since: float = field(default_factory=time.monotonic)


class SimServer:
    """One server, which answers once `serve` runs."""

    def __init__(self, arguments: Arguments, serving: Serving) -> None:
        self._arguments = arguments
        self._serving = serving
        self._context_length = arguments.context_length or MAX_POSITIONS
        self._random = Random()
        #: By the client's id, so that of two requests of one id only the later is known, as in the real server.
        self._states: dict[str, _State] = {}
        #: By the scheduler's.
        self._keyed: dict[int, _State] = {}
        self._paused = asyncio.Condition()
        self._is_paused = False
        self._terminated = asyncio.Event()
        self._nothing_left = asyncio.Event()
        self._nothing_left.set()
        self._link: SchedulerLink

    async def serve(self) -> None:
        """Answer until SIGTERM, and then until nothing is left to answer.

        Raises:
            OSError: the port is taken.
        """
        self._link = await SchedulerLink.start(self._arguments.scheduler_options(), self._ended)
        runner = web.AppRunner(self._app(), handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_S)
        try:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, self._terminated.set)
            loop.add_signal_handler(signal.SIGQUIT, self._crash)
            await asyncio.sleep(self._arguments.sim_start_s)
            await runner.setup()
            await web.TCPSite(runner, self._arguments.host, self._arguments.port).start()
            if not self._arguments.skip_server_warmup:
                await self._warm_up()
            await self._terminated.wait()
            print("SIGTERM received. Draining requests and shutting down...", file=sys.stderr, flush=True)
            await self._nothing_left.wait()
        finally:
            await runner.cleanup()
            await self._link.close()

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=_MOST_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/health_generate", self._health_generate)
        app.router.add_get("/get_model_info", self._model_info)
        app.router.add_get("/get_server_info", self._server_info)
        app.router.add_get("/get_load", self._load)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/pause_generation", self._pause)
        app.router.add_post("/continue_generation", self._continue)
        self._changes().add_routes(app.router)
        return app

    def _changes(self) -> Changes:
        return Changes(
            self._arguments,
            self._serving,
            link=lambda: self._link,
            changed=self._changed,
            users=lambda name: sum(state.asked.lora == name for state in self._keyed.values()),
            abort_all=lambda: self._abort_matching("", everything=True),
        )

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Ask for the key; answer what is refused."""
        key = self._arguments.api_key
        if key is not None and request.path != "/health" and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except RefusedError as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _health_generate(self, _: web.Request) -> web.Response:
        """Generate one token, without log-probs: beside requests that have them, this kills the server."""
        asked = replies.read_generate(
            {"input_ids": [0], "sampling_params": {"max_new_tokens": 1}}, uuid.uuid4().hex, self._context_length
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._run(asked), _HEALTH_S)
            return web.Response()
        return web.Response(status=503)

    async def _model_info(self, _: web.Request) -> web.Response:
        path = self._arguments.model_path  # as launched: by it, among others, a worker knows the engine
        return web.json_response({"model_path": path, "tokenizer_path": path, "is_generation": True})

    async def _server_info(self, _: web.Request) -> web.Response:
        state = await self._link.ask("state")
        rids = {key: each.asked.rid for key, each in self._keyed.items()}
        return web.json_response(replies.server_info(self._arguments, self._context_length, state, rids))

    async def _load(self, _: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "KeyError: 'load'"}}, status=500)  # as both lines answer

    async def _generate(self, request: web.Request) -> web.Response:
        asked = replies.read_generate(await _body(request), uuid.uuid4().hex, self._context_length)
        first = int(asked.prompt_ids[0])
        if first == REFUSE:
            raise RefusedError("This prompt is refused.")
        if first == FAIL:
            return web.json_response({"error": {"message": "This prompt always fails."}}, status=500)
        if self._serving.model.fault == "probe":
            return web.json_response({"error": {"message": "These weights always fail."}}, status=500)
        state, told = await self._run(asked, _SCHEDULERS_FAULTS.get(first), forget=first == FORGET)
        versions = state.pieces.versions(told["tokens"]) if self._arguments.sim_hot_swap else None
        if told["queued"]:
            return web.json_response(replies.aborted_in_queue(asked.rid, versions))
        # Of the request that the scheduler ended; that is another one where an id was used twice.
        made = state.pieces.made(state.asked.prompt_ids, told["tokens"])
        reason = replies.finish_reason(made.ids.tolist(), _kind(state, told))
        payload = replies.generated(state.asked, made, reason, time.monotonic() - state.since, versions)
        return web.Response(body=payload, content_type="application/json")

    async def _chat(self, request: web.Request) -> web.Response:
        asked = replies.read_chat(await _body(request), uuid.uuid4().hex, self._context_length)
        state, told = await self._run(asked)
        reply = replies.chatted(state.asked, told["tokens"], _kind(state, told), self._arguments.model_path)
        return web.json_response(reply)

    async def _run(self, asked: Asked, fault: str | None = None, *, forget: bool = False) -> tuple[_State, Json]:
        """Wait until the scheduler is done with a request; what it was, and how it ended."""
        async with self._paused:
            await self._paused.wait_for(lambda: not self._is_paused)
        adapter = self._serving.adapter(asked.lora)
        pieces = Pieces(self._serving.signature(adapter), self._serving.version, draw_nonce(self._random))
        state = _State(asked, asyncio.get_running_loop().create_future(), pieces, adapter)
        self._states[asked.rid] = state
        self._nothing_left.clear()
        if not forget:
            self._submit(state, fault)
        try:
            told = await state.over
        except asyncio.CancelledError:  # the client is gone
            self._drop(state)
            raise
        return told["of"], told

    def _submit(self, state: _State, fault: str | None) -> None:
        asked, most = state.asked, max(1, state.asked.max_new_tokens)
        state.tokens = most
        if not asked.ignore_eos:
            median, sigma = self._arguments.sim_median_tokens, self._arguments.sim_sigma
            state.tokens = draw_length(self._random, median, sigma, least=asked.min_new_tokens, most=most)
        state.key = self._link.submit(
            prompt_tokens=len(asked.prompt_ids), tokens=state.tokens, logprobs=asked.logprobs, fault=fault
        )
        self._keyed[state.key] = state

    def _drop(self, state: _State) -> None:
        """The client of a request is gone."""
        if state.key is not None:
            self._link.abort(state.key)
        elif self._states.get(state.asked.rid) is state:
            self._forget(state.asked.rid)

    def _forget(self, rid: str) -> None:
        del self._states[rid]
        if not self._states:
            self._nothing_left.set()

    def _changed(self, made: dict[int, int]) -> None:
        """The weights are others from now on: what is here goes on under them from the tokens that it has."""
        for key, state in self._keyed.items():
            signature = self._serving.signature(state.adapter)
            state.pieces.change(made.get(key, 0), signature, self._serving.version, draw_nonce(self._random))

    def _ended(self, key: int, told: Json) -> None:
        """The scheduler is done with a request: answer whoever waits under its id, even if that is another."""
        ended = self._keyed.pop(key)
        waiting = self._states.get(ended.asked.rid)
        if waiting is None:
            return
        if not told["queued"]:  # else the real server forgets to forget it: pausing and draining wait for it in vain
            self._forget(ended.asked.rid)
        if not waiting.over.done():
            waiting.over.set_result({**told, "of": ended})

    async def _abort(self, request: web.Request) -> web.Response:
        body = await _body(request)
        if not isinstance(body, dict):
            raise RefusedError("The body is no JSON object.")
        self._abort_matching(str(body.get("rid") or ""), everything=bool(body.get("abort_all")))
        return web.Response()

    def _abort_matching(self, rid: str, *, everything: bool) -> None:
        """End the requests whose ids begin with `rid`; one of them must be it."""
        if not everything and rid not in self._states:
            return
        for key, state in self._keyed.items():
            if everything or state.asked.rid.startswith(rid):
                self._link.abort(key)

    async def _pause(self, request: web.Request) -> web.Response:
        body = await _body(request)
        mode = body.get("mode", "abort") if isinstance(body, dict) else None
        if mode not in ("abort", "in_place", "retract"):
            raise RefusedError(f"mode must be abort, in_place or retract, got {mode!r}.")
        async with self._paused:
            self._is_paused = True
            if mode != "abort":
                await self._link.ask("pause", mode)
            while mode == "abort" and self._states:
                self._abort_matching("", everything=True)
                await asyncio.sleep(_POLL_S)
        return web.json_response({"status": "ok", "message": f"Generation paused ({mode})."})

    async def _continue(self, _: web.Request) -> web.Response:
        async with self._paused:
            self._is_paused = False
            await self._link.ask("resume")
            self._paused.notify_all()
        return web.json_response({"status": "ok", "message": "Generation continued."})

    async def _warm_up(self) -> None:
        """Generate once, without log-probs, as the stock server does after its start."""
        body = {"text": "The capital city of France is", "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}}
        await self._run(replies.read_generate(body, uuid.uuid4().hex, self._context_length))

    def _crash(self) -> None:
        """What the real server does when its scheduler says that it failed: nothing is drained."""
        print("Received sigquit from a child process. It usually means the child failed.", file=sys.stderr, flush=True)
        self._link.kill()
        os.kill(os.getpid(), signal.SIGKILL)


def _kind(state: _State, told: Json) -> Literal["stop", "length", "abort"]:
    if told["aborted"]:
        return "abort"
    return "length" if state.tokens >= state.asked.max_new_tokens else "stop"


async def _body(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except ValueError as error:
        raise RefusedError(f"The body is no JSON: {error}.") from None


def run(argv: Sequence[str]) -> None:
    """Be one server, until it ends."""
    arguments = parse_arguments(argv)
    try:
        server = SimServer(arguments, Serving.launch(arguments, os.environ.get(VERSION_ENV, "0")))
        asyncio.run(server.serve())
    except (OSError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
