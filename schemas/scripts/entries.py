"""An entry of a jobs stream, as a host holds it, and what delivery has cost its job so far.

Invariant: an `Entry` is what was on the stream, unjudged; whether its body is a job is decided by the puller, so that
entries anyone could add by hand harm nobody. Counts that somebody made up are read as none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Fields of an entry that are read here; the others (`policy`, `n`, `preview`) are for people and for the scripts.
JOB, RUN, BODY = b"job", b"run", b"body"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What delivery has cost one job so far; carried by its entry wherever it goes."""

    #: Losses charged to the infrastructure: a worker that died, a connection that broke.
    attempts: int = 0
    #: Losses charged to the job: an engine that died of it alone.
    faults: int = 0
    #: Losses for whatever reason.
    losses: int = 0
    #: Jobs that may be in one engine while it runs, itself included; None: as many as there is room for.
    company: int | None = None
    #: The worker that lost it last: another one is to try it, where there is one.
    avoid: str = ""
    #: A line for each loss, the last ones.
    history: str = ""
    #: The worker that it was left to for its cache, once, or that had it already; empty: nobody was asked yet.
    passed: str = ""

    def fields(self) -> dict[str, str | int]:
        """As fields of an entry."""
        company = "" if self.company is None else self.company
        return {
            "attempts": self.attempts,
            "faults": self.faults,
            "losses": self.losses,
            "company": company,
            "avoid": self.avoid,
            "history": self.history,
            "passed": self.passed,
        }

    @classmethod
    def of(cls, fields: dict[bytes, bytes]) -> "Record":
        """Read from the fields of an entry."""
        if fields.keys().isdisjoint(_CARRIED):  # most jobs are never lost
            return _FRESH
        return cls(
            attempts=_count(fields.get(b"attempts")),
            faults=_count(fields.get(b"faults")),
            losses=_count(fields.get(b"losses")),
            company=_count(fields.get(b"company")) or None,
            avoid=fields.get(b"avoid", b"").decode(errors="replace"),
            history=fields.get(b"history", b"").decode(errors="replace"),
            passed=fields.get(b"passed", b"").decode(errors="replace"),
        )


_CARRIED = frozenset(name.encode() for name in Record().fields())
_FRESH = Record()


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a jobs stream."""

    stream: str
    id: str
    fields: dict[bytes, bytes]

    @property
    def body(self) -> bytes:
        """The job, encoded; empty when the entry has none."""
        return self.fields.get(BODY, b"")

    @property
    def run(self) -> str:
        """The run that its plain fields name."""
        return self.fields.get(RUN, b"").decode(errors="replace")

    @property
    def job(self) -> str:
        """The job that its plain fields name."""
        return self.fields.get(JOB, b"").decode(errors="replace")

    @property
    def record(self) -> Record:
        """What delivery has cost the job so far."""
        return Record.of(self.fields)

    @property
    def done(self) -> bytes:
        """Samples that were finished before the job was given back, encoded; empty when there are none."""
        return self.fields.get(b"done", b"")

    @classmethod
    def from_reply(cls, stream: str, entry_id: bytes, fields: Sequence[bytes]) -> "Entry":
        """Build from the flat field list of a server's reply."""
        flat = iter(fields)
        return cls(stream, entry_id.decode(), dict(zip(flat, flat, strict=True)))

    @classmethod
    def from_streams(cls, reply: Any) -> "list[Entry]":
        """Build from what XREAD and XREADGROUP return."""
        return [
            cls(stream.decode(), entry_id.decode(), fields)
            for stream, entries in reply or ()
            for entry_id, fields in entries
        ]


def _count(field: bytes | None) -> int:
    # Nine digits: Python refuses to read numbers of thousands, which anyone could add by hand.
    return int(field) if field and field.isdigit() and len(field) < 10 else 0
