"""The server as a child process: it answers, keeps what it is asked to keep, and ends with its owner."""

import contextlib
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from redis import Redis
from waiting import LONG, until_blocking

from rollpool.ops.local import server as local
from rollpool.ops.local.child import dies_with_us
from rollpool.ops.local.server import LocalServer, find_servers
from rollpool.schemas import RollpoolError

Start = Callable[..., LocalServer]


def gone(pid: int) -> bool:
    """True once nothing of it runs; a zombie waits for a parent that may be anybody."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def client(server: LocalServer) -> Redis:
    return Redis.from_url(server.url, socket_timeout=LONG)


@pytest.fixture(params=find_servers().items(), ids=lambda found: found[0])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Start servers of one kind; all end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(LocalServer(binary=request.param[1], **options))


def test_it_answers_once_started_and_is_reached_from_this_machine_alone(start: Start) -> None:
    server = start()
    with client(server) as asked:
        assert asked.ping()
        assert asked.config_get("bind") == {"bind": "127.0.0.1"}
    assert server.url == f"redis://127.0.0.1:{server.port}/0"
    assert server.start().pid == server.pid, "a server that runs is left alone"


def test_two_servers_are_apart(start: Start) -> None:
    first, second = start(), start()
    assert first.port != second.port
    assert first.directory != second.directory
    with client(first) as one, client(second) as other:
        one.set("a", "1")
        assert other.get("a") is None


def test_killed_and_started_again_it_keeps_its_port_and_its_data(start: Start) -> None:
    server = start(appendonly=True, appendfsync="always")
    port, pid = server.port, server.pid
    for number in range(3):
        with client(server) as asked:
            asked.xadd("log", {"number": number})
        server.kill()
        assert not server.running
        server.restart()
    assert server.port == port
    assert server.pid != pid
    with client(server) as asked:
        assert asked.xlen("log") == 3


def test_without_an_append_only_file_a_restart_begins_empty(start: Start) -> None:
    server = start()
    with client(server) as asked:
        asked.set("a", "1")
    server.restart()
    with client(server) as asked:
        assert asked.get("a") is None


def test_a_temporary_directory_is_removed_at_each_stop(start: Start) -> None:
    server = start(appendonly=True)
    directory, pid = server.directory, server.pid
    assert any(directory.iterdir())
    server.stop()
    server.stop()
    assert not directory.exists()
    assert gone(pid)
    server.start()
    assert directory.exists()
    server.stop()
    assert not directory.exists()


def test_a_directory_of_the_callers_own_is_kept_and_found_again(start: Start, tmp_path: Path) -> None:
    server = start(directory=tmp_path / "data", appendonly=True)
    with client(server) as asked:
        asked.set("a", "1")
    server.stop()
    with client(start(directory=tmp_path / "data", appendonly=True)) as asked:
        assert asked.get("a") == b"1"


def test_it_ends_with_the_object_that_owns_it(start: Start) -> None:
    # Not by `start`, which would hold it.
    binary = start()._binary
    server = LocalServer(binary=binary).start()
    pid, directory = server.pid, server.directory
    del server
    gc.collect()
    assert gone(pid)
    assert not directory.exists()


def test_options_reach_the_server(start: Start) -> None:
    with client(start(options=("--maxmemory", "64mb"))) as asked:
        assert asked.config_get("maxmemory") == {"maxmemory": str(64 * 1024 * 1024)}


def test_a_server_that_does_not_start_says_why_and_leaves_nothing(start: Start) -> None:
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(RollpoolError, match="no-such-option"):
        start(options=("--no-such-option", "1"))
    assert set(psutil.Process().children(recursive=True)) <= before


def test_a_port_that_another_took_first_is_tried_no_more(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = local._free_port
        ports = iter([taken.getsockname()[1], free()])
        monkeypatch.setattr(local, "_free_port", lambda: next(ports))
        server = start()
        assert server.port != taken.getsockname()[1]


OWNER = """
import os, signal, sys, time
from rollpool.ops.local.server import LocalServer

interrupted = []
signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
with LocalServer(binary=sys.argv[1]) as server:
    print(server.pid, server.url, flush=True)
    while sys.stdin.read(1) != "q":
        print(len(interrupted), flush=True)
"""


class Owner:
    """A process that owns a server."""

    def __init__(self, binary: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(binary)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        pid, self.url = self.say().split()
        self.server = int(pid)

    def say(self, word: str = "") -> str:
        """The line it prints next, after it was sent `word`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word)
        self.process.stdin.flush()
        return self.process.stdout.readline()


@pytest.fixture
def owner(start: Start) -> Iterator[Owner]:
    owned = Owner(start()._binary)
    with owned.process:
        yield owned
        owned.process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(owned.server, signal.SIGKILL)


@pytest.mark.skipif(
    not dies_with_us(), reason="util-linux' setpriv is missing: only it ends a server whose owner is killed"
)
def test_it_ends_when_its_owner_is_killed(owner: Owner) -> None:
    assert not gone(owner.server)
    owner.process.kill()
    owner.process.wait()
    until_blocking(lambda: gone(owner.server), "the server ends")


def test_it_ends_when_its_owner_exits(owner: Owner) -> None:
    owner.process.communicate("q", timeout=LONG)
    assert owner.process.returncode == 0
    assert gone(owner.server)


def test_an_interrupt_in_the_terminal_is_its_owners_to_act_on(owner: Owner) -> None:
    os.killpg(owner.process.pid, signal.SIGINT)
    until_blocking(lambda: owner.say("?") == "1\n", "the owner is interrupted")
    with Redis.from_url(owner.url) as asked:
        assert asked.ping(), "the server is there for as long as its owner needs it"


def test_asked_too_early_it_says_what_to_call() -> None:
    if not find_servers():
        pytest.skip("no Redis server on this machine: pip install rollpool[local]")
    server = LocalServer()
    for question in (lambda: server.url, lambda: server.pid):
        with pytest.raises(RollpoolError, match=r"call start\(\) first"):
            question()
    server.stop()


def test_a_machine_without_a_server_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(local, "_embedded", lambda: None)
    with pytest.raises(RollpoolError, match=r"pip install rollpool\[local\]"):
        LocalServer()
