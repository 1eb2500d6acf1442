"""What a pool of a few hosts and trainers may do, in any order, against what the promises say becomes of every job."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from delivery import HOUR_MS, Pool, ended
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rollpool.schemas import LANES, OUTCOMES
from rollpool.schemas.scripts import (
    PART,
    READY,
    Enqueued,
    Entry,
    Place,
    Record,
    RunOffer,
    Settled,
    delayed,
    exact,
    parked,
    passed,
)

T = TypeVar("T")

RUNS = ("one", "two")
HOSTS = ("a:1", "b:1", "c:1")
#: The current checkpoint, and the current adapter of the second run; exact jobs of versions before it can become stale.
CURRENT = 7
CURRENT_OF = {RUNS[0]: CURRENT, RUNS[1]: 8}
VERSIONS = range(5, 9)
#: Times of the server: over before it began, and never.
PAST_MS, NEVER_MS = 1, 10**15
#: As in reclaim.lua: the company after the third lost worker.
SMALL = 8

hosts = st.sampled_from(HOSTS)
picks = st.integers(0, 10**6)
versions = st.sampled_from(VERSIONS)
#: What a host serves to each run: a checkpoint, that and adapters of the run, or nothing.
offers = st.fixed_dictionaries(
    {run: st.sampled_from([[7], [5], [8], [5, 7], [6, 8], [5, 6, 7], [5, 6, 7, 8], []]) for run in RUNS}
)
places = st.one_of(
    st.just(READY),
    st.sampled_from([delayed(PAST_MS), delayed(NEVER_MS)]),
    st.builds(parked, versions),
    st.builds(exact, versions),
    st.just(passed(NEVER_MS)),
)

#: Steps, as a method of the model and its arguments. One rule for all of them: hypothesis leaves whole rules out of
#: a run, and a run in which nobody pulls tests nothing.
enqueues = st.tuples(
    st.just("enqueue"),
    st.sampled_from(RUNS),
    st.sampled_from(LANES),
    st.integers(1, 4),
    st.sampled_from([1, 1, 2, 3]),
    st.sampled_from([None, None, PAST_MS, NEVER_MS]),
    st.sampled_from([None, 0.5, 3.0]),
)
pulls = st.tuples(
    st.just("pull"),
    hosts,
    st.sampled_from([3, 1, 6, 6, 0]),
    offers,
    st.sampled_from([0, 0, 0, 300]),
    st.sampled_from([False, False, True]),
)
returns = st.tuples(st.just("give_back"), picks, places)
others = [st.tuples(st.just(name), picks) for name in ("settle", "settle", "cancel", "commit", "read")]
leases = [st.tuples(st.just(name), hosts) for name in ("reclaim", "renew")]
adapters = st.sets(st.tuples(st.sampled_from(RUNS), versions), max_size=4)
ends = [
    st.tuples(st.just("expire")),
    st.tuples(st.just("sweep"), st.sets(versions, max_size=2), adapters, st.booleans()),
]
steps = st.one_of(pulls, pulls, pulls, returns, returns, *others, *leases, *ends, enqueues)

#: A run and a job of it, or a part of one.
Piece = tuple[str, str]


def worker_of(host: str) -> str:
    """Whose consumer it is."""
    return host.partition(":")[0]


@dataclass(eq=False)
class Batch:
    """What one call enqueued."""

    run: str
    name: str
    size: int
    parts: int
    lane: str
    deadline_ms: int | None
    committed: bool = False

    def job(self, index: int) -> Piece:
        return (self.run, f"{self.name}/{index}")

    def pieces(self, index: int) -> list[Piece]:
        run, job = self.job(index)
        return [(run, job)] if self.parts == 1 else [(run, f"{job}#{part}") for part in range(self.parts)]


@dataclass(eq=False)
class Delivery:
    """One delivery of a piece to a host."""

    entry: Entry
    piece: Piece
    host: str
    #: The server counts it as this host's, until it is settled, given back or reclaimed.
    held: bool = True
    #: False when the reply was lost: the host never knew of it.
    known: bool = True


class Model(RuleBasedStateMachine):
    """Hosts settle and give back what they remember, also what was taken from them long ago."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.pool = Pool(url)
        self.pool.blocking.flushall()
        self.batches: list[Batch] = []
        self.states: dict[Piece, str] = {}
        #: Parts that are finished, of groups that are open.
        self.finished: set[Piece] = set()
        self.records: dict[Piece, Record] = {}
        #: Where a piece was put to wait.
        self.waits: dict[Piece, Place] = {}
        self.deliveries: list[Delivery] = []

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def teardown(self) -> None:
        try:
            self.finish_everything()
        finally:
            self.run(self.pool.close())
            self.runner.close()

    # What is known of a piece.

    def job_of(self, piece: Piece) -> Piece:
        return (piece[0], piece[1].partition("#")[0])

    def batch_of(self, piece: Piece) -> Batch:
        name = piece[1].partition("/")[0]
        return next(batch for batch in self.batches if (batch.run, batch.name) == (piece[0], name))

    def is_open(self, piece: Piece) -> bool:
        return self.states[self.job_of(piece)] == "open" and piece not in self.finished

    def end_job(self, batch: Batch, index: int, outcome: str) -> None:
        self.states[batch.job(index)] = outcome
        self.finished -= set(batch.pieces(index))

    def open_indexes(self, batch: Batch) -> list[int]:
        return [index for index in range(batch.size) if self.states[batch.job(index)] == "open"]

    def chosen(self, pick: int) -> list[Delivery]:
        """One delivery, if there is any; mostly one that the host still holds: the others are many more."""
        known = [delivery for delivery in self.deliveries if delivery.known]
        held = [delivery for delivery in known if delivery.held]
        candidates = held if held and pick % 4 != 3 else known
        return [candidates[pick % len(candidates)]] if candidates else []

    # Steps.

    @initialize()
    def begin(self) -> None:
        self.run(self.pool.publish(CURRENT))
        self.pool.blocking.set(self.pool.keys.run_policy(RUNS[1]), CURRENT_OF[RUNS[1]])
        for run in RUNS:
            for parts, lane in enumerate(LANES, start=1):
                self.enqueue(run, lane, 2, parts, None, None)
        # Some wait from the beginning: the steps alone would seldom let one wait and then meet it.
        self.pull(HOSTS[0], 16, {run: [CURRENT] for run in RUNS}, 0, False)
        for version in VERSIONS:
            for place in (parked(version), exact(version), exact(version), delayed(NEVER_MS)):
                self.give_back(0, place)

    @rule(step=steps)
    def do(self, step: tuple[Any, ...]) -> None:
        getattr(self, step[0])(*step[1:])

    def enqueue(
        self, run: str, lane: str, size: int, parts: int, deadline_ms: int | None, weight: float | None
    ) -> None:
        batch = Batch(run, f"{lane}-{len(self.batches)}", size, parts, lane, deadline_ms)
        for answer in ("new", "same"):
            call = self.pool.put(
                size, run=run, batch=batch.name, lane=lane, parts=parts, deadline_ms=deadline_ms, weight=weight
            )
            assert self.run(call) == Enqueued(answer, size)
        self.batches.append(batch)
        for index in range(size):
            self.states[batch.job(index)] = "open"
            self.records |= dict.fromkeys(batch.pieces(index), Record())

    def is_due(self, piece: Piece, where: str, host: str, served: list[int]) -> bool:
        """It may be taken by this host, which serves these versions to its run."""
        wait = self.waits.get(piece, READY)
        if where == "parked":
            return bool(served) and wait.score <= served[-1]
        if where == "exact":
            return wait.score in served
        if where == "delayed":
            return wait.score == PAST_MS or self.is_passed_to(host, piece)
        return where in ("backlog", "ready")

    def is_passed_to(self, host: str, piece: Piece) -> bool:
        """It was left to this host."""
        return self.waits.get(piece, READY).name == "passed" and self.records[piece].passed == worker_of(host)

    def pull(self, host: str, wanted: int, served: dict[str, list[int]], bound: int, reply_lost: bool) -> None:
        before = self.run(self.pool.places(RUNS))
        unread = {run: self.run(self.pool.counters(run)).get("unread", 0) for run in RUNS}
        offered = [RunOffer(run, max(versions, default=None), tuple(versions)) for run, versions in served.items()]
        pulled = self.run(self.pool.pull_offered(*offered, wanted=wanted, by=host, bound=bound))
        after = self.run(self.pool.places(RUNS))
        assert pulled.full == {run for run in RUNS if served[run] and bound and unread[run] >= bound}
        eligible = {
            piece
            for piece, [where, *_] in before.items()
            if self.is_open(piece) and self.is_due(piece, where, host, served[piece[0]])
            if served[piece[0]] and piece[0] not in pulled.full
        }
        taken = [(entry.run, entry.job) for entry in pulled.entries]
        assert len(set(taken)) == len(taken) <= min(wanted, len(eligible))
        # Of what was left to it a call looks at no more than it takes, whichever of it may run.
        left = {piece for piece in eligible if before[piece] == ["delayed"] and self.is_passed_to(host, piece)}
        assert len(taken) >= min(wanted, len(eligible - left))
        assert set(taken) <= eligible
        for piece, [where, *_] in after.items():  # what became due and was not taken is first in its lane now
            if self.is_open(piece) and piece not in taken and [where] != before[piece]:
                assert where == "ready"
                assert self.is_due(piece, before[piece][0], host, served[piece[0]])
        self.look_at_order(pulled.entries, before, after)
        for piece, entry in zip(taken, pulled.entries, strict=True):
            assert entry.record == self.records[piece]
            self.deliveries.append(Delivery(entry, piece, host, known=not reply_lost))

    def look_at_order(
        self, entries: list[Entry], before: dict[Piece, list[str]], after: dict[Piece, list[str]]
    ) -> None:
        pieces = [(entry.run, entry.job) for entry in entries]
        lanes = [LANES.index(self.batch_of(piece).lane) for piece in pieces]
        assert lanes == sorted(lanes)
        from_backlog = {(piece[0], self.batch_of(piece).lane) for piece in pieces if before[piece] == ["backlog"]}
        left_ready = {
            (piece[0], self.batch_of(piece).lane)
            for piece, where in after.items()
            if where == ["ready"] and self.is_open(piece)
        }
        assert not from_backlog & left_ready

    def settle(self, pick: int) -> None:
        for delivery in self.chosen(pick):
            outcome = "ok" if pick % 3 else OUTCOMES[pick // 3 % len(OUTCOMES)]
            self.settled(delivery, outcome)
            delivery.held = False

    def settled(self, delivery: Delivery, outcome: str) -> None:
        settlement = ended(delivery.entry, outcome, worker=delivery.host)  # type: ignore[arg-type]
        assert self.run(self.pool.settle(settlement)) == [self.expected(delivery.piece, outcome)]

    def expected(self, piece: Piece, outcome: str) -> Settled:
        """What settling a piece answers; the model changes with it."""
        batch, job = self.batch_of(piece), self.job_of(piece)
        if self.states[job] != "open":
            return Settled(False, self.states[job])
        index = int(job[1].rpartition("/")[2])
        if batch.parts > 1 and outcome == "ok":
            new = piece not in self.finished
            self.finished.add(piece)
            if not self.finished.issuperset(batch.pieces(index)):
                return Settled(new, PART)
        self.end_job(batch, index, outcome)
        return Settled(True, outcome)

    def cancel(self, pick: int) -> None:
        batch = self.batches[pick % len(self.batches)]
        first, last = pick % batch.size, pick % 7
        chosen = [index for index in self.open_indexes(batch) if first <= index <= last]
        assert self.run(self.pool.finish(first, last, run=batch.run, batch=batch.name)) == len(chosen)
        for index in chosen:
            self.end_job(batch, index, "cancelled")

    def expire(self) -> None:
        due = [batch for batch in self.batches if batch.deadline_ms == PAST_MS]
        chosen = [(batch, index) for batch in due for index in self.open_indexes(batch)]
        assert self.pool.expire() == len(chosen)
        for batch, index in chosen:
            self.end_job(batch, index, "expired")

    def sweep(self, served: set[int], adapters: set[tuple[str, int]], tidy: bool) -> None:
        waiting = self.run(self.pool.places(RUNS))
        old = {
            piece: self.waits[piece].score
            for piece, where in waiting.items()
            if where == ["exact"] and self.waits[piece].score < CURRENT_OF[piece[0]]
        }
        stale = {
            self.job_of(piece)
            for piece, version in old.items()
            if version not in served and (piece[0], version) not in adapters
        }
        assert self.pool.sweep(*served, adapters=adapters, idle_ms=-1 if tidy else HOUR_MS).ended == len(stale)
        for job in stale:
            self.end_job(self.batch_of(job), int(job[1].rpartition("/")[2]), "stale")
        known = {name.decode() for name in self.run(self.pool.server.smembers(self.pool.keys.runs))}
        needed = {run for run in RUNS for batch in self.batches if batch.run == run and not batch.committed}
        assert needed <= known

    def commit(self, pick: int) -> None:
        batch = self.batches[pick % len(self.batches)]
        left = len(self.open_indexes(batch))
        assert self.run(self.pool.commit(batch.name, run=batch.run)) == left
        batch.committed |= left == 0

    def read(self, pick: int) -> None:
        batch = self.batches[pick % len(self.batches)]
        self.run(self.pool.mark_read(pick % 2000, run=batch.run, batch=batch.name))

    def give_back(self, pick: int, place: Place) -> None:
        for delivery in self.chosen(pick):
            record = replace(delivery.entry.record, attempts=pick % 5, company=(None, 1, 9)[pick % 3], avoid="x")
            if place.name == "passed":
                record = replace(record, passed=worker_of(HOSTS[pick % len(HOSTS)]))
            given = self.run(self.pool.give_back(delivery.entry, place, by=delivery.host, record=record))
            assert given == (delivery.held and self.is_open(delivery.piece))
            delivery.held = False
            if given:
                self.records[delivery.piece] = record
                self.waits[delivery.piece] = place

    def reclaim(self, host: str) -> None:
        lost = [delivery for delivery in self.deliveries if delivery.held and delivery.host == host]
        assert self.pool.reclaim(prefix=host, runs=RUNS, reason="lost") == len(lost)
        # Stream by stream, as the call above goes.
        for stream in self.pool.keys.streams(RUNS):
            mine = [delivery for delivery in lost if delivery.held and delivery.entry.stream == stream]
            alone = sum(delivery.held for delivery in lost) == 1
            for delivery in mine:
                delivery.held = False
                if self.is_open(delivery.piece):
                    self.records[delivery.piece] = self.charged(delivery.entry.record, host, alone)
                    self.waits[delivery.piece] = READY

    def charged(self, record: Record, host: str, alone: bool) -> Record:
        losses, company = record.losses + 1, record.company
        if losses >= 3:
            company = 1 if losses > 3 else min(company or SMALL, SMALL)
        return Record(
            attempts=record.attempts + (record.company != 1),
            faults=record.faults + (record.company == 1 and alone),
            losses=losses,
            company=company,
            avoid=worker_of(host),
            history=f"{record.history}lost\n",
            passed=record.passed,
        )

    def renew(self, host: str) -> None:
        mine = [delivery for delivery in self.deliveries if delivery.host == host]
        lost = {
            (delivery.entry.stream, delivery.entry.id)
            for delivery in mine
            if not (delivery.held and self.is_open(delivery.piece))
        }
        for stream in self.pool.keys.streams(RUNS):
            entries = [delivery.entry for delivery in mine if delivery.entry.stream == stream]
            expected = {entry_id for name, entry_id in lost if name == stream}
            assert self.pool.renew(*entries, by=host) == expected
        for delivery in mine:
            delivery.held &= self.is_open(delivery.piece)

    # What must hold.

    def finish_everything(self) -> None:
        """Hosts are lost, everything that waits comes due, and one host does it all."""
        for host in HOSTS:
            self.reclaim(host)
        self.run(self.everything_is_due())
        while entries := self.run(self.pool.take(6, by=HOSTS[0], version=10**6, runs=RUNS)):
            for entry in entries:
                piece = (entry.run, entry.job)
                assert self.is_open(piece)
                self.settled(Delivery(entry, piece, HOSTS[0]), "ok")
        assert "open" not in self.states.values()
        for batch in self.batches:
            assert self.run(self.pool.commit(batch.name, run=batch.run)) == 0
            batch.committed = True
        self.every_job_is_settled_once_or_open_in_one_place()
        assert self.run(self.pool.places(RUNS)) == {}
        assert self.pool.expire() == 0
        assert self.pool.sweep(idle_ms=-1).ended == 0
        self.nothing_is_left()

    async def everything_is_due(self) -> None:
        server = self.pool.server
        for place, key in self.pool.sorted_sets(RUNS):
            for name in await server.zrange(key, 0, -1) if place != "parked" else ():
                await server.zadd(key, {name: 0 if place == "delayed" else 10**6}, xx=True)

    def nothing_is_left(self) -> None:
        """But what is remembered for a while, and the pool's own."""
        names = {name.decode() for name in self.run(self.pool.server.keys("*"))}
        keys = self.pool.keys
        remembered = {keys.batch(batch.run, batch.name) for batch in self.batches}
        remembered |= {keys.run(run) for run in RUNS}
        remembered |= names & {keys.passed(worker_of(host)) for host in HOSTS}
        assert all(self.run(self.pool.server.ttl(name)) > 0 for name in names & remembered)
        assert names - remembered <= {keys.retries, keys.fair, keys.policy, keys.run_policy(RUNS[1])}

    @invariant()
    def every_job_is_settled_once_or_open_in_one_place(self) -> None:
        runs: dict[str, dict[str, int]] = {run: {} for run in RUNS}
        for batch in self.batches:
            runs[batch.run][batch.name] = batch.parts
        self.run(self.pool.check_runs(runs, [(batch.run, batch.name) for batch in self.batches if batch.committed]))

    @invariant()
    def the_server_says_what_became_of_each_job(self) -> None:
        assert self.run(self.outcomes()) == self.states

    async def outcomes(self) -> dict[Piece, str]:
        async with self.pool.server.pipeline(transaction=False) as pipe:
            for batch in self.batches:
                pipe.hmget(self.pool.keys.batch(batch.run, batch.name), range(batch.size))
            replies = await pipe.execute()
        return {
            batch.job(index): state.decode()
            for batch, states in zip(self.batches, replies, strict=True)
            for index, state in enumerate(states)
        }

    @invariant()
    def the_server_counts_as_held_what_was_delivered(self) -> None:
        held = {(delivery.entry.stream, delivery.entry.id) for delivery in self.deliveries if delivery.held}
        assert self.run(self.pool.pending(RUNS)) == held
