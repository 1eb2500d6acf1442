"""A pool on a real server as the keepers of leases see it: jobs, who holds them, and since when without renewal."""

import time
from collections.abc import Callable
from typing import Any

import msgpack
from fakes import job
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ConnectionError

from rollpool.schemas import GROUP, Keys
from rollpool.schemas.connection import connect
from rollpool.schemas.scripts import READY, Entry, GiveBack, Place, Record, RunOffer, enqueue, give_back, pull
from rollpool.schemas.wire import pack_model
from rollpool.worker.incarnation import Incarnation
from rollpool.worker.leases import LeaseKeeper
from rollpool.worker.sweeper import Sweeper

#: Short enough to wait for, and long enough for a loaded machine to renew in time.
LEASE_S = 1.0

ME = Incarnation.current("me")

RUN = "r"


class Clock:
    """Monotonic seconds, by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Flaky:
    """A client of a server that can be out of reach."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self.reachable = True

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if not self.reachable:
                raise ConnectionError("out of reach")
            return getattr(self._client, name)(*args, **options)

        return call


class Scene:
    """What one test sees."""

    def __init__(self, url: str, client: AsyncRedis, keys: Keys) -> None:
        self.url = url
        self.blocking = connect(url)
        self.server: Any = self.blocking
        self.client = client
        self.keys = keys
        self.streams = keys.streams([RUN])
        self.lost: list[Entry] = []
        self.bugs: list[BaseException] = []

    def close(self) -> None:
        self.blocking.close()

    async def put(self, count: int, *, batch: str = "b", **options: Any) -> None:
        jobs = [job(index, batch=batch) for index in range(count)]
        bodies = [part for made in jobs for part in (made.preview(), pack_model(made))]
        given: Any = {"run": RUN, "batch": batch, "lane": "default", "content": "c", "policy": 0, "n": 1, **options}
        await enqueue(self.client, self.keys, previews_and_bodies=bodies, **given)

    async def take(self, by: str, wanted: int = 100, *, version: int = 0) -> list[Entry]:
        offers = [RunOffer(RUN, version, (version,))]
        pulled = await pull(self.client, self.keys, offers=offers, consumer=by, wanted=wanted)
        return pulled.entries

    async def give_back(self, entry: Entry, *, by: str, place: Place = READY, record: Record | None = None) -> None:
        back = GiveBack(entry=entry, record=record or entry.record, place=place)
        assert await give_back(self.client, self.keys, consumer=by, jobs=[back]) == [True]

    async def take_with(self, by: str, *records: Record) -> list[Entry]:
        """Enqueue as many jobs, which have cost so much before, and take them."""
        await self.put(len(records))
        entries = await self.take("before:h@1-1")
        for entry, record in zip(entries, records, strict=True):
            await self.give_back(entry, by="before:h@1-1", record=record)
        return await self.take(by)

    def keeper(
        self,
        *,
        me: Incarnation = ME,
        client: Any = None,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> LeaseKeeper:
        return LeaseKeeper(
            client or self.blocking,
            self.keys,
            me,
            lease_s=lease_s,
            on_lost=self.lost.extend,
            on_bug=self.bugs.append,
            clock=clock,
        )

    def sweeper(
        self, *, me: Incarnation = ME, lease_s: float = LEASE_S, wall_clock: Callable[[], float] = time.time
    ) -> Sweeper:
        return Sweeper(self.blocking, self.keys, me, lease_s=lease_s, wall_clock=wall_clock)

    def pending(self, consumer: str | None = None) -> dict[tuple[str, str], dict[str, Any]]:
        """What is in hosts' hands, by stream and entry id."""
        return {
            (stream, row["message_id"].decode()): row
            for stream in self.streams
            if GROUP.encode() in [group["name"] for group in self.groups(stream)]
            for row in self.server.xpending_range(stream, GROUP, "-", "+", 10_000, consumer)
        }

    def groups(self, stream: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.server.xinfo_groups(stream) if self.server.exists(stream) else []
        return found

    def holders(self) -> dict[str, int]:
        """How many jobs each consumer holds, where it holds any."""
        held: dict[str, int] = {}
        for row in self.pending().values():
            name = row["consumer"].decode()
            held[name] = held.get(name, 0) + 1
        return held

    def age(self, consumer: str, milliseconds: int) -> None:
        """Make what a consumer holds look as if it was not renewed for so long."""
        for stream, entry in self.pending(consumer):
            self.server.xclaim(stream, GROUP, consumer, 0, [entry], idle=milliseconds, justid=True)

    def idle_ms(self, consumer: str) -> int:
        return int(max(row["time_since_delivered"] for row in self.pending(consumer).values()))

    def records(self) -> dict[str, Record]:
        """What delivery has cost the jobs that wait off their lanes."""
        found = {}
        for packed in self.server.hvals(self.keys.waiting):
            flat = iter(msgpack.unpackb(packed, raw=True))
            fields = dict(zip(flat, flat, strict=True))
            found[fields[b"job"].decode()] = Record.of(fields)
        return found

    def state(self, index: int = 0, *, batch: str = "b") -> str:
        """Of one job: open, or its outcome."""
        return str(self.server.hget(self.keys.batch(RUN, batch), index).decode())

    def another_turn(self) -> None:
        """Let the next host look for what others lost at once."""
        self.server.delete(self.keys.sweep)
