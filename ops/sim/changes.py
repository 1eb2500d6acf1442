"""The routes by which a simulated engine changes what it serves, and says what it can change.

Invariants: a change takes place between two decode steps, for all requests at once; what is refused leaves the engine
as it was; and a route that an engine of this kind lacks is not there.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from rollpool.ops.sim.arguments import Arguments
from rollpool.ops.sim.link import SchedulerLink
from rollpool.ops.sim.replies import RefusedError
from rollpool.ops.sim.serving import ChangeRefusedError, Serving

Json = dict[str, Any]


class Changes:
    """What the routes do.

    Args:
        arguments: how the engine was started.
        serving: what it serves, which is changed here.
        link: its scheduler; None until that runs.
        changed: told, at the boundary, how many tokens each request has.
        users: counts the requests that use an adapter.
        abort_all: ends all requests.
    """

    def __init__(
        self,
        arguments: Arguments,
        serving: Serving,
        *,
        link: Callable[[], SchedulerLink],
        changed: Callable[[dict[int, int]], None],
        users: Callable[[str], int],
        abort_all: Callable[[], None],
    ) -> None:
        self._arguments = arguments
        self._serving = serving
        self._link = link
        self._changed = changed
        self._users = users
        self._abort_all = abort_all
        self._one_at_a_time = asyncio.Lock()

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Those of this kind of engine; last, as one of them names all that there are."""
        runtime = self._arguments.sim_lora == "runtime"
        router.add_post("/flush_cache", self._flush)
        if self._arguments.sim_hot_swap:
            router.add_post("/update_weights_from_disk", self._update)
        if runtime:
            router.add_post("/load_lora_adapter", self._load)
            router.add_post("/unload_lora_adapter", self._unload)
        if self._arguments.sim_hot_swap or runtime:
            router.add_get("/rollpool_engine", self._engine)
        paths: dict[str, Json] = {"/openapi.json": {"get": {}}}
        for route in router.routes():
            if route.resource is not None and route.method != "HEAD":
                paths.setdefault(route.resource.canonical, {})[route.method.lower()] = {}
        described = {"openapi": "3.1.0", "info": {"title": "sim", "version": "0"}, "paths": paths}

        async def openapi(_: web.Request) -> web.Response:
            return web.json_response(described)

        router.add_get("/openapi.json", openapi)

    async def _engine(self, _: web.Request) -> web.Response:
        arguments = self._arguments
        reasons = [] if arguments.sim_hot_swap else ["simulated without hot swap"]
        if not arguments.enable_lora:
            reasons.append("launched without --enable-lora")
        return web.json_response(
            {
                "hot_swap": arguments.sim_hot_swap,
                "lora": arguments.sim_lora if arguments.enable_lora else "none",
                "adapter_slots": arguments.adapter_slots,
                "reason": "; ".join(reasons),
            }
        )

    async def _flush(self, _: web.Request) -> web.Response:
        if (await self._link().ask("flush"))["flushed"]:
            return web.Response(text="Cache flushed.\n")
        return web.Response(text="Requests are running or waiting.\n", status=400)

    async def _update(self, request: web.Request) -> web.Response:
        body = await _fields(request, "model_path", "weight_version")
        staging = body.get("staging", "auto")
        if staging not in ("auto", "device", "leaf"):
            raise RefusedError(f"staging must be auto, device or leaf, got {staging!r}.")
        async with self._one_at_a_time:
            try:
                ran, stall_s = await self._swap(body, leaf=staging == "leaf")
            except ChangeRefusedError as error:
                said = {"success": False, "message": str(error), "num_paused_requests": 0, "stall_seconds": 0.0}
                return web.json_response({**said, "restart_may_help": error.restart_may_help}, status=400)
        said = {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": ran}
        return web.json_response({**said, "stall_seconds": stall_s, "restart_may_help": False})

    async def _swap(self, body: Json, *, leaf: bool) -> tuple[int, float]:
        """Change the weights; how many requests ran meanwhile, and the seconds for which they stood."""
        stall_s, load_s = self._arguments.sim_stall_s, self._arguments.sim_swap_s
        if leaf:  # it stands for as long as it loads
            stall_s, load_s = stall_s + load_s, 0.0
        await asyncio.sleep(load_s)
        model = self._serving.check(body["model_path"])
        if body.get("abort_all_requests"):
            self._abort_all()

        def swapped(told: Json) -> None:
            self._serving.model, self._serving.version = model, body["weight_version"]
            self._changed(dict(told["made"]))

        what = {"stall_s": stall_s, "flush": bool(body.get("flush_cache", True))}
        told = await self._link().ask("change", what, at_once=swapped)
        await asyncio.sleep(stall_s)
        return told["ran"], stall_s

    async def _load(self, request: web.Request) -> web.Response:
        body = await _fields(request, "lora_name", "lora_path")
        return self._adapters(lambda: self._serving.load_adapter(body["lora_name"], body["lora_path"]))

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await _fields(request, "lora_name"))["lora_name"]
        return self._adapters(lambda: self._serving.unload_adapter(name, self._users(name)))

    def _adapters(self, change: Callable[[], None]) -> web.Response:
        """Make a change of the adapters; how it went, and which there are."""
        message = ""
        try:
            change()
        except ChangeRefusedError as error:
            message = str(error)
        loaded = {name: adapter.path for name, adapter in self._serving.adapters.items()}
        said = {"success": not message, "message": message, "loaded_adapters": loaded}
        return web.json_response(said, status=400 if message else 200)


async def _fields(request: web.Request, *names: str) -> Json:
    """The body, with these words in it."""
    try:
        body = json.loads(await request.read())
    except ValueError as error:
        raise RefusedError(f"The body is no JSON: {error}.") from None
    for name in names:
        if not isinstance(body, dict) or not isinstance(body.get(name), str) or not body[name]:
            raise RefusedError(f"{name} must be a word.")
    return dict(body)
