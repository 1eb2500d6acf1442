"""Follows every results stream while it exists: `python -m storm.tap SETTINGS.json`.

A commit drops a batch's results, so whoever would count them afterwards has to have read them before. This process
reads them as they come, past the proxy, and writes them down; where it has seen a result for every job of a batch it
leaves a mark, for which that batch's trainer waits before it commits.

Invariant: it judges nothing and writes nothing to the server; every entry it saw is in its journal once.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from storm import journal, wire

#: Seconds between two looks for new streams.
LOOK_S = 0.15

#: Milliseconds that one read waits.
BLOCK_MS = 100

#: Seconds between two tries while the server is away.
AGAIN_S = 0.1


class Tap:
    """What it has seen so far."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._directory = Path(settings["directory"])
        self._pools: list[str] = settings["pools"]
        self._client = wire.direct(settings["port"])
        self._marks = self._directory / "tapped"
        self._marks.mkdir(exist_ok=True)
        self._journal = journal.Journal(self._directory / "tap.jsonl")
        #: Last entry read of each stream, by its key.
        self._cursors: dict[str, str] = {}
        self._present: list[str] = []
        self._seen: dict[str, set[int]] = {}
        self._sizes: dict[str, int] = {}

    def run(self) -> None:
        """Follow until told to stop, then once more to the end."""
        looked = 0.0
        while not (self._directory / "tap-stop").exists():
            try:
                if time.monotonic() - looked > LOOK_S:
                    self._look()
                    looked = time.monotonic()
                self._read(BLOCK_MS)
            except RedisError:
                time.sleep(AGAIN_S)
        self._look()
        while self._read(None):
            pass
        self._journal.sync()
        (self._directory / "tap-done").touch()

    def _look(self) -> None:
        self._present = [key for pool in self._pools for key in wire.keys(self._client, pool, "results")]

    def _read(self, block_ms: int | None) -> bool:
        if not self._present:
            time.sleep(BLOCK_MS / 1000)
            return False
        cursors: dict[Any, Any] = {key: self._cursors.get(key, "0-0") for key in self._present}
        reply: Any = self._client.xread(cursors, count=200, block=block_ms)
        for stream, entries in reply or ():
            key = stream.decode()
            for entry_id, fields in entries:
                self._write(key, entry_id.decode(), fields)
                self._cursors[key] = entry_id.decode()
            self._mark(key)
        return bool(reply)

    def _write(self, key: str, entry_id: str, fields: dict[bytes, bytes]) -> None:
        pool, run, batch = _named(key)
        result = wire.result(fields)
        self._seen.setdefault(key, set()).add(result.index)
        samples = [{"ids": each.ids, "spans": each.spans, "logprobs": each.logprobs} for each in result.samples]
        self._journal.add(
            "result",
            pool=pool,
            run=run,
            batch=batch,
            index=result.index,
            entry=entry_id,
            outcome=result.outcome,
            prompt=result.prompt,
            samples=samples,
            error=result.error[:300],
        )

    def _mark(self, key: str) -> None:
        """Tell that the batch may be committed, once a result of each of its jobs was seen."""
        pool, run, batch = _named(key)
        if key not in self._sizes:
            size: Any = self._client.hget(f"{wire.prefix(pool)}batches:{run}:{batch}", "size")
            if size is None:
                return
            self._sizes[key] = int(size)
        if len(self._seen[key]) >= self._sizes[key]:
            (self._marks / f"{pool}.{run}.{batch}").touch()


def _named(key: str) -> tuple[str, str, str]:
    """Pool, run and batch of a results stream."""
    pool, _, rest = key.removeprefix("rollpool:{").partition("}:results:")
    run, _, batch = rest.partition(":")
    return pool, run, batch


def main() -> None:
    """Read the settings; follow."""
    Tap(json.loads(Path(sys.argv[1]).read_text())).run()


if __name__ == "__main__":
    main()
