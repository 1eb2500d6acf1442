"""Just enough of an sglang-jax server for HTTP, with its faults on demand."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Reply = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class FakeServer:
    """Just enough of sglang-jax, with its faults on demand."""

    def __init__(self, version: str = "0.0.2") -> None:
        self.version = version
        self.model_path = "/models/a"
        self.seed = 42
        self.generated = 0
        self.steps = 0
        self.bodies: list[dict[str, Any]] = []
        self.aborted: set[str] = set()
        self.gone: list[str] = []
        self.waiting: dict[str, asyncio.Event] = {}
        self.reply: Reply | None = None
        self.key: str | None = None
        self.skip_warmup = True
        self.info_calls = 0
        #: Further fields of `/get_server_info`.
        self.info: dict[str, Any] = {}
        #: Adapters by name.
        self.lora: dict[str, str] = {}
        #: What `/openapi.json` lists; None: it has no such document.
        self.routes: set[str] | None = None
        #: What `/rollpool_engine` says.
        self.about: dict[str, Any] = {}
        #: Of the next changes: status and body, in place of doing them.
        self.refusal: tuple[int, bytes] | None = None
        #: Clear while a change is to take its time.
        self.may_change = asyncio.Event()
        self.may_change.set()
        self.changes: list[tuple[str, dict[str, Any]]] = []
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/get_model_info", self._model_info)
        app.router.add_get("/get_server_info", self._server_info)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/openapi.json", self._openapi)
        app.router.add_get("/rollpool_engine", self._about)
        for path in ("/update_weights_from_disk", "/load_lora_adapter", "/unload_lora_adapter", "/flush_cache"):
            app.router.add_post(path, self._change)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        self.url = ""

    async def start(self, port: int = 0) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"model_path": self.model_path})

    async def _server_info(self, request: web.Request) -> web.Response:
        self.info_calls += 1
        if self.version == "0.0.1" and self.generated == 0:
            await asyncio.Event().wait()  # as a fresh 0.0.1.post1 does
        state = {
            "req_to_token_pool_total": 2049,
            "running_batch_size": len(self.waiting),
            "waiting_queue_size": 0,
            "available_kv_tokens": 10,
            "tree_cache_size": 5,
            "forward_ct_decode": self.steps,
        }
        return web.json_response(
            {
                "version": self.version,
                "model_path": self.model_path,
                "tp_size": 8,
                "random_seed": self.seed,
                "max_running_requests": 16,
                "max_total_num_tokens": 4096,
                "max_req_input_len": 250,
                "attention_backend": "native",
                "skip_server_warmup": self.skip_warmup,
                "internal_states": [state],
                **self.info,
            }
        )

    async def _openapi(self, request: web.Request) -> web.Response:
        if self.routes is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        return web.json_response({"openapi": "3.1.0", "paths": {path: {} for path in self.routes}})

    async def _about(self, request: web.Request) -> web.Response:
        return web.json_response(self.about)

    async def _change(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        self.changes.append((request.path, body))
        await self.may_change.wait()
        if self.refusal is not None:
            status, said = self.refusal
            return web.Response(status=status, body=said)
        if request.path == "/flush_cache":
            self.steps = 0
            return web.Response(text="Cache flushed.")
        if request.path == "/update_weights_from_disk":
            self.model_path, self.steps = body["model_path"], 0
            done = {"success": True, "message": "", "num_paused_requests": len(self.waiting), "stall_seconds": 0.01}
            return web.json_response(done)
        if request.path == "/load_lora_adapter":
            self.lora[body["lora_name"]] = body["lora_path"]
        else:
            del self.lora[body["lora_name"]]
        return web.json_response({"success": True, "message": "", "loaded_adapters": self.lora})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.bodies.append(body)
        self.generated += 1
        self.steps += 1
        rid = body["rid"]
        if body["input_ids"] == [99]:  # runs until it is aborted, or its client leaves
            self.waiting[rid] = asyncio.Event()
            try:
                await self.waiting[rid].wait()
            except asyncio.CancelledError:
                self.gone.append(rid)
                raise
            finally:
                del self.waiting[rid]
            return web.json_response(completion(rid, 2, reason={"type": "abort"}))
        if self.reply is not None:
            return await self.reply(request, body)
        return web.json_response(completion(rid, body["sampling_params"]["max_new_tokens"]))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.bodies.append(body)
        if self.reply is not None:
            return await self.reply(request, body)
        choice = {"message": {"content": "hello"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        return web.json_response({"choices": [choice], "usage": usage})

    async def _abort(self, request: web.Request) -> web.Response:
        rid = json.loads(await request.read())["rid"]
        for known, event in self.waiting.items():
            if known.startswith(rid):
                event.set()
        return web.Response()


def completion(rid: str, count: int, *, reason: dict[str, Any] | None = None) -> dict[str, Any]:
    """A reply with the log-probs of an earlier stretch in front, as after 50 tokens."""
    rows: list[list[Any]] = [[-9.0, 7, None]] * 3 + [[-0.5, 100 + i, None] for i in range(count)]
    meta = {
        "id": rid,
        "finish_reason": reason or {"type": "length", "length": count},
        "prompt_tokens": 3,
        "completion_tokens": count,
        "output_token_logprobs": rows,
    }
    return {"text": "x", "meta_info": meta}
