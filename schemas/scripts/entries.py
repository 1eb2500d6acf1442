"""An entry of a jobs stream, as a host holds it.

Invariant: an `Entry` is what was on the stream, unjudged; whether its body is a job is decided by the puller, so that
entries anyone could add by hand harm nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Fields of an entry. The first five are for people, the last two count what delivery cost so far.
JOB, POLICY, N, RUN, PREVIEW, BODY, ATTEMPTS = (
    b"job",
    b"policy",
    b"n",
    b"run",
    b"preview",
    b"body",
    b"attempts",
)
FAULTS = b"faults"


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
    def attempts(self) -> int:
        """Times a worker or engine was lost while it had this job."""
        return _count(self.fields.get(ATTEMPTS))

    @property
    def faults(self) -> int:
        """Times this job itself was at fault, or may have been."""
        return _count(self.fields.get(FAULTS))

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
