"""The HTTP process's side: routes by which weights and adapters change, and each answer's versions.

Invariant: a route is there only where it works; an order goes out whole even if its caller leaves; and each answer of
`/generate` says for each of its tokens which version of the weights made it.
"""

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

if TYPE_CHECKING or __package__:
    from rollpool.worker.launch.hot_swap_messages import (
        EngineFacts,
        LoadAdapter,
        Refused,
        Reply,
        Staging,
        UnloadAdapter,
        UpdateWeights,
    )
else:
    from hot_swap_messages import EngineFacts, LoadAdapter, Refused, Reply, Staging, UnloadAdapter, UpdateWeights

Json = dict[str, Any]
T = TypeVar("T")


@dataclass
class UpdateWeightsBody:
    """Of `POST /update_weights_from_disk`."""

    model_path: str
    weight_version: str
    flush_cache: bool = True
    abort_all_requests: bool = False
    staging: Staging = "auto"


@dataclass
class LoadAdapterBody:
    """Of `POST /load_lora_adapter`."""

    lora_name: str
    lora_path: str


@dataclass
class UnloadAdapterBody:
    """Of `POST /unload_lora_adapter`."""

    lora_name: str


class HttpSide:
    """What is added to the HTTP process of one engine.

    Args:
        manager: The engine's `TokenizerManager`.
        facts: What its scheduler can do.
        version: Of the weights it was launched on.
    """

    def __init__(self, manager: Any, facts: EngineFacts, version: str) -> None:
        self._manager = manager
        self._facts = facts
        self._version = version
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._updating = False
        self._adapters = asyncio.Lock()
        manager._result_dispatcher._mapping.append((Reply, self._take_reply))

    async def about(self) -> Json:
        """`GET /rollpool_engine`."""
        return {**dataclasses.asdict(self._facts), "weight_version": self._version}

    async def update_weights(self, body: UpdateWeightsBody) -> tuple[int, Json]:
        """Change the weights; returns when the new ones serve, or when it is certain that the old ones do."""
        reply = await _to_its_end(self._update(body))
        return 200 if reply.success else 400, {
            "success": reply.success,
            "message": reply.message,
            "num_paused_requests": reply.requests,
            "stall_seconds": reply.stall_seconds,
            "restart_may_help": reply.restart_may_help,
        }

    async def load_adapter(self, body: LoadAdapterBody) -> tuple[int, Json]:
        """Load an adapter."""
        return await self._change_adapters(self._load(body))

    async def unload_adapter(self, body: UnloadAdapterBody) -> tuple[int, Json]:
        """Free an adapter's slot."""
        return await self._change_adapters(self._unload(body))

    async def _update(self, body: UpdateWeightsBody) -> Reply:
        if not body.flush_cache:
            return Reply(0, False, "flush_cache=false would let new weights read the old ones' keys and values")
        if body.abort_all_requests:
            return Reply(0, False, "abort_all_requests is not known here: end them by /abort_request before")
        if self._updating:
            return Reply(0, False, "another update of the weights is under way")
        self._updating = True
        try:
            number = next(self._numbers)
            reply = await self._order(UpdateWeights(number, body.model_path, body.weight_version, body.staging))
        finally:
            self._updating = False
        if reply.success:
            self._version = body.weight_version
            self._manager.model_path = self._manager.server_args.model_path = body.model_path
        return reply

    async def _change_adapters(self, change: Awaitable[str]) -> tuple[int, Json]:
        async def one_by_one() -> str:
            async with self._adapters:
                return await change

        try:
            success, message = True, await _to_its_end(one_by_one())
        except Refused as error:
            success, message = False, str(error)
        known = self._manager.lora_registry.get_all_adapters().values()
        loaded = {each.lora_name: each.lora_path for each in known}
        return 200 if success else 400, {"success": success, "message": message, "loaded_adapters": loaded}

    async def _load(self, body: LoadAdapterBody) -> str:
        from sgl_jax.srt.lora.lora_registry import LoRARef

        registry = self._manager.lora_registry
        known = registry.get_all_adapters().get(body.lora_name)
        if known is not None:
            if known.lora_path == body.lora_path:
                return f"{body.lora_name} is loaded"
            raise Refused(f"{body.lora_name} is loaded from {known.lora_path}: unload it first, or use another name")
        lora_id = uuid4().hex
        order = LoadAdapter(next(self._numbers), lora_id, body.lora_name, body.lora_path)
        message = _or_refused(await self._order(order))
        # Only now: a request can name it once its slot is filled.
        await registry.register(
            LoRARef(lora_id=lora_id, lora_name=body.lora_name, lora_path=body.lora_path, pinned=False)
        )
        return message

    async def _unload(self, body: UnloadAdapterBody) -> str:
        registry = self._manager.lora_registry
        known = registry.get_all_adapters().get(body.lora_name)
        if known is None:
            raise Refused(f"no adapter {body.lora_name} is loaded")
        # The scheduler decides, and refuses requests that come after; taking the name away first would refuse requests
        # for an adapter that stays, because others still use it.
        message = _or_refused(await self._order(UnloadAdapter(next(self._numbers), known.lora_id, body.lora_name)))
        await registry.unregister(body.lora_name)
        return message

    async def _order(self, order: UpdateWeights | LoadAdapter | UnloadAdapter) -> Reply:
        self._manager.auto_create_handle_loop()
        future = asyncio.get_running_loop().create_future()
        self._waiting[order.number] = future
        self._manager.send_to_scheduler.send_pyobj(order)
        reply: Reply = await future
        return reply

    def _take_reply(self, reply: Reply) -> None:
        future = self._waiting.pop(reply.number, None)
        if future is not None and not future.done():
            future.set_result(reply)


def _or_refused(reply: Reply) -> str:
    if not reply.success:
        raise Refused(reply.message)
    return reply.message


#: Tasks that nobody may be waiting for any more; the loop itself does not hold them.
_going_on: set[asyncio.Task[Any]] = set()


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await something that goes on even if whoever awaits it is cancelled."""
    task = asyncio.create_task(work)
    _going_on.add(task)
    task.add_done_callback(_going_on.discard)
    return await asyncio.shield(task)


def add_routes(http_server: Any, side: HttpSide, facts: EngineFacts) -> None:
    """Add the routes that work to the engine's application."""
    app, answer = http_server.app, http_server.ORJSONResponse

    def route(path: str, handle: Callable[[Any], Awaitable[tuple[int, Json]]], body_class: type) -> None:
        async def endpoint(body: Any) -> Any:
            status, content = await handle(body)
            return answer(status_code=status, content=content)

        endpoint.__annotations__ = {"body": body_class}
        endpoint.__name__ = path.strip("/")
        app.post(path, response_model=None)(endpoint)

    app.get("/rollpool_engine", response_model=None)(side.about)
    if facts.hot_swap:
        route("/update_weights_from_disk", side.update_weights, UpdateWeightsBody)
    if facts.lora == "runtime":
        route("/load_lora_adapter", side.load_adapter, LoadAdapterBody)
        route("/unload_lora_adapter", side.unload_adapter, UnloadAdapterBody)
