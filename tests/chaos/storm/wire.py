"""Reads results streams and job books with nothing but redis-py and msgpack: a second reader of the format.

Invariant: nothing here is the code under test, and nothing here writes to the server.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

#: msgpack ext types of arrays, as the format has them.
_DTYPES = {1: "<i4", 2: "<f4"}

#: Seconds that one question may take: the server is on this machine.
_ASK_S = 5.0


def direct(port: int) -> Redis:
    """A client that goes past the proxy, and tries once: whoever asks knows when to ask again."""
    return Redis(host="127.0.0.1", port=port, socket_timeout=_ASK_S, retry=Retry(NoBackoff(), 0), protocol=2)


def prefix(pool: str) -> str:
    """What all keys of a pool begin with."""
    return f"rollpool:{{{pool}}}:"


def keys(client: Redis, pool: str, kind: str) -> list[str]:
    """The keys `KIND:…` of a pool."""
    # The braces of the hash tag mean nothing to the pattern.
    return sorted({key.decode() for key in client.scan_iter(match=f"{prefix(pool)}{kind}:*", count=2000)})


@dataclass
class Sample:
    """One completion."""

    ids: list[int]
    spans: list[list[int]]
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Result:
    """One entry of a results stream."""

    index: int
    outcome: str
    prompt: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    error: str = ""


def result(fields: Mapping[bytes, bytes]) -> Result:
    """Read one entry; its parts, where it was split, are put together in order."""
    found = Result(int(fields[b"job"].rpartition(b"/")[2]), fields[b"outcome"].decode())
    found.error = fields.get(b"error", b"").decode(errors="replace")
    for group in (_unpacked(body) for body in _bodies(fields)):
        found.prompt = _ints(group["prompt_ids"])
        found.error = found.error or str(group.get("error") or "")
        found.samples += [
            Sample(_ints(each["output_ids"]), [list(span) for span in each["version_spans"]], _floats(each["logprobs"]))
            for each in group["samples"]
        ]
    return found


def _bodies(fields: Mapping[bytes, bytes]) -> Iterator[bytes]:
    if b"body" in fields:
        yield fields[b"body"]
        number = 1
        while (name := f"body:{number}".encode()) in fields:
            yield fields[name]
            number += 1


def _unpacked(body: bytes) -> Any:
    return msgpack.unpackb(body, ext_hook=lambda code, data: np.frombuffer(data, dtype=_DTYPES[code]), raw=False)


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values]


@dataclass(frozen=True)
class Held:
    """Where one job is: in the hands of a consumer."""

    run: str
    job: str
    consumer: str


class Pending:
    """Who holds what in one pool, by what the jobs streams say."""

    def __init__(self, client: Redis, pool: str) -> None:
        self._client = client
        self._pool = pool
        self._names: dict[tuple[str, bytes], tuple[str, str]] = {}

    def read(self) -> list[Held]:
        """Every entry that some consumer holds."""
        streams = [*keys(self._client, self._pool, "jobs"), f"{prefix(self._pool)}retries"]
        with self._client.pipeline(transaction=False) as pipe:
            for stream in streams:
                pipe.xpending_range(stream, "workers", "-", "+", 5000)
            replies = pipe.execute(raise_on_error=False)
        rows = [
            (stream, row["message_id"], row["consumer"].decode())
            for stream, reply in zip(streams, replies, strict=True)
            if isinstance(reply, list)  # else a stream that is not there, or not yet read by anybody
            for row in reply
        ]
        self._learn([(stream, entry) for stream, entry, _ in rows])
        held = []
        for stream, entry, consumer in rows:
            if name := self._names.get((stream, entry)):
                held.append(Held(*name, consumer))
        return held

    def places(self) -> Iterator[str]:
        """Where open jobs are, for people: one line a job that waits or is held, from any release's keys."""
        for each in self.read():
            yield f"{each.run}:{each.job} is held by {each.consumer}"
        for key in sorted(key.decode() for key in self._client.scan_iter(match=f"{prefix(self._pool)}*", count=2000)):
            kind = key.removeprefix(prefix(self._pool)).partition(":")[0]
            if kind in ("delayed", "parked", "exact"):
                members: Any = self._client.zrange(key, 0, 20, withscores=True)
                yield from (f"{member[:80]!r} is {kind} for {score:.0f}" for member, score in members)
            elif kind == "ready":
                names: Any = self._client.lrange(key, 0, 20)
                yield from (f"{name[:80]!r} is ready" for name in names)
            elif kind == "jobs":
                yield f"{key} has {self._client.xlen(key)} entries"

    def outcome(self, run: str, job: str) -> str | None:
        """What is recorded of a job; None when its batch is unknown."""
        batch, _, index = job.partition("#")[0].rpartition("/")
        found: Any = self._client.hget(f"{prefix(self._pool)}batches:{run}:{batch}", index)
        return found.decode() if found else None

    def _learn(self, entries: list[tuple[str, bytes]]) -> None:
        """Read the names of entries that are new."""
        new = [entry for entry in entries if entry not in self._names]
        with self._client.pipeline(transaction=False) as pipe:
            for stream, entry in new:
                pipe.xrange(stream, entry.decode(), entry.decode())
            replies = pipe.execute(raise_on_error=False)
        for known, reply in zip(new, replies, strict=True):
            for _, fields in reply if isinstance(reply, list) else ():  # empty where it was settled since
                self._names[known] = fields[b"run"].decode(), fields[b"job"].decode()
