"""A pool as its scripts see it: what trainers and hosts may call, and an eye of its own on where every job is."""

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import numpy as np
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ResponseError

from rollpool.schemas import GROUP, LANES, Group, Keys, Outcome, PromptJob, Sample, VersionSpan
from rollpool.schemas.connection import connect, connect_async
from rollpool.schemas.result_entry import group_of, size_of
from rollpool.schemas.scripts import (
    READY,
    Enqueued,
    Entry,
    GiveBack,
    Place,
    Pulled,
    Record,
    RunOffer,
    Settled,
    Settlement,
    commit,
    enqueue,
    expire,
    finish,
    give_back,
    mark_read,
    pull,
    reclaim,
    renew,
    settle,
    sweep,
)
from rollpool.schemas.scripts.finish import IDLE_RUN_MS, Swept
from rollpool.schemas.staleness import StalenessRule
from rollpool.schemas.wire import pack_model, unpack_job

Fields = dict[bytes, bytes]

RUN = "run"
#: Places of each run, of which its waiting jobs are members with a score; `delayed` is one for all runs.
SORTED = ("parked", "exact")
HOUR_MS = 3_600_000


class Pool:
    """The scripts, called as trainers and hosts call them."""

    def __init__(self, url: str) -> None:
        self.client: AsyncRedis = connect_async(url)
        #: The same, to look at what the scripts left: its own types are unions over every protocol.
        self.server: Any = self.client
        self.blocking: Redis = connect(url)
        self.keys = Keys("test")

    async def close(self) -> None:
        self.blocking.close()
        await self.client.aclose()

    # What trainers do.

    async def put(
        self,
        size: int = 1,
        *,
        run: str = RUN,
        batch: str = "b",
        lane: str = "default",
        content: str = "content",
        prompt: str = "prompt",
        parts: int = 1,
        n: int = 2,
        policy: int = 5,
        limit: int = 0,
        deadline_ms: int | None = None,
        weight: float | None = None,
        rule: StalenessRule | None = None,
    ) -> Enqueued:
        jobs = [
            PromptJob.model_validate(
                {
                    "run": run,
                    "batch": batch,
                    "index": index,
                    "prompt": prompt,
                    "policy_version": policy,
                    "lane": lane,
                    "n": n,
                    "parts": parts,
                    "part": part,
                    "deadline_ms": deadline_ms,
                }
            )
            for index in range(size)
            for part in range(parts)
        ]
        return await enqueue(
            self.client,
            self.keys,
            run=run,
            batch=batch,
            lane=lane,
            content=content,
            policy=policy,
            n=n,
            parts=parts,
            previews_and_bodies=[part for job in jobs for part in (job.preview(), pack_model(job))],
            backlog_limit=limit,
            deadline_ms=deadline_ms,
            weight=weight,
            rule=rule,
        )

    async def finish(
        self, first: int, last: int, *, run: str = RUN, batch: str = "b", outcome: Outcome = "cancelled"
    ) -> int:
        return await finish(
            self.client, self.keys, run=run, batch=batch, outcome=outcome, error="not wanted", first=first, last=last
        )

    async def mark_read(self, size: int, *, run: str = RUN, batch: str = "b") -> None:
        await mark_read(self.client, self.keys, run=run, batch=batch, size=size)

    async def commit(self, batch: str = "b", *, run: str = RUN) -> int:
        return await commit(self.client, self.keys, run=run, batch=batch)

    async def publish(self, version: int) -> None:
        """Make a checkpoint current, as far as the jobs are concerned."""
        await self.server.set(self.keys.policy, version)

    # What hosts do.

    async def pull(
        self, wanted: int = 10, *, by: str = "a:1", version: int = 5, runs: Sequence[str] = (RUN,), bound: int = 0
    ) -> Pulled:
        """For a host that serves one version to all runs."""
        return await self.pull_offered(
            *(RunOffer(run, version, (version,)) for run in runs), wanted=wanted, by=by, bound=bound
        )

    async def pull_offered(self, *offers: RunOffer, wanted: int = 10, by: str = "a:1", bound: int = 0) -> Pulled:
        return await pull(self.client, self.keys, offers=offers, consumer=by, wanted=wanted, unread_bound=bound)

    async def take(
        self, wanted: int = 10, *, by: str = "a:1", version: int = 5, runs: Sequence[str] = (RUN,)
    ) -> list[Entry]:
        return (await self.pull(wanted, by=by, version=version, runs=runs)).entries

    async def settle(self, *settlements: Settlement) -> list[Settled]:
        return await settle(self.client, self.keys, settlements)

    async def give_back(self, entry: Entry, place: Place = READY, *, by: str = "a:1", **options: Any) -> bool:
        back = GiveBack(**{"entry": entry, "record": entry.record, "place": place, **options})
        [given] = await give_back(self.client, self.keys, consumer=by, jobs=[back])
        return given

    def renew(self, *entries: Entry, by: str = "a:1") -> set[str]:
        lost = set[str]()
        for stream in {entry.stream for entry in entries}:
            mine = [entry for entry in entries if entry.stream == stream]
            lost |= renew(self.blocking, self.keys, stream, consumer=by, entries=mine)
        return lost

    def reclaim(
        self,
        *,
        idle_ms: int = 0,
        by: str = "rescuer:1",
        prefix: str = "",
        reason: str = "lost",
        runs: Sequence[str] = (RUN,),
    ) -> int:
        """One call for each stream of these runs."""
        streams = self.keys.streams(runs)
        calls: Any = {"idle_ms": idle_ms, "caller": by, "prefix": prefix, "reason": reason}
        return sum(reclaim(self.blocking, self.keys, stream, **calls) for stream in streams)

    def expire(self) -> int:
        return expire(self.blocking, self.keys)

    def sweep(self, *served: int, adapters: Iterable[tuple[str, int]] = (), idle_ms: int = IDLE_RUN_MS) -> Swept:
        return sweep(self.blocking, self.keys, served=served, adapters=adapters, idle_ms=idle_ms)

    # What is on the server.

    def lane(self, lane: str = "default", *, run: str = RUN) -> str:
        return self.keys.jobs(run, lane)

    def sorted_sets(self, runs: Sequence[str] = (RUN,)) -> list[tuple[str, str]]:
        """Each place that is a sorted set, and its key."""
        of_runs = [(place, getattr(self.keys, place)(run)) for place in SORTED for run in runs]
        return [("delayed", self.keys.delayed), *of_runs]

    async def outcomes(self, batch: str = "b", *, run: str = RUN) -> dict[str, str]:
        fields = await self.server.hgetall(self.keys.batch(run, batch))
        return {name.decode(): state.decode() for name, state in fields.items() if name.isdigit()}

    async def counters(self, run: str = RUN) -> dict[str, int]:
        """Counts of a run, and nothing of its place among others."""
        fields = await self.server.hgetall(self.keys.run(run))
        others = (b"pass", b"weight", b"touched_ms", b"rule_version", b"rule_jobs")
        return {name.decode(): int(count) for name, count in fields.items() if name not in others}

    async def results(self, batch: str = "b", *, run: str = RUN) -> list[Group]:
        entries = await self.server.xrange(self.keys.results(run, batch))
        return [group_of(run, batch, fields) for _, fields in entries]

    async def dead(self) -> list[dict[bytes, bytes]]:
        return [fields for _, fields in await self.server.xrange(self.keys.dead)]

    async def backlog(self, run: str = RUN) -> int:
        """Entries of lanes that no host has been given."""
        count = 0
        for stream in self.keys.lanes(run):
            if await self.server.exists(stream):
                pending = await self.server.xpending(stream, GROUP)
                count += await self.server.xlen(stream) - int(pending["pending"])
        return count

    async def consumers(self, stream: str) -> set[str]:
        return {row["name"].decode() for row in await self.server.xinfo_consumers(stream, GROUP)}

    async def leave_idle(self, entry: Entry, *, by: str, ms: int) -> None:
        """As if its holder had not renewed for so long."""
        await self.server.xclaim(entry.stream, GROUP, by, 0, [entry.id], idle=ms, justid=True)

    async def pending(self, runs: Iterable[str] = (RUN,)) -> set[tuple[str, str]]:
        """Stream and id of what is in somebody's hands."""
        streams = self.keys.streams(runs)
        async with self.server.pipeline(transaction=False) as pipe:
            for stream in streams:
                pipe.xpending_range(stream, GROUP, "-", "+", 10**6)
            replies = await pipe.execute(raise_on_error=False)
        found = set[tuple[str, str]]()
        for stream, rows in zip(streams, replies, strict=True):
            if isinstance(rows, ResponseError):
                assert "NOGROUP" in str(rows)  # it is no stream yet, or none any more
            else:
                found |= {(stream, row["message_id"].decode()) for row in rows}
        return found

    async def now_ms(self) -> int:
        seconds, micros = await self.server.time()
        return int(seconds) * 1000 + int(micros) // 1000

    async def places(self, runs: Sequence[str] = (RUN,)) -> dict[tuple[str, str], list[str]]:
        """Where every job is: run and job -> the places that have it, with how they have it.

        Told from the keys alone, by other code than the scripts'.
        """
        found: dict[tuple[str, str], list[str]] = {}
        pending = await self.pending(runs)
        streams, lanes = self.keys.streams(runs), [(run, lane) for run in runs for lane in LANES]
        async with self.server.pipeline(transaction=False) as pipe:
            for stream in streams:
                pipe.xrange(stream)
            for run, lane in lanes:
                pipe.lrange(self.keys.ready(run, lane), 0, -1)
            for _, key in self.sorted_sets(runs):
                pipe.zrange(key, 0, -1)
            pipe.hgetall(self.keys.waiting)
            replies = iter(await pipe.execute())
        for stream in streams:
            for entry_id, fields in next(replies):
                piece = (fields[b"run"].decode(), fields[b"job"].decode())
                held = (stream, entry_id.decode()) in pending
                # What nobody holds in `retries`, nobody will ever see.
                where = "held" if held else "unseen" if stream == self.keys.retries else "backlog"
                found.setdefault(piece, []).append(where)
        names: list[tuple[str, bytes]] = []
        for run, lane in lanes:
            names += [("ready", name) for name in next(replies) if name.startswith(f"{run}:{lane}:".encode())]
        for place, _ in self.sorted_sets(runs):
            names += [(place, name) for name in next(replies)]
        waiting = {name: _piece(packed) for name, packed in next(replies).items()}
        for place, name in names:
            if name in waiting:  # else a tombstone
                found.setdefault(waiting[name], []).append(place)
        for name in waiting.keys() - {name for _, name in names}:
            found.setdefault(waiting[name], []).append("nowhere")
        return found

    async def check(self, *batches: str, run: str = RUN, parts: int = 1) -> None:
        """Promise 1, as far as the server shows it, for all uncommitted batches of a run: see `check_runs`."""
        await self.check_runs({run: dict.fromkeys(batches, parts)})

    async def check_runs(self, runs: dict[str, dict[str, int]], committed: Iterable[tuple[str, str]] = ()) -> None:
        """Counters agree with states, every open piece is in one place, every settled job has one result.

        Args:
            runs: of each run, all its batches and the parts of their jobs.
            committed: run and batch.
        """
        places = await self.places(list(runs))
        waiting = {_piece(packed) for packed in (await self.server.hgetall(self.keys.waiting)).values()}
        open_pieces = set[tuple[str, str]]()
        for run, batches in runs.items():
            total, unread = Counter[str](), 0
            for batch, parts in batches.items():
                facts, entries, finished = await self._look_at(run, batch)
                states = {name.decode(): state.decode() for name, state in facts.items() if name.isdigit()}
                total += Counter(states.values())
                if (run, batch) in committed:
                    assert not entries
                    assert not finished
                    continue
                unread += _check_batch(facts, entries, states)
                open_pieces |= _open_pieces(run, batch, parts, states, finished)
            counters = Counter(await self.counters(run))
            assert counters["enqueued"] == total.total()
            assert {name: counters[name] for name in total} == total
            assert counters["open"] == total["open"]
            assert counters["unread"] == unread
        assert {piece: places.get(piece, []) for piece in open_pieces if len(places.get(piece, [])) != 1} == {}
        assert not any(place in ("nowhere", "unseen") for where in places.values() for place in where)
        assert waiting <= open_pieces

    async def _look_at(self, run: str, batch: str) -> tuple[Fields, list[Fields], set[str]]:
        """States and counts of a batch, its results, its finished parts."""
        async with self.server.pipeline(transaction=False) as pipe:
            pipe.hgetall(self.keys.batch(run, batch))
            pipe.xrange(self.keys.results(run, batch))
            pipe.hkeys(self.keys.parts(run, batch))
            facts, entries, parts = await pipe.execute()
        return facts, [fields for _, fields in entries], {name.decode() for name in parts}


