"""The cost of the queue itself: rollpool against a bare redis-py stream doing the same, in one run.

Enqueueing: 10,000 prompts of 1.5 KB. Pulling and settling: 10,000 jobs through a whole host (leases, policy, triage,
settlement) whose engine answers at once. The bare stream validates nothing, remembers nothing and loses what its
worker held; it is the ceiling. The last line is JSON.
"""

import argparse
import asyncio
import json
import statistics
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import msgpack
import numpy as np

from rollpool.ops.local.server import LocalServer
from rollpool.producer import AsyncRolloutPool
from rollpool.schemas import Policy
from rollpool.schemas.connection import connect_async
from rollpool.worker.engines.protocol import (
    Adapter,
    ChatRequest,
    Completion,
    EngineFacts,
    EngineLoad,
    OnProgress,
    SampleRequest,
)
from rollpool.worker.host import Host
from rollpool.worker.settings import WorkerSettings

#: Characters of a prompt; as token ids the same bytes.
PROMPT_BYTES = 1500
#: What the bare worker reads and answers at once; the host's engine takes as many at a time.
AT_ONCE = 256
#: Tokens of each result.
NEW_TOKENS = 16


class NoOpEngine:
    """Answers at once; always the same."""

    facts = EngineFacts(
        line="main",
        version="no-op",
        max_running_requests=AT_ONCE,
        max_prompt_tokens=4096,
        context_length=8192,
        lora="none",
        adapter_slots=0,
        swaps=False,
        model_path="/",  # a directory without a tokenizer
        tp_size=1,
        identity="no-op",
    )
    _answer = Completion(
        output_ids=np.arange(NEW_TOKENS, dtype=np.int32),
        logprobs=np.zeros(NEW_TOKENS, dtype=np.float32),
        text="x" * NEW_TOKENS,
        finish_reason="length",
        prompt_tokens=1,
        completion_tokens=NEW_TOKENS,
    )

    async def generate(self, request: SampleRequest) -> Completion:
        return self._answer

    async def chat(self, request: ChatRequest) -> Completion:
        return self._answer

    async def abort(self, rids: object) -> None: ...

    async def load(self) -> EngineLoad | None:
        return None

    async def identify(self) -> str:
        return "no-op"

    async def swap(self, checkpoint: str, version: int) -> None: ...

    async def load_adapter(self, adapter: Adapter) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    async def flush_cache(self) -> None: ...

    async def close(self) -> None: ...


class NoOpOwner:
    """Owns it."""

    controls_weights = True
    url = ""
    opened = "at once"

    async def stage(self, policy: Policy, on_progress: OnProgress) -> str:
        return policy.source

    async def merge(self, base: str, policy: Policy, adapter: str) -> str:
        return base

    def keep(self, paths: Iterable[str]) -> None: ...

    async def open(self, checkpoint: str, *, version: int, adapters: Sequence[Adapter] = ()) -> NoOpEngine:
        return NoOpEngine()

    async def watch(self) -> str:
        await asyncio.Event().wait()
        return ""

    async def close(self) -> None: ...


async def bare_enqueue(url: str, prompts: list[str]) -> float:
    """A pipeline of 256 XADD at a time: the first row of what queues reach."""
    client = connect_async(url)
    await client.xgroup_create("bare", "g", id="0", mkstream=True)
    begin = time.perf_counter()
    for first in range(0, len(prompts), AT_ONCE):
        pipe = client.pipeline(transaction=False)
        for prompt in prompts[first : first + AT_ONCE]:
            pipe.xadd("bare", {"body": msgpack.packb({"prompt": prompt, "n": 1})})
        await pipe.execute()
    seconds = time.perf_counter() - begin
    await client.aclose()
    return seconds


