"""What a loss costs a job, and in what company it may run afterwards; pure.

A dying engine takes every job in it along, and nothing tells which of them it died of, if of any. Two budgets keep the
innocent alive: the infrastructure's, for losses that are nobody's fault, and the job's own, charged only when the job
had the engine to itself. The first death changes nothing, since most deaths are a machine's; from the second on the
jobs that were there run in an eighth of that company, at last alone, while others go on elsewhere.

Invariant: a death in company charges nobody, and neither does a job's first one; every further one makes the company
smaller, so that after a few deaths a job that kills engines runs alone, and is charged alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from rollpool.schemas.scripts import Record

#: By what the company shrinks from the second loss on: 64 jobs are told apart in two more deaths.
SHRINK = 8

#: Characters of history kept: about twenty lines.
HISTORY_CHARS = 4000

#: Characters of one line of it.
LINE_CHARS = 200

#: Seconds until a job that was lost runs again: doubled with each loss up to the second value (NeMo-RL's).
BACKOFF_S, BACKOFF_MOST_S = 1.0, 30.0


def after_death(record: Record, *, company: int, worker: str, line: str) -> Record:
    """Its engine died, with `company` jobs in it, this one included."""
    return replace(
        _lost(record, worker, line),
        # Whoever was there alone by chance, the first time, is a suspect like any other.
        faults=record.faults + (company <= 1 and record.company is not None),
        company=smaller(record.company, company),
    )


def after_loss(record: Record, *, worker: str, line: str) -> Record:
    """The engine lives and failed this job: one attempt of the infrastructure's budget."""
    return replace(_lost(record, worker, line), attempts=record.attempts + 1)


def smaller(before: int | None, company: int) -> int:
    """The company after a death among `company` jobs; `before` is None at the first.

    `schemas/scripts/reclaim.lua` has a rule of its own for workers, which are lost far more often for no job's fault.
    """
    return company if before is None else max(1, min(before, company) // SHRINK)


def backoff_ms(losses: int, jitter: float) -> int:
    """Milliseconds to wait after so many losses.

    Args:
        losses: of this job, at least 1.
        jitter: 0 to 1, drawn anew each time: jobs lost together do not come back together.
    """
    longest = min(BACKOFF_S * 2.0 ** min(losses - 1, 16), BACKOFF_MOST_S)
    return int(1000 * longest * (0.5 + jitter / 2))


def admitted(companies: Sequence[int | None], new: Sequence[int | None]) -> int:
    """How many of the jobs just pulled a host takes on, in order; the rest is for other hosts.

    Args:
        companies: of the jobs it has.
        new: of those pulled; a job that needs smaller company than there is waits until the others have ended, and
            nothing is taken on behind it.
    """
    count, limit = len(companies), least(companies)
    for taken, company in enumerate(new):
        if limit is not None and count + 1 > limit:
            return taken
        count += 1
        limit = least([limit, company])
    return len(new)


def least(companies: Iterable[int | None]) -> int | None:
    """The strictest of some limits; None where there is none."""
    return min((company for company in companies if company is not None), default=None)


def _lost(record: Record, worker: str, line: str) -> Record:
    history = f"{record.history}{line}\n"[-HISTORY_CHARS:]
    return replace(record, losses=record.losses + 1, avoid=worker, history=history)


def history_line(at: float, what: str) -> str:
    """A line of a job's history; `at` in seconds since the epoch."""
    # Half a surrogate pair, as an engine's message may hold, cannot be sent.
    words = " ".join(what.split())[:LINE_CHARS].encode(errors="replace").decode()
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ} {words}"
