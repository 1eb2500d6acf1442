"""The pool over every kind of server: with TLS, behind Sentinels, in a cluster; trainer and host in this process."""

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeServer
from fakes import FakeOwner, completion
from redis.exceptions import AuthenticationError, ConnectionError, RedisError
from servers import (
    REDIS,
    SERVICE,
    Certificates,
    Cluster,
    TlsServer,
    Watched,
    asked,
    certificates,
    cluster,
    needs_redis_server,
    tls_cluster,
    tls_sentinel,
    tls_server,
    watched,
)
from waiting import LONG, until

from rollpool.ops.inspect import read_status
from rollpool.ops.local.server import LocalServer
from rollpool.producer import AsyncRolloutPool
from rollpool.schemas import Keys, NotPermitted, RollpoolError, SettingsError
from rollpool.schemas.connection import connect, connect_async
from rollpool.worker.host import Host
from rollpool.worker.settings import WorkerSettings

pytestmark = needs_redis_server

POOL = "test"
RUN = "r"
KEYS = Keys(POOL)
HOW_TO = Path(__file__).parents[2] / "docs" / "howto-servers.md"


@contextlib.asynccontextmanager
async def serving(url: str, owner: FakeOwner, name: str = "w") -> AsyncIterator[Host]:
    settings = {"lease_s": 2.0, "heartbeat_s": 0.2, "drain_s": 5.0, "engine": {"model_path": "/policy/0"}}
    host = Host(url, POOL, name, WorkerSettings.model_validate(settings), owner)
    task = asyncio.create_task(host.run())
    try:
        yield host
    finally:
        host.stop_now()
        await task


async def enqueued(pool: AsyncRolloutPool, count: int, batch: str = "b") -> Any:
    prompts = [[index + 1] for index in range(count)]
    return await pool.enqueue_prompts(prompts, policy_version=0, batch_id=batch)


async def collected(batch: Any) -> list[int]:
    """The indexes of the groups that the trainer got."""
    return sorted([group.index async for group in batch.collect(LONG)])


