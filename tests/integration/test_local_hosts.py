"""Hosts on one machine: real `rq worker` processes, with no engine or a fake one, and nothing of them left behind."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_engine import FakeServer
from redis import Redis
from waiting import LONG, until, until_blocking

from rollpool.ops.inspect import read_workers
from rollpool.ops.local import hosts as local
from rollpool.ops.local.child import dies_with_us
from rollpool.ops.local.hosts import LocalHosts, cpu_engine, launcher
from rollpool.producer import RolloutPool
from rollpool.schemas import Keys, RollpoolError
from rollpool.worker.engines.settings import EngineSettings
from rollpool.worker.settings import load_settings

POOL = "test"

#: Nobody listens there: a worker attached to it starts, is listed, and goes on trying.
NO_ENGINE: dict[str, Any] = {"url": "http://127.0.0.1:1"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the user's own."""
    for name in list(os.environ):
        if name.upper().startswith("ROLLPOOL_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def make(url: str, directory: Path, engine: dict[str, Any] = NO_ENGINE, **settings: Any) -> LocalHosts:
    return LocalHosts(url, POOL, directory / "logs", engine, {"heartbeat_s": 0.2, **settings})


@pytest.fixture
def hosts(redis_url: str, tmp_path: Path) -> Iterator[LocalHosts]:
    with make(redis_url, tmp_path) as made:
        yield made


def until_listed(hosts: LocalHosts, count: int) -> None:
    def listed() -> bool:
        hosts.check()
        return hosts.listed() == count

    until_blocking(listed, f"{count} workers are listed")


def ended(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_hosts_are_listed_once_they_run(hosts: LocalHosts) -> None:
    assert hosts.listed() == 0
    for name in ("a", "b"):
        hosts.start(name)
    until_listed(hosts, 2)
    assert set(hosts.workers) == {"a", "b"}


def test_only_workers_of_ours_are_counted(hosts: LocalHosts, redis_url: str, tmp_path: Path) -> None:
    with make(redis_url, tmp_path / "other") as others:
        others.start("theirs")
        until_listed(others, 1)
        assert hosts.listed() == 0


def test_a_worker_that_fails_at_once_is_told_with_the_end_of_its_log(redis_url: str, tmp_path: Path) -> None:
    with make(redis_url, tmp_path, lease_s="soon") as hosts:
        worker = hosts.start("a")
        assert worker.wait(LONG) == 1
        with pytest.raises(RollpoolError, match="worker a ended with status 1") as raised:
            hosts.check()
        assert "lease_s: " in str(raised.value)
        assert "soon" in str(raised.value)
        assert "Traceback" not in str(raised.value)


def test_only_the_worker_that_ended_is_told(hosts: LocalHosts) -> None:
    hosts.start("good")
    hosts.start("bad", ["--no-such-option"])
    hosts.workers["bad"].wait(LONG)
    with pytest.raises(RollpoolError, match="worker bad ended with status 2") as raised:
        hosts.check()
    assert "no-such-option" in str(raised.value)
    until_blocking(lambda: hosts.listed() == 1, "the other goes on")


def test_a_name_runs_once_and_again_after_its_end(hosts: LocalHosts) -> None:
    first = hosts.start("a")
    with pytest.raises(RollpoolError, match="worker a runs already"):
        hosts.start("a")
    until_listed(hosts, 1)
    first.kill()
    first.wait()
    second = hosts.start("a")
    until_listed(hosts, 1)
    hosts.check()
    assert second.pid != first.pid


def test_stop_is_a_warm_stop_and_may_be_repeated(hosts: LocalHosts, redis_url: str) -> None:
    workers = [hosts.start(name) for name in ("a", "b")]
    until_listed(hosts, 2)
    hosts.stop()
    hosts.stop()
    assert [worker.returncode for worker in workers] == [0, 0]
    assert hosts.workers == {}
    for name in ("a", "b"):
        assert "warm stop" in hosts.log(name).read_text()
        assert "cold stop" not in hosts.log(name).read_text()
    with Redis.from_url(redis_url) as client:
        assert read_workers(client, Keys(POOL)) == [], "a worker that ended in order takes itself off the list"


@pytest.fixture
async def engine() -> AsyncIterator[FakeServer]:
    server = FakeServer()
    await server.start()
    yield server
    await server.stop()


async def test_a_worker_that_drains_for_too_long_gets_a_cold_stop(
    redis_url: str, tmp_path: Path, engine: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Over the time within which a worker takes two signals for one.
    monkeypatch.setattr(local, "WARM_STOP_S", 3.0)
    with (
        make(redis_url, tmp_path, {"url": engine.url}, drain_s=3600) as hosts,
        RolloutPool(redis_url, pool=POOL, run="r") as pool,
    ):
        worker = hosts.start("a")
        await asyncio.to_thread(pool.enqueue_prompts, [[99]], policy_version=0)
        await until(lambda: engine.waiting, "the engine is busy for ever")
        await asyncio.to_thread(hosts.stop)
        assert worker.returncode == 0
        log = hosts.log("a").read_text()
        assert log.index("warm stop") < log.index("cold stop")


def test_a_worker_that_hears_nothing_is_ended_by_force(hosts: LocalHosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "WARM_STOP_S", 0.1)
    monkeypatch.setattr(local, "COLD_STOP_S", 0.1)
    worker = hosts.start("a")
    until_listed(hosts, 1)
    worker.send_signal(signal.SIGSTOP)
    hosts.stop()
    assert worker.returncode == -signal.SIGKILL


def test_an_interrupt_inside_leaves_no_process(redis_url: str, tmp_path: Path) -> None:
    workers: list[subprocess.Popen[bytes]] = []

    def interrupted() -> None:
        with make(redis_url, tmp_path) as hosts:
            workers.extend(hosts.start(name) for name in ("a", "b"))
            until_listed(hosts, 2)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [worker.returncode for worker in workers] == [0, 0]
    assert all(ended(worker.pid) for worker in workers)


def test_an_interrupt_just_after_the_start_leaves_no_process(redis_url: str, tmp_path: Path) -> None:
    workers: list[subprocess.Popen[bytes]] = []

    def interrupted() -> None:
        with make(redis_url, tmp_path) as hosts:
            workers.append(hosts.start("a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert workers[0].returncode is not None
    assert ended(workers[0].pid)


def test_a_second_interrupt_ends_at_once_what_is_stopping(hosts: LocalHosts, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [hosts.start(name) for name in ("a", "b")]
    until_listed(hosts, 2)
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)

    def impatient(worker: subprocess.Popen[bytes]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "_end", impatient)
    with pytest.raises(KeyboardInterrupt):
        hosts.stop()
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL] * 2


OWNER = """
import json, signal, sys
from pathlib import Path
from rollpool.ops.local.hosts import LocalHosts

url, directory, engine = sys.argv[1:]
with LocalHosts(url, "test", Path(directory), json.loads(engine), {"heartbeat_s": 0.2}) as hosts:
    print(*(hosts.start(name).pid for name in ("a", "b")), flush=True)
    signal.pause()
"""


@pytest.fixture
def owner(redis_url: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that owns two listed hosts, and their processes."""
    command = [sys.executable, "-c", OWNER, redis_url, str(tmp_path), json.dumps(NO_ENGINE)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            pids = [int(word) for word in process.stdout.readline().split()]
            with Redis.from_url(redis_url) as client:
                until_blocking(lambda: len(read_workers(client, Keys(POOL))) == 2, "both hosts are listed")
            yield process, pids
        finally:
            process.kill()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_an_interrupt_in_the_terminal_reaches_the_workers_as_a_warm_stop(
    owner: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    process, pids = owner
    os.killpg(process.pid, signal.SIGINT)
    process.wait(LONG)
    assert all(ended(pid) for pid in pids)
    assert all((tmp_path / f"{name}.log").read_text().count("warm stop") == 1 for name in ("a", "b"))


@pytest.mark.skipif(
    not dies_with_us(), reason="util-linux' setpriv is missing: only it ends hosts whose owner is killed"
)
def test_hosts_end_when_their_owner_is_killed(owner: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, pids = owner
    assert not any(ended(pid) for pid in pids)
    process.kill()
    until_blocking(lambda: all(ended(pid) for pid in pids), "the workers end")


def environment(worker: subprocess.Popen[bytes]) -> dict[str, str]:
    """That of the `rq worker` itself, which is exec'd by another command."""
    process = psutil.Process(worker.pid)
    until_blocking(lambda: "rq.cli" in process.cmdline(), "the worker is exec'd")
    return process.environ()


def test_the_settings_of_a_host_reach_it_whole(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = cpu_engine(Path("/engine/python"), tmp_path, "main")
    with make(redis_url, tmp_path, engine, lease_s=3.5) as hosts:
        handed = environment(hosts.start("a"))
    for name, value in handed.items():
        if name.startswith("ROLLPOOL_"):
            monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.url == redis_url
    assert settings.lease_s == 3.5
    assert settings.log_dir == tmp_path / "logs" == hosts.engine_log("a").parent
    lock = tmp_path / "logs" / "a.lock"
    assert settings.engine == EngineSettings.model_validate({**engine, "host_lock": lock})
    assert json.loads(handed["ROLLPOOL_ENGINE"])["tp_size"] == 8


def test_each_host_has_a_lock_of_its_own(hosts: LocalHosts) -> None:
    locks = {json.loads(environment(hosts.start(name))["ROLLPOOL_ENGINE"])["host_lock"] for name in ("a", "b")}
    assert len(locks) == 2


def test_parts_of_the_users_own_engine_do_not_mix_with_a_local_one(
    hosts: LocalHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLPOOL_ENGINE__URL", "http://tpu-vm:30000")
    monkeypatch.setenv("ROLLPOOL_ENGINE__TP_SIZE", "4")
    monkeypatch.setenv("ROLLPOOL_MAX_ATTEMPTS", "7")
    handed = environment(hosts.start("a"))
    assert not [name for name in handed if name.startswith("ROLLPOOL_ENGINE__")]
    assert handed["ROLLPOOL_MAX_ATTEMPTS"] == "7"


@pytest.mark.parametrize("line", ["0.0.1.post1", "main"])
def test_the_engine_on_cpu_is_one_that_a_worker_accepts(tmp_path: Path, line: Any) -> None:
    made = cpu_engine(Path("/engine/python"), tmp_path, line, max_running_requests=5)
    settings = EngineSettings.model_validate(made)  # which refuses flags that the worker sets itself
    assert settings.max_running_requests == 5
    assert settings.tp_size == 8
    assert "--xla_force_host_platform_device_count=8" in settings.env["XLA_FLAGS"]
    assert settings.launcher == launcher()
    assert launcher().is_file()
    flags = [arg for arg in settings.extra_args if arg.startswith("--")]
    assert "--attention-backend" in flags
    assert not set(flags) & set(local._OWNED)
    # A flag that went without its value, or a value without its flag, would shift all that follow.
    assert settings.extra_args[settings.extra_args.index("--dtype") + 1] == "float32"
    assert settings.extra_args[settings.extra_args.index("--max-total-tokens") + 1].isdecimal()


def test_flags_that_a_worker_owns_are_dropped_with_their_values() -> None:
    args = ["--a", "1", "--page-size", "1", "--b", "--context-length", "256", "--c", "2"]
    assert local._not_owned(args) == ["--a", "1", "--b", "--c", "2"]
