"""The real `rq worker`, as a process, with an engine attached by URL: what RQ's users expect of a worker, it does."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgpack
import pytest
from aiohttp import web
from fake_engine import FakeServer, completion
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from rq import Queue
from rq.cli.helpers import get_redis_from_config
from rq.command import send_shutdown_command
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend
from rq.worker import Worker
from waiting import LONG, until

from rollpool.producer import AsyncRolloutPool
from rollpool.schemas import GROUP, Group, Keys, SettingsError
from rollpool.schemas.connection import connect
from rollpool.schemas.scripts import Record
from rollpool.schemas.wire import unpack_group
from rollpool.worker import RolloutWorker, rq_worker

POOL = "test"


class Command:
    """A process whose output is kept."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode(errors="replace").rstrip())

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Its exit status."""
        async with asyncio.timeout(LONG):
            await self._reading
            return await self.process.wait()


class Site:
    """A server, a fake engine, and workers on this machine."""

    def __init__(self, url: str, engine: FakeServer, directory: Path, pool: AsyncRolloutPool, rq: "Redis") -> None:
        self.url = url
        self.engine = engine
        self.pool = pool
        self.rq = rq
        self.keys = Keys(POOL)
        self._directory = directory
        self.commands: list[Command] = []

    async def worker(self, *arguments: str, pools: tuple[str, ...] = (POOL,), **environment: str) -> Command:
        return await self.run(
            *("worker", "--worker-class", "rollpool.worker.RolloutWorker", "--url", self.url, *arguments, *pools),
            **{"ROLLPOOL_ENGINE__URL": self.engine.url, "ROLLPOOL_HEARTBEAT_S": "0.2"} | environment,
        )

    async def run(self, *arguments: str, **environment: str) -> Command:
        """`rq` with these arguments."""
        bare = {name: value for name, value in os.environ.items() if not name.startswith(("ROLLPOOL_", "RQ_"))}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rq.cli", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=self._directory,
            env=bare | environment,
        )
        self.commands.append(Command(process))
        return self.commands[-1]

    def rq_state(self, name: str) -> str | None:
        """What RQ's books say of a worker; None when it is not listed."""
        for worker in Worker.all(connection=self.rq):
            if worker.name == name:
                return str(worker.get_state())
        return None

    async def serving(self, name: str) -> None:
        async def listed() -> bool:
            state: Any = await asyncio.to_thread(self.rq.hget, self.keys.worker(name), "state")
            assert self.commands[-1].process.returncode is None, self.commands[-1].output
            return bool(state == b"serving")

        await until(listed, f"{name} serves")

    async def states(self, batch: str) -> list[str]:
        fields: Any = await asyncio.to_thread(self.rq.hgetall, self.keys.batch("r", batch))
        return [fields[index].decode() for index in sorted((name for name in fields if name.isdigit()), key=int)]

    async def settled(self, batch: str, *outcomes: str) -> list[Group]:
        async def done() -> bool:
            return await self.states(batch) == list(outcomes)

        await until(done, f"{batch} is settled")
        entries: Any = await asyncio.to_thread(self.rq.xrange, self.keys.results("r", batch))
        return [unpack_group(fields[b"body"]) for _, fields in entries]

    def pending(self) -> int:
        pending: Any = self.rq.xpending(self.keys.jobs("r", "default"), GROUP)
        return int(pending["pending"])

    def hold(self) -> asyncio.Event:
        """Let jobs wait in the engine until the event is set."""
        released = asyncio.Event()

        async def reply(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            if body["input_ids"] != [1]:
                await released.wait()
            return web.json_response(completion(body["rid"], body["sampling_params"]["max_new_tokens"]))

        self.engine.reply = reply
        return released

    @property
    def asked(self) -> int:
        """Requests the engine got, less the one that each attaching makes."""
        return sum(body["input_ids"] != [1] for body in self.engine.bodies)

    async def enqueue(self, count: int, batch: str) -> None:
        await self.pool.enqueue_prompts(
            [[2, 3]] * count, policy_version=0, batch_id=batch, sampling={"max_new_tokens": 4}
        )


@pytest.fixture
def rq(redis_url: str) -> Iterator["Redis"]:
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def site(redis_url: str, redis_client: AsyncRedis, rq: "Redis", tmp_path: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        engine = FakeServer()
        await engine.start()
        stack.push_async_callback(engine.stop)
        pool = await stack.enter_async_context(AsyncRolloutPool(redis_url, pool=POOL, run="r"))
        made = Site(redis_url, engine, tmp_path, pool, rq)
        yield made
        for command in made.commands:
            if command.process.returncode is None:
                command.process.kill()
            await command.ended()


async def test_rq_lists_suspends_resumes_counts_and_shuts_it_down(site: Site) -> None:
    worker = await site.worker("--name", "w")
    await site.serving("w")
    await site.enqueue(3, "a")
    groups = await site.settled("a", "ok", "ok", "ok")
    assert groups[0].samples[0].output_ids.tolist() == [100, 101, 102, 103]
    await until(lambda: site.rq.hget("rq:worker:w", "successful_job_count") == b"3", "RQ counts what was settled")

    suspend(site.rq)
    await until(lambda: site.rq_state("w") == "suspended", "RQ lists it as suspended")
    await until(lambda: site.rq.hget(site.keys.worker("w"), "state") == b"suspended", "so does the pool")
    asked = site.asked
    await site.enqueue(2, "b")
    await asyncio.sleep(1.5)  # more than one block of a read that was under way
    assert (await site.states("b"), site.asked) == (["open", "open"], asked)
    resume(site.rq)
    await site.settled("b", "ok", "ok")
    await until(lambda: site.rq.hget("rq:worker:w", "successful_job_count") == b"5", "RQ counts what was settled")

    info = await site.run("info", "--url", site.url)
    assert await info.ended() == 0
    assert f"idle {POOL}. jobs: 5 finished, 0 failed" in info.output
    assert "1 workers, 0 queues" in info.output  # its queue carries no jobs

    send_shutdown_command(site.rq, "w")
    assert await worker.ended() == 0
    assert site.rq_state("w") is None
    assert site.rq.exists(site.keys.worker("w")) == 0


async def test_a_burst_does_what_there_is_and_ends(site: Site) -> None:
    await site.enqueue(30, "a")
    worker = await site.worker("--burst")
    assert await worker.ended() == 0
    assert await site.states("a") == ["ok"] * 30
    assert site.pending() == 0


async def test_an_idle_worker_ends_when_it_was_told_to(site: Site) -> None:
    await site.enqueue(2, "a")
    worker = await site.worker("--max-idle-time", "1")
    assert await worker.ended() == 0
    assert await site.states("a") == ["ok", "ok"]
    assert "nothing left to do" in worker.output


async def test_a_worker_ends_after_as_many_jobs_as_it_was_told(site: Site) -> None:
    worker = await site.worker("--max-jobs", "3", "--name", "w")
    await site.serving("w")
    await site.enqueue(3, "a")
    assert await worker.ended() == 0
    assert await site.states("a") == ["ok"] * 3


async def test_a_killed_workers_name_and_jobs_are_taken_at_once(site: Site) -> None:
    released = site.hold()
    first = await site.worker("--name", "w", ROLLPOOL_LEASE_S="3600")
    await site.serving("w")
    await site.enqueue(3, "a")
    await until(lambda: site.asked == 3, "the jobs are in the engine")
    first.send(signal.SIGKILL)
    await first.ended()
    assert site.rq.exists("rq:worker:w")
    released.set()
    await site.worker("--name", "w", ROLLPOOL_LEASE_S="3600")
    await site.settled("a", "ok", "ok", "ok")
    await until(lambda: site.rq_state("w") == "idle", "it is listed")


async def test_a_name_in_use_is_refused(site: Site) -> None:
    await site.worker("--name", "w")
    await site.serving("w")
    second = await site.worker("--name", "w")
    assert await second.ended() != 0
    assert "already" in second.output
    assert site.rq_state("w") is not None


async def test_the_first_signal_finishes_what_runs_and_the_second_gives_it_back(site: Site) -> None:
    released = site.hold()
    warm = await site.worker("--name", "warm", ROLLPOOL_DRAIN_S="600", ROLLPOOL_LEASE_S="60")
    await site.serving("warm")
    await site.enqueue(2, "a")
    await until(lambda: site.asked == 2, "the jobs are in the engine")
    warm.send(signal.SIGTERM)
    await until(lambda: "warm stop" in warm.output, "it says that it stops")
    await until(lambda: site.rq.hget(site.keys.worker("warm"), "state") == b"stopping", "and shows it")
    await site.enqueue(1, "later")
    released.set()
    assert await warm.ended() == 0
    assert (await site.states("a"), await site.states("later")) == (["ok", "ok"], ["open"])

    site.hold()
    cold = await site.worker("--name", "cold", ROLLPOOL_DRAIN_S="600", ROLLPOOL_LEASE_S="60")
    await until(lambda: site.asked == 3, "the job is in the engine")
    cold.send(signal.SIGTERM)
    cold.send(signal.SIGTERM)  # at once: the same one
    await until(lambda: "warm stop" in cold.output, "it says that it stops")
    await asyncio.sleep(rq_worker.SAME_SIGNAL_S + 0.2)
    assert cold.process.returncode is None
    cold.send(signal.SIGINT)
    assert await cold.ended() == 0
    assert "cold stop" in cold.output
    assert await site.states("later") == ["open"]
    assert site.pending() == 0
    waiting: Any = site.rq.hvals(site.keys.waiting)  # the front of its lane
    [fields] = (msgpack.unpackb(packed, raw=True) for packed in waiting)
    record = Record.of(dict(zip(fields[::2], fields[1::2], strict=True)))
    assert (record.attempts, record.losses) == (0, 0), "a planned move costs nothing"


@pytest.mark.parametrize(
    ("pools", "environment", "said"),
    [
        ((POOL,), {"ROLLPOOL_LEASE_SECONDS": "3"}, "ROLLPOOL_LEASE_SECONDS: there is no such setting"),
        ((POOL,), {"ROLLPOOL_ENGINE__TP_SIZE": "none"}, "engine.tp_size: "),
        ((POOL, "other"), {}, "one worker serves one pool, not 2"),
        (("no pool",), {}, "pool 'no pool': "),
        ((POOL,), {"ROLLPOOL_URL": "http://server"}, "url 'http://server': "),
    ],
)
async def test_a_wrong_setting_is_one_clear_line(
    site: Site, pools: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    worker = await site.worker(pools=pools, **environment)
    assert await worker.ended() == 1
    assert "Traceback" not in worker.output
    [line] = [line for line in worker.lines if said in line]
    assert worker.lines[-1] == line
    assert site.rq.keys("rq:worker*") == []


async def test_what_an_engine_made_as_it_was_replaced_is_made_again(site: Site) -> None:
    released = site.hold()
    await site.pool.publish_policy(0, checkpoint="/models/a", check=False)
    await site.pool.publish_policy(1, checkpoint="/models/b", check=False)
    await site.worker("--name", "w")
    await site.serving("w")
    assert site.rq.hget(site.keys.worker("w"), "policy") == b"0"  # what the engine says, not what was published last
    await site.enqueue(2, "a")
    await until(lambda: site.asked == 2, "the jobs are in the engine")
    site.engine.model_path, site.engine.seed = "/models/b", 43
    released.set()
    groups = await site.settled("a", "ok", "ok")
    assert {span.version for group in groups for span in group.samples[0].version_spans} == {1}
    assert site.asked >= 4


async def test_a_published_policy_that_an_attached_engine_serves_already_is_taken_up(site: Site) -> None:
    await site.worker("--name", "w")
    await site.serving("w")
    await site.pool.publish_policy(7, checkpoint="/models/a", check=False)
    await site.pool.wait_for_policy(7, timeout=LONG)
    await site.enqueue(1, "a")
    [group] = await site.settled("a", "ok")
    assert group.samples[0].version_spans[0].version == 7


# RQ's side of it, in this process


@pytest.fixture
def worker(rq: "Redis") -> RolloutWorker:
    return RolloutWorker([POOL], name="w", connection=rq, prepare_for_work=False)


def test_rqs_queues_are_never_unpickled(worker: RolloutWorker, rq: "Redis") -> None:
    assert worker.serializer is JSONSerializer
    assert all(queue.serializer is JSONSerializer for queue in worker.queues)
    explicit = RolloutWorker([Queue(POOL, connection=rq)], connection=rq, serializer="pickle")
    assert explicit.serializer is JSONSerializer


def test_a_worker_whose_key_was_flushed_is_listed_again(rq: "Redis") -> None:
    worker = RolloutWorker([POOL], name="w", connection=rq)
    worker.register_birth()
    worker._beat()
    rq.flushall()
    assert Worker.all(connection=rq) == []
    worker._beat()
    [listed] = Worker.all(connection=rq)
    assert (listed.name, listed.pid, listed.queue_names()) == ("w", worker.pid, [POOL])
    assert listed.birth_date is not None


def test_the_key_of_a_living_process_is_not_taken(rq: "Redis") -> None:
    first = RolloutWorker([POOL], name="w", connection=rq)
    first.register_birth()
    rq.hset("rq:worker:w", "pid", os.getppid())
    with pytest.raises(ValueError, match="active worker named 'w'"):
        RolloutWorker([POOL], name="w", connection=rq).register_birth()
    rq.hset("rq:worker:w", "hostname", "elsewhere")
    rq.hset("rq:worker:w", "pid", 999_999_999)
    with pytest.raises(ValueError, match="active worker named 'w'"):
        RolloutWorker([POOL], name="w", connection=rq).register_birth()
    rq.hset("rq:worker:w", "hostname", first.hostname)
    RolloutWorker([POOL], name="w", connection=rq).register_birth()


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:6379/0",
        "redis://user:p%40s%2Fs%3A@[::1]:7000/3",
        "redis://:secret@host:1/0",
        "rediss://host:1/0?ssl_cert_reqs=none&ssl_ca_certs=%2Fca.pem",
        "unix://:secret@/run/redis.sock?db=2",
    ],
)
def test_the_pools_url_is_that_of_rqs_connection(url: str) -> None:
    wanted = Redis.from_url(url).connection_pool
    made = Redis.from_url(rq_worker._url_of(Redis.from_url(url))).connection_pool
    assert made.connection_class is wanted.connection_class
    for name in ("host", "port", "path", "db", "username", "password", "ssl_cert_reqs", "ssl_ca_certs"):
        assert made.connection_kwargs.get(name) == wanted.connection_kwargs.get(name), name


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "redis+sentinel://localhost:26379/mymaster/0"),
        (
            {
                "INSTANCES": [("one", 1), ("::1", 2)],
                "MASTER_NAME": "pool",
                "DB": 3,
                "USERNAME": "user",
                "PASSWORD": "p@s/s",
                "SENTINEL_KWARGS": {"username": "asker", "password": "h&h"},
            },
            "redis+sentinel://user:p%40s%2Fs@one:1,[::1]:2/pool/3?sentinel_username=asker&sentinel_password=h%26h",
        ),
        (
            {"SSL": True, "CONNECTION_KWARGS": {"ssl_ca_certs": __file__}, "SENTINEL_KWARGS": {"ssl": True}},
            f"rediss+sentinel://localhost:26379/mymaster/0?{urlencode({'ssl_ca_certs': __file__})}",
        ),
    ],
)
def test_the_pools_url_is_that_of_rqs_sentinels(settings: dict[str, Any], url: str) -> None:
    made = rq_worker._url_of(get_redis_from_config({"SENTINEL": settings}))
    assert made == url
    connect(made).close()  # it is one that rollpool understands


def test_sentinels_that_speak_another_protocol_than_their_master_are_refused() -> None:
    connection = get_redis_from_config({"SENTINEL": {"SSL": True}})
    with pytest.raises(SettingsError, match="ROLLPOOL_URL"):
        rq_worker._url_of(connection)