def _check_batch(facts: Fields, entries: list[Fields], states: dict[str, str]) -> int:
    """One result a settled job, and counts that say so; returns the unread bytes."""
    counts = Counter(states.values())
    assert {name: int(facts.get(name.encode(), 0)) for name in counts} == counts
    assert int(facts[b"open"]) == counts["open"]
    results = [(fields[b"job"].decode().rpartition("/")[2], fields[b"outcome"].decode()) for fields in entries]
    assert sorted(results) == sorted((index, state) for index, state in states.items() if state != "open")
    size = sum(map(size_of, entries))
    assert int(facts.get(b"bytes", 0)) == size
    read = int(facts.get(b"read", 0))
    assert 0 <= read <= size
    return size - read


def _open_pieces(run: str, batch: str, parts: int, states: dict[str, str], finished: set[str]) -> set[tuple[str, str]]:
    open_jobs = [index for index, state in states.items() if state == "open"]
    assert {name.partition("#")[0] for name in finished} <= set(open_jobs)
    if parts == 1:
        return {(run, f"{batch}/{index}") for index in open_jobs}
    pieces = {f"{index}#{part}" for index in open_jobs for part in range(parts)}
    return {(run, f"{batch}/{piece}") for piece in pieces - finished}


def _piece(packed: bytes) -> tuple[str, str]:
    flat = iter(msgpack.unpackb(packed, raw=True))
    fields = dict(zip(flat, flat, strict=True))
    return fields[b"run"].decode(), fields[b"job"].decode()


