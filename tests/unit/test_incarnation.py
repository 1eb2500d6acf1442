"""What tells one life of a worker from the next."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import until_blocking

from rollpool.worker.incarnation import START_JITTER_S, Incarnation, process_ended

names = st.text("abcXYZ019.-_:@", min_size=1, max_size=40)
hosts = st.text("abcXYZ019.-_", max_size=40)


@given(names, hosts, st.integers(0, 10**9 - 1), st.integers(0, 10**12 - 1))
def test_a_consumers_name_is_read_back_as_it_was(worker: str, host: str, pid: int, started: int) -> None:
    incarnation = Incarnation(worker, host, pid, started)
    assert Incarnation.parse(incarnation.consumer) == incarnation


@given(st.one_of(st.text(), st.text(":@-.²09a")))
def test_any_other_name_is_nobodys(consumer: str) -> None:
    read = Incarnation.parse(consumer)
    assert read is None or int(read.consumer.rpartition("-")[2]) == read.started


@pytest.mark.parametrize(
    "consumer", ["", "w", "w:1", ":h@1-2", "w:h@1-", "w:h@-1", "w:h@²-1", "w:h@1-" + "9" * 5000, "w:h@1-2\n"]
)
def test_a_name_that_only_looks_like_one_is_nobodys(consumer: str) -> None:
    assert Incarnation.parse(consumer) is None


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield running
    running.kill()
    running.communicate()


def life_of(process: subprocess.Popen[bytes]) -> Incarnation:
    started = int(psutil.Process(process.pid).create_time())
    return Incarnation("w", socket.gethostname(), process.pid, started)


def test_this_process_has_not_ended() -> None:
    assert not Incarnation.current("w").ended()
    assert Incarnation.current("w") == Incarnation.current("w")


def test_a_process_that_runs_has_not_ended(process: subprocess.Popen[bytes]) -> None:
    life = life_of(process)
    assert not life.ended()
    for jitter in (1 - START_JITTER_S, START_JITTER_S - 1):  # the machine's own start is told to the second
        assert not replace(life, started=life.started + jitter).ended()


def test_a_process_whose_id_was_used_again_has_ended(process: subprocess.Popen[bytes]) -> None:
    life = life_of(process)
    assert replace(life, started=life.started - 60).ended()


def test_a_process_that_was_killed_has_ended_before_its_parent_looks(process: subprocess.Popen[bytes]) -> None:
    life = life_of(process)
    process.kill()
    until_blocking(life.ended, "the killed process counts as ended")
    process.wait()
    assert life.ended()


def test_nothing_is_known_of_a_process_elsewhere() -> None:
    gone = Incarnation("w", "another-host", 999_999_999, int(time.time()))
    assert not gone.ended()
    assert replace(gone, host=socket.gethostname()).ended()


def test_a_process_of_another_user_that_runs_has_not_ended() -> None:
    init = psutil.Process(1)
    assert os.getpid() != 1
    assert not Incarnation("w", socket.gethostname(), 1, int(init.create_time())).ended()


def test_a_process_counts_by_when_it_was_seen_alive(process: subprocess.Popen[bytes]) -> None:
    now = time.time()
    assert not process_ended(process.pid, alive_at=now)
    assert not process_ended(process.pid, alive_at=now + 3600)
    assert process_ended(process.pid, alive_at=now - 3600)  # what had the id then is not what has it now
    process.kill()
    process.wait()
    assert process_ended(process.pid, alive_at=now)


def test_what_the_system_does_not_tell_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> psutil.Process:
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", refuse)
    assert not process_ended(1, alive_at=time.time())
