"""Does the pool keep an engine as busy as the engine can be? The same requests, straight to it and through rollpool.

One worker with its own real engine on CPU. The direct client posts pre-tokenized requests at the concurrency that
turned out best; the pool enqueues the same prompts as text and collects the groups. The two run in turn on the same
engine. `underfull_share` is the worker's own account of its pool runs: the share of the time with backlog in which it
had fewer samples in the engine than that runs at once. The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console

from rollpool.ops.inspect import read_workers
from rollpool.ops.local.engine_env import ensure_engine_env
from rollpool.ops.local.hosts import LocalHosts, cpu_engine
from rollpool.ops.local.run import cache_dir, engine_line, wait_until_served
from rollpool.ops.local.server import LocalServer
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.producer import RolloutPool, SamplingParams
from rollpool.schemas import Keys, WorkerStatus
from rollpool.schemas.connection import connect
from rollpool.worker.tokenizer import PromptEncoder

POOL = "saturation"
console = Console()


@dataclass(frozen=True)
class Work:
    """The requests: `groups` prompts, `n` samples each, of exactly `new_tokens` tokens."""

    groups: int
    n: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Generated tokens in all."""
        return self.groups * self.n * self.new_tokens

    @property
    def prompts(self) -> list[str]:
        """All different, so that no prefix cache helps the second run of a pair."""
        return [f"{index} + {time.monotonic_ns() % 1000:03d} =" for index in range(self.groups)]


async def direct(url: str, model: Path, work: Work, concurrency: int) -> float:
    """Tokens a second of a bare client."""
    encoder = PromptEncoder(str(model))
    waiting = [encoder.encode(prompt).tolist() for prompt in work.prompts for _ in range(work.n)]
    params = {"max_new_tokens": work.new_tokens, "temperature": 1.0, "ignore_eos": True}

    async def client(session: aiohttp.ClientSession) -> int:
        made = 0
        while waiting:
            body = {"input_ids": waiting.pop(), "sampling_params": params, "return_logprob": True}
            async with session.post(f"{url}/generate", json=body) as response:
                reply: Any = await response.json()
            made += int(reply["meta_info"]["completion_tokens"])
        return made

    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        begin = time.perf_counter()
        made = sum(await asyncio.gather(*(client(session) for _ in range(concurrency))))
        seconds = time.perf_counter() - begin
    assert made == work.tokens, f"the engine made {made} tokens, not {work.tokens}"
    return made / seconds


def through_pool(pool: RolloutPool, work: Work) -> float:
    """Tokens a second from the call of `enqueue_prompts` to the last group."""
    sampling = SamplingParams(max_new_tokens=work.new_tokens, temperature=1.0, ignore_eos=True)
    begin = time.perf_counter()
    batch = pool.enqueue_prompts(work.prompts, policy_version=1, n=work.n, sampling=sampling)
    made = sum(group.tokens for group in batch.collect(timeout=600))
    seconds = time.perf_counter() - begin
    batch.commit()
    assert made == work.tokens, f"the pool made {made} tokens, not {work.tokens}"
    return made / seconds


def heartbeat(url: str) -> WorkerStatus:
    """The worker's status once it has nothing in flight."""
    with connect(url) as client:
        while True:
            (status,) = read_workers(client, Keys(POOL))
            if not status.jobs_in_flight:
                return status
            time.sleep(0.2)


def best_concurrency(url: str, model: Path, work: Work, runs_at_once: int) -> int:
    """The bare client's best: as many as the engine runs, a quarter more, or twice as many."""
    rates = {}
    for concurrency in (runs_at_once, runs_at_once * 5 // 4, runs_at_once * 2):
        rates[concurrency] = asyncio.run(direct(url, model, work, concurrency))
        console.print(f"direct, {concurrency} at once: {rates[concurrency]:.0f} tokens/s")
    return max(rates, key=lambda concurrency: rates[concurrency])


def measure(work: Work, pairs: int) -> dict[str, object]:
    """Run all pairs; what the last line shows."""
    cache = cache_dir()
    python = ensure_engine_env(echo=console.print)
    line = engine_line(python)
    model = make_tiny_model(cache / "models" / "tiny-1", seed=1)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(LocalServer())
        hosts = stack.enter_context(
            LocalHosts(server.url, POOL, cache / "saturation", cpu_engine(python, cache, line), {"heartbeat_s": 0.5})
        )
        pool = stack.enter_context(RolloutPool(server.url, pool=POOL, run="bench"))
        pool.publish_policy(1, checkpoint=str(model))
        hosts.start("saturation-1")
        wait_until_served(pool, hosts, 1)
        status = heartbeat(server.url)
        through_pool(pool, work)  # warm
        concurrency = best_concurrency(status.engine_url, model, work, status.max_running_requests)
        before = heartbeat(server.url)
        rates = []
        for number in range(pairs):
            pair = asyncio.run(direct(status.engine_url, model, work, concurrency)), through_pool(pool, work)
            rates.append(pair)
            console.print(f"pair {number + 1}: direct {pair[0]:.0f}, pool {pair[1]:.0f} tokens/s")
        time.sleep(1.0)  # two heartbeats: the last account is in
        after = heartbeat(server.url)
    return summary(line, concurrency, rates, before, after)


def summary(
    line: str, concurrency: int, rates: list[tuple[float, float]], before: WorkerStatus, after: WorkerStatus
) -> dict[str, object]:
    """Medians; the ratio is the median of the pairs' own."""
    ratios = [pool / straight for straight, pool in rates]
    backlog = after.backlog_seconds - before.backlog_seconds
    return {
        "engine": line,
        "max_running_requests": after.max_running_requests,
        "direct_concurrency": concurrency,
        "tokens_per_s_direct": round(statistics.median(straight for straight, _ in rates), 1),
        "tokens_per_s_pool": round(statistics.median(pool for _, pool in rates), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "pairs": len(rates),
        "backlog_seconds": round(backlog, 1),
        "underfull_share": round((after.underfull_seconds - before.underfull_seconds) / backlog, 4),
    }


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--groups", type=int, default=48)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    work = Work(groups=options.groups, n=options.samples, new_tokens=options.new_tokens)
    print(json.dumps(measure(work, options.pairs)))


if __name__ == "__main__":
    main()
