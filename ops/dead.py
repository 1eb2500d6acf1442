"""Dead letters: jobs that used up their attempts, and what was no job. To look at, to run again, to throw away.

Invariant: a dead letter that was replayed is on the server as an open batch or as a dead letter, and never as two jobs:
its batch is named after it, so that a replay that was interrupted may be repeated. Nothing is replayed that does not
decode as a job, and nothing is removed that was not replayed or dropped on purpose.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from rollpool.schemas import Keys, PromptJob, SchemaMismatch, SettingsError
from rollpool.schemas.scripts import Entry, Record, enqueue
from rollpool.schemas.wire import pack_model, unpack_job

#: Entries read at once, bodies included.
_PAGE = 100

#: Ids removed by one command.
_DROP_AT_ONCE = 1000

#: The last second of the year 9999, where calendars end.
_LAST_S = 253_402_300_799

_ID = re.compile(r"\d{1,19}-\d{1,19}")
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which dead letters are meant; every condition that is given must hold."""

    run: str | None = None
    batch: str | None = None
    #: Text that the error contains, upper and lower case alike.
    error: str | None = None
    policy: int | None = None
    #: Not older than so many seconds.
    since_s: float | None = None
    #: Not younger than so many seconds.
    before_s: float | None = None
    #: Of the rest, the newest.
    limit: int | None = None

    @property
    def narrows(self) -> bool:
        """True when there is a condition, a limit apart."""
        conditions = (self.run, self.batch, self.error, self.policy, self.since_s, self.before_s)
        return any(condition is not None for condition in conditions)

    def takes(self, letter: "DeadLetter") -> bool:
        """Whether its conditions hold, times apart."""
        return (
            self.run in (None, letter.run)
            and self.batch in (None, letter.batch)
            and (self.error is None or self.error.lower() in letter.error.lower())
            and (self.policy is None or letter.policy == str(self.policy))
        )


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One of them, as its plain fields tell it."""

    id: str
    error: str
    worker: str
    job: str
    run: str
    policy: str
    n: str
    preview: str
    #: What delivery had cost it.
    record: Record
    body: bytes

    @property
    def batch(self) -> str:
        """The batch its job is of."""
        return self.job.partition("/")[0]

    @property
    def at(self) -> datetime:
        """When it died, by the server's clock."""
        # An id that somebody made up may be no time at all.
        return datetime.fromtimestamp(min(int(self.id.partition("-")[0]) / 1000, _LAST_S), UTC)

    @property
    def replay(self) -> str:
        """The batch as which it is enqueued again."""
        return f"replay-{self.id}"

    def decoded(self) -> PromptJob:
        """The job; raises SchemaMismatch when it is none."""
        return unpack_job(self.body)

    def as_dict(self) -> dict[str, Any]:
        """Plain data without the body, for `--json`."""
        record = self.record
        return {
            **{name: getattr(self, name) for name in ("id", "error", "worker", "job", "run", "policy", "n")},
            **{name: getattr(record, name) for name in ("attempts", "faults", "losses", "company", "avoid")},
            "at": self.at.isoformat(timespec="seconds"),
            "preview": self.preview,
            "history": record.history.splitlines(),
        }


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of one of them: `cannot` says why it was left as it is."""

    letter: DeadLetter
    outcome: Literal["replayed", "gone", "cannot"]
    why: str = ""


def seconds_of(option: str, text: str) -> float:
    """Read a duration, as 90s, 2h or 1d12h. Raises SettingsError that names the option."""
    found = _DURATION.findall(text)
    if not found or "".join(number + unit for number, unit in found) != text:
        raise SettingsError(f"{option}: {text!r} is no duration; give a number and s, m, h or d, as 90s, 2h or 1d12h")
    return sum(float(number) * _SECONDS[unit] for number, unit in found)


def select(client: Redis, keys: Keys, selection: Selection) -> Iterator[DeadLetter]:
    """The dead letters that are meant, the newest first."""
    first, last = _range(client, selection)
    taken = 0
    while selection.limit is None or taken < selection.limit:
        reply: Any = client.xrevrange(keys.dead, max=last, min=first, count=_PAGE)
        for entry_id, fields in reply:
            letter = letter_of(entry_id, fields)
            if selection.takes(letter) and (selection.limit is None or taken < selection.limit):
                taken += 1
                yield letter
        if len(reply) < _PAGE:
            return
        last = f"({reply[-1][0].decode()}"


def _range(client: Redis, selection: Selection) -> tuple[str, str]:
    """Ids are times of the server."""
    if selection.since_s is None and selection.before_s is None:
        return "-", "+"
    time: Any = client.time()
    now = time[0] + time[1] / 1e6
    first = "-" if selection.since_s is None else str(max(0, int(1000 * (now - selection.since_s))))
    last = "+" if selection.before_s is None else str(max(0, int(1000 * (now - selection.before_s))))
    return first, last


def find(client: Redis, keys: Keys, ids: Iterable[str]) -> list[DeadLetter]:
    """The dead letters of these ids, in their order.

    Raises:
        SettingsError: one is no id, or no dead letter has it.
    """
    wanted = list(dict.fromkeys(ids))
    for each in wanted:
        if not _ID.fullmatch(each):
            raise SettingsError(
                f"{each!r} is no id of a dead letter: they are as 1732541234567-0, see `rollpool dead list`"
            )
    found = [_fetched(client.xrange(keys.dead, each, each)) for each in wanted]
    if missing := [each for each, letter in zip(wanted, found, strict=True) if letter is None]:
        raise SettingsError(
            f"pool {keys.pool} has no dead letter {', '.join(missing)}: it was replayed or dropped, or is another "
            "pool's; see `rollpool dead list`"
        )
    return [letter for letter in found if letter is not None]


def letter_of(entry_id: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    """Read one entry of the stream, whatever somebody put there."""
    text = {name: fields.get(name.encode(), b"").decode(errors="replace") for name in _TEXTS}
    entry = Entry("", entry_id.decode(), fields)
    if not text["policy"]:  # its entry was gone when it was buried, so these were not known
        with suppress(SchemaMismatch):
            job = unpack_job(entry.body)
            text |= {"policy": str(job.policy_version), "n": str(job.n), "preview": job.preview()}
    return DeadLetter(id=entry.id, record=entry.record, body=entry.body, **text)


_TEXTS = ("error", "worker", "job", "run", "policy", "n", "preview")


async def replay(client: AsyncRedis, keys: Keys, letter: DeadLetter) -> Replayed:
    """Enqueue its job again, as a batch of its own in the same run, and remove the dead letter. May be repeated.

    The deadline is left out, which would be over; a part of a split group becomes a job of its own; samples that were
    finished are made again.
    """
    entry = await client.xrange(keys.dead, letter.id, letter.id)
    if not entry:
        return Replayed(letter, "gone", "it was replayed or dropped meanwhile")
    try:
        job = letter.decoded()
    except SchemaMismatch as error:
        return Replayed(letter, "cannot", f"its payload is no job: {error}")
    again = job.model_copy(update={"batch": letter.replay, "index": 0, "parts": 1, "part": 0, "deadline_ms": None})
    body = pack_model(again)
    answer = await enqueue(
        client,
        keys,
        run=again.run,
        batch=again.batch,
        lane=again.lane,
        content=hashlib.sha256(body).hexdigest(),
        policy=again.policy_version,
        n=again.n,
        previews_and_bodies=[again.preview(), body],
    )
    if answer.answer == "other":
        return Replayed(letter, "cannot", f"run {again.run} has a batch {again.batch} with other content")
    await client.xdel(keys.dead, letter.id)
    return Replayed(letter, "replayed")


def drop(client: Redis, keys: Keys, letters: Sequence[DeadLetter]) -> int:
    """Remove dead letters for good; returns how many were there."""
    ids = [letter.id for letter in letters]
    parts = (ids[first : first + _DROP_AT_ONCE] for first in range(0, len(ids), _DROP_AT_ONCE))
    return sum(int(client.xdel(keys.dead, *part)) for part in parts)


def plain(value: Any) -> Any:
    """What JSON does not carry, as something it does: for `json.dumps(default=)`."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _fetched(reply: Any) -> DeadLetter | None:
    return letter_of(*reply[0]) if reply else None
