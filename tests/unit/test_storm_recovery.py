"""When the storm counts a killed worker's job as recovered."""

import sys
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError
from waiting import until_blocking

sys.path.append(str(Path(__file__).parents[1] / "chaos"))

from storm.recovery import Recovery
from storm.wire import Held, Pending


class Books(Pending):
    """A server that says what a test says."""

    def __init__(self):
        self.held: list[Held] = []
        self.outcomes: dict[tuple[str, str], str] = {}
        self.away = False
        self.looks = 0

    def read(self):
        self.looks += 1
        if self.away:
            raise ConnectionError("gone")
        return list(self.held)

    def outcome(self, run, job):
        return self.outcomes.get((run, job))


@pytest.fixture
def books():
    return Books()


@pytest.fixture
def recovery(books):
    watching = Recovery(books)
    watching.start()
    yield watching
    watching.finish()


def looked(books):
    before = books.looks
    until_blocking(lambda: books.looks >= before + 2, "two looks")


def test_a_job_is_back_when_another_consumer_holds_it_or_it_is_settled(books, recovery):
    books.held = [Held("r", "b/0", "w-1:dead"), Held("r", "b/1", "w-1:dead"), Held("r", "b/2", "w-1:dead")]
    recovery.killed(list(books.held), at=0.0)
    looked(books)
    assert not recovery.seconds
    books.held = [Held("r", "b/0", "w-1:reborn"), Held("r", "b/1", "w-1:dead")]
    books.outcomes["r", "b/2"] = "ok"
    until_blocking(lambda: len(recovery.seconds) == 2, "two are back")
    assert recovery.missing == ["r:b/1"]


def test_a_job_that_waits_for_a_host_is_not_back(books, recovery):
    recovery.killed([Held("r", "b/0", "w-1:dead")], at=0.0)
    books.outcomes["r", "b/0"] = "open"
    looked(books)
    assert not recovery.seconds


def test_a_server_that_is_away_ends_no_watch(books, recovery):
    books.away = True
    recovery.killed([Held("r", "b/0", "w-1:dead")], at=0.0)
    looked(books)
    books.away = False
    books.held = [Held("r", "b/0", "w-2:alive")]
    until_blocking(lambda: len(recovery.seconds) == 1, "it is back")