async def bare_work(url: str, jobs: int) -> float:
    """Read 256, a task each, answer in one pipeline: acknowledge, delete, add a result."""
    client = connect_async(url)
    ids, logprobs = np.arange(NEW_TOKENS, dtype="<i4").tobytes(), np.zeros(NEW_TOKENS, dtype="<f4").tobytes()

    async def handle(body: bytes) -> bytes:
        job = msgpack.unpackb(body)
        answer: bytes = msgpack.packb({"prompt": job["prompt"], "ids": ids, "logprobs": logprobs, "text": "x" * 16})
        return answer

    begin = time.perf_counter()
    done = 0
    while done < jobs:
        reply: Any = await client.xreadgroup("g", "w", {"bare": ">"}, count=AT_ONCE)
        entries = reply[0][1]
        answers = await asyncio.gather(*(asyncio.create_task(handle(fields[b"body"])) for _, fields in entries))
        pipe = client.pipeline(transaction=False)
        for (entry_id, _), answer in zip(entries, answers, strict=True):
            pipe.xack("bare", "g", entry_id)
            pipe.xdel("bare", entry_id)
            pipe.xadd("results", {"body": answer})
        await pipe.execute()
        done += len(entries)
    seconds = time.perf_counter() - begin
    await client.aclose()
    return seconds


async def pool_enqueue(url: str, prompts: list[str]) -> float:
    async with AsyncRolloutPool(url, pool="bench", run="enqueue", backlog_limit=0) as pool:
        begin = time.perf_counter()
        await pool.enqueue_prompts(prompts, policy_version=0, batch_id=f"b-{uuid.uuid4().hex}")
        return time.perf_counter() - begin


async def pool_work(url: str, jobs: int) -> float:
    """From the first pull to the last settlement; prompts are token ids, since no tokenizer is being measured."""
    ids = np.arange(PROMPT_BYTES // 4, dtype=np.int32)
    async with AsyncRolloutPool(url, pool="bench", run="work", backlog_limit=0) as pool:
        await pool.enqueue_prompts([ids] * jobs, policy_version=0)
    host = Host(url, "bench", "bench", WorkerSettings.model_validate({"engine": {"model_path": "/"}}), NoOpOwner())
    host.paused = lambda: False
    running = asyncio.create_task(host.run())
    while host.status().state != "serving":  # noqa: ASYNC110 - polled from outside, as an operator would
        await asyncio.sleep(0.001)
    begin = time.perf_counter()
    while host.settled < jobs:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    seconds = time.perf_counter() - begin
    host.stop()
    await running
    return seconds


async def one_round(url: str, jobs: int) -> dict[str, float]:
    prompts = [f"{index:06d} " + "p" * (PROMPT_BYTES - 7) for index in range(jobs)]
    client = connect_async(url)
    await client.flushall()
    rates = {
        "bare_enqueue": jobs / await bare_enqueue(url, prompts),
        "pool_enqueue": jobs / await pool_enqueue(url, prompts),
        "bare_work": jobs / await bare_work(url, jobs),
    }
    await client.flushall()
    rates["pool_work"] = jobs / await pool_work(url, jobs)
    await client.aclose()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with LocalServer() as server:
        asyncio.run(one_round(server.url, min(1000, options.jobs)))  # warm
        rounds = []
        for number in range(options.rounds):
            rounds.append(asyncio.run(one_round(server.url, options.jobs)))
            print(f"round {number + 1}: " + ", ".join(f"{k} {v:,.0f}/s" for k, v in rounds[-1].items()), flush=True)
    print(json.dumps(summary(rounds, options.jobs)))


def summary(rounds: list[dict[str, float]], jobs: int) -> dict[str, float]:
    """Medians; a ratio is the median of the rounds' own, so that a machine whose speed drifts does not move it."""
    result: dict[str, float] = {"jobs": jobs, "rounds": len(rounds)}
    for what in ("enqueue", "work"):
        ratios = [each[f"pool_{what}"] / each[f"bare_{what}"] for each in rounds]
        result |= {
            f"{what}_per_s": round(statistics.median(each[f"pool_{what}"] for each in rounds)),
            f"{what}_per_s_bare": round(statistics.median(each[f"bare_{what}"] for each in rounds)),
            f"{what}_ratio": round(statistics.median(ratios), 3),
            f"{what}_ratio_min": round(min(ratios), 3),
            f"{what}_ratio_max": round(max(ratios), 3),
        }
    return result


if __name__ == "__main__":
    main()