async def goes_round(url: str, count: int = 20) -> None:
    """Enqueue, settle, collect, commit."""
    async with AsyncRolloutPool(url, pool=POOL, run=RUN) as pool:
        batch = await enqueued(pool, count)
        async with serving(url, FakeOwner()) as host:
            assert await collected(batch) == list(range(count))
            await until(lambda: host.settled == count, "the host knows too")
        await batch.commit()


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority that our server does not know."""
    return certificates(tmp_path_factory.mktemp("tls") / "strange")


@pytest.fixture(scope="module")
def tls(authority: Certificates) -> Iterator[TlsServer]:
    """A server that asks its clients for a certificate."""
    with tls_server(authority, clients=True) as running:
        yield running


def trusting(ours: Certificates, client: Certificates) -> dict[str, object]:
    certificate, key = client.client
    return {"ssl_ca_certs": ours.ca, "ssl_certfile": certificate, "ssl_keyfile": key}


async def test_work_goes_round_over_tls(tls: TlsServer, authority: Certificates) -> None:
    await goes_round(tls.url(**trusting(authority, authority)))


@pytest.mark.parametrize("side", ["server", "client"])
async def test_a_certificate_that_is_not_trusted_is_told_at_once(
    tls: TlsServer, authority: Certificates, stranger: Certificates, side: str
) -> None:
    url = tls.url(**(trusting(stranger, authority) if side == "server" else trusting(authority, stranger)))
    told = "certificate verify failed.*ssl_ca_certs" if side == "server" else "unknown ca.*ssl_certfile"
    started = time.monotonic()
    async with AsyncRolloutPool(url, pool=POOL, run=RUN) as pool:
        with pytest.raises(NotPermitted, match=told):
            await enqueued(pool, 1)
    with connect(url) as client, pytest.raises(NotPermitted, match=told):
        client.ping()
    # With TLS 1.3 the server refuses a client only after the handshake, and may close before it has said why.
    assert side == "client" or time.monotonic() - started < 3.0, "it was tried again"


async def test_a_server_that_speaks_no_tls_is_told(tls: TlsServer) -> None:
    url = tls.local.url.replace("redis:", "rediss:")
    with (
        connect(f"{url}?socket_connect_timeout=0.1", retries=0) as client,
        pytest.raises(RedisError, match="is it the server's TLS port"),
    ):
        client.ping()


async def test_a_wrong_password_is_told_at_once() -> None:
    with LocalServer(binary=REDIS) as server:
        with connect(server.url) as client:
            client.config_set("requirepass", "secret")
        started = time.monotonic()
        url = server.url.replace("//", "//:wr0ng@")
        async with AsyncRolloutPool(url, pool=POOL, run=RUN) as pool:
            with pytest.raises(NotPermitted, match="refused the login") as told:
                await enqueued(pool, 1)
        assert "wr0ng" not in str(told.value)
        assert time.monotonic() - started < 3.0, "it was tried again"


# Roles


async def test_the_roles_of_the_how_to_do_their_work_and_no_more() -> None:
    roles = re.findall(r"^user (\w+) (on .*)$", HOW_TO.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [name for name, _ in roles] == ["trainer", "worker", "operator", "viewer"]
    with LocalServer(binary=REDIS) as server, connect(server.url) as client:
        for name, rules in roles:
            client.execute_command("ACL", "SETUSER", name, *rules.replace("{math}", f"{{{POOL}}}").split())

        def url(name: str) -> str:
            return server.url.replace("//", f"//{name}:{name}-secret@")

        async with AsyncRolloutPool(url("trainer"), pool=POOL, run=RUN) as pool:
            batch = await enqueued(pool, 20)
            async with serving(url("worker"), FakeOwner()):
                assert await collected(batch) == list(range(20))
                await pool.publish_policy(1, checkpoint="/policy/1", check=False)
                await pool.wait_for_policy(1, timeout=LONG)
                with connect(url("viewer")) as viewer:
                    assert await asyncio.to_thread(read_status, viewer, KEYS)
            await batch.commit()
            await (await enqueued(pool, 1, "unwanted")).cancel()
        assert client.acl_log() == [], "a role lacks what it needs"

        async with AsyncRolloutPool(url("worker"), pool=POOL, run=RUN) as pool:
            with pytest.raises(NotPermitted):
                await pool.publish_policy(2, checkpoint="/policy/2", check=False)
        async with AsyncRolloutPool(url("viewer"), pool=POOL, run=RUN) as pool:
            with pytest.raises(NotPermitted):
                await enqueued(pool, 1, "x")


# Sentinels


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Watched]:
    with watched(tmp_path) as running:
        yield running


async def test_a_failover_in_the_middle_of_work_loses_nothing_that_was_replicated(sentinels: Watched) -> None:
    count = 200
    owner = FakeOwner(holding=True)
    url = sentinels.url()
    async with AsyncRolloutPool(url, pool=POOL, run=RUN) as pool, serving(url, owner) as host:
        batch = await enqueued(pool, count)
        with contextlib.closing(asked(sentinels.master.port)) as master:
            await until(lambda: owner.engines and len(owner.engine.open) >= 3, "jobs are in the engine")
            for call in list(owner.engine.open.values())[:3]:
                call.answer.set_result(completion())
            await until(lambda: host.settled == 3, "some are settled")
            assert await asyncio.to_thread(master.wait, 1, int(LONG * 1000)) == 1
        collecting = asyncio.create_task(collected(batch))
        await asyncio.to_thread(sentinels.fail_over)
        owner.engine.reply = lambda _: completion()
        for call in list(owner.engine.open.values()):
            if not call.answer.done():
                call.answer.set_result(completion())
        assert await collecting == list(range(count))
        with contextlib.closing(asked(sentinels.replica.port)) as master:
            results = master.xrange(KEYS.results(RUN, "b"))
            states = {value for name, value in master.hgetall(KEYS.batch(RUN, "b")).items() if name.isdigit()}
        assert len(results) == count, "a job was settled twice, or not at all"
        assert states == {b"ok"}
        await batch.commit()


async def test_an_idle_client_writes_to_the_new_master_and_sends_its_scripts_again(sentinels: Watched) -> None:
    async with AsyncRolloutPool(sentinels.url(), pool=POOL, run=RUN) as pool:
        await enqueued(pool, 1, "before")
        await asyncio.to_thread(sentinels.fail_over)
        with contextlib.closing(asked(sentinels.replica.port)) as master:
            master.script_flush()
        await enqueued(pool, 1, "after")
        with contextlib.closing(asked(sentinels.replica.port)) as master:
            assert master.exists(KEYS.batch(RUN, "after"))


def test_a_master_that_became_a_replica_is_left(sentinels: Watched) -> None:
    """Sentinel closes the connections of a master that it demotes; one that it cannot see it does not."""
    with (
        connect(sentinels.url()) as client,
        contextlib.closing(asked(sentinels.master.port)) as old,
        contextlib.closing(asked(sentinels.replica.port)) as new,
    ):
        client.set("a", 1)
        for port in sentinels.sentinels:
            with contextlib.closing(asked(port)) as sentinel:
                sentinel.execute_command("SENTINEL", "SET", SERVICE, "down-after-milliseconds", 60_000)
        new.replicaof("NO", "ONE")
        old.replicaof("127.0.0.1", sentinels.replica.port)
        for port in sentinels.sentinels:
            with contextlib.closing(asked(port)) as sentinel:
                sentinel.execute_command("SENTINEL", "REMOVE", SERVICE)
                sentinel.execute_command("SENTINEL", "MONITOR", SERVICE, "127.0.0.1", sentinels.replica.port, 2)
        client.set("b", 2)
        assert new.get("b") == b"2"


def test_sentinels_that_do_not_know_the_service_are_told_at_once(sentinels: Watched) -> None:
    url = sentinels.url().replace(f"/{SERVICE}/", "/nobody/")
    with connect(url) as client, pytest.raises(SettingsError, match=r"the master of 'nobody': .* does not know it"):
        client.ping()


async def test_a_sentinels_own_login_is_used(sentinels: Watched) -> None:
    for port in sentinels.sentinels:
        with contextlib.closing(asked(port)) as sentinel:
            sentinel.execute_command("ACL", "SETUSER", "asker", "on", ">hush", "+sentinel|get-master-addr-by-name")
    for password, works in (("hush", True), ("wr0ng", False)):
        client = connect_async(sentinels.url(options=f"?sentinel_username=asker&sentinel_password={password}"))
        try:
            if works:
                assert await client.ping()
            else:
                with pytest.raises(AuthenticationError, match=r"127\.0\.0\.1:\d+: .*password"):
                    await client.ping()
        finally:
            await client.aclose()


async def test_work_goes_round_where_master_and_sentinel_speak_tls(authority: Certificates, tmp_path: Path) -> None:
    with tls_sentinel(authority, tmp_path / "sentinel") as url:
        await until(lambda: answers(url), "the Sentinel watches")
        await goes_round(url)


def answers(url: str) -> bool:
    with contextlib.suppress(RedisError), connect(url, retries=0) as client:
        return bool(client.ping())
    return False


async def test_a_worker_serves_the_pool_behind_the_sentinels_that_rq_was_given(
    sentinels: Watched, tmp_path: Path
) -> None:
    instances = [("127.0.0.1", port) for port in sentinels.sentinels]
    (tmp_path / "behind.py").write_text(f"SENTINEL = {{'INSTANCES': {instances}, 'MASTER_NAME': {SERVICE!r}}}")
    engine = FakeServer()
    await engine.start()
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("ROLLPOOL_", "RQ_"))}
    async with AsyncRolloutPool(sentinels.url(), pool=POOL, run=RUN) as pool:
        batch = await enqueued(pool, 5)
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rq.cli", "worker", "--config", "behind", "--burst"),
            *("--worker-class", "rollpool.worker.RolloutWorker", POOL),
            cwd=tmp_path,
            env=bare | {"ROLLPOOL_ENGINE__URL": engine.url},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(LONG):
                said = (await worker.communicate())[0].decode()
        finally:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            await engine.stop()
        assert worker.returncode == 0, said
        assert await collected(batch) == list(range(5))


# A cluster


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    with cluster() as running:
        yield running


def url_of(node: LocalServer) -> str:
    return f"redis+cluster://127.0.0.1:{node.port}"


async def test_work_goes_round_in_a_cluster_whose_url_names_another_node(nodes: Cluster) -> None:
    url = url_of(nodes.other(KEYS.runs))
    with connect(url, slot_key=KEYS.runs, retries=0) as client:
        assert client.sadd("{test}:known", "beforehand")
    await goes_round(url)


async def test_a_slot_that_moves_in_the_middle_of_work_is_followed(nodes: Cluster) -> None:
    count, owner, url = 50, FakeOwner(holding=True), url_of(nodes.nodes[0])
    async with AsyncRolloutPool(url, pool=POOL, run=RUN) as pool, serving(url, owner):
        batch = await enqueued(pool, count)
        await until(lambda: owner.engines and owner.engine.open, "jobs are in the engine")
        await asyncio.to_thread(nodes.move, KEYS.runs)
        owner.engine.reply = lambda _: completion()
        for call in list(owner.engine.open.values()):
            call.answer.set_result(completion())
        assert await collected(batch) == list(range(count))
        with contextlib.closing(asked(nodes.owner(KEYS.runs).port)) as client:
            assert client.xlen(KEYS.results(RUN, "b")) == count


def test_no_node_that_answers_is_an_error_that_says_whom_it_asked(nodes: Cluster) -> None:
    for node in nodes.nodes:
        node.kill()
    with (
        connect(url_of(nodes.nodes[0]), slot_key=KEYS.runs, retries=0) as client,
        pytest.raises(ConnectionError, match=f"no cluster node tells .*127.0.0.1:{nodes.nodes[0].port}"),
    ):
        client.ping()


async def test_a_server_that_is_no_cluster_is_told_at_once(redis_url: str) -> None:
    async with AsyncRolloutPool(redis_url.replace("redis:", "redis+cluster:"), pool=POOL, run=RUN) as pool:
        with pytest.raises(RollpoolError, match="cluster support disabled"):
            await enqueued(pool, 1)


async def test_work_goes_round_in_a_cluster_that_speaks_tls(authority: Certificates) -> None:
    with tls_cluster(authority) as url:
        await goes_round(url)