def ended(
    entry: Entry, outcome: Outcome = "ok", *, worker: str = "a", dead: str = "", tokens: int = 3, version: int = 5
) -> Settlement:
    """A job's settlement, with one sample where it is ok."""
    job = unpack_job(entry.body)
    sample = Sample(
        output_ids=np.arange(tokens, dtype=np.int32),
        logprobs=np.zeros(tokens, np.float32),
        text=f"part {job.part}",
        finish_reason="stop",
        version_spans=(VersionSpan(version, 0, tokens),),
    )
    group = Group(
        run=job.run,
        batch=job.batch,
        index=job.index,
        outcome=outcome,
        policy_version=job.policy_version,
        prompt_ids=np.zeros(1, np.int32),
        samples=(sample,) if outcome == "ok" else (),
        sampling=job.sampling,
        worker=worker,
    )
    return Settlement(entry, group, dead, job.part)


def jobs_of(entries: Iterable[Entry]) -> list[str]:
    return [entry.job for entry in entries]


def with_record(entry: Entry, **changes: Any) -> Record:
    """What an entry carries, but for some of it."""
    return Record(**{**{name: getattr(entry.record, name) for name in Record.__slots__}, **changes})


@asynccontextmanager
async def heard(pool: Pool) -> AsyncIterator[Any]:
    """The channel of ended batches, subscribed."""
    channel: Any = pool.server.pubsub(ignore_subscribe_messages=True)
    await channel.subscribe(pool.keys.ended)
    assert await channel.get_message(timeout=10) is None  # the subscription itself
    try:
        yield channel
    finally:
        await channel.aclose()


async def next_of(channel: Any) -> bytes:
    message = await channel.get_message(timeout=10)
    assert message is not None
    data: bytes = message["data"]
    return data
