"""What to do with a pulled entry. Pure: no I/O, time passed in.

Invariant: no entry makes it past here that this host must not run: bodies that are not jobs, jobs past their
deadline or budget, and jobs whose tag forbids the policies served.
"""

from dataclasses import dataclass

from rollpool.schemas import Policy, PromptJob, SchemaMismatch
from rollpool.schemas.scripts import Entry, Record
from rollpool.schemas.wire import unpack_job
from rollpool.worker.policy.offer import Offer


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a job may cost before it is dead."""

    #: Losses charged to the infrastructure.
    attempts: int
    #: Losses charged to the job.
    faults: int


@dataclass(frozen=True, slots=True)
class Run:
    """Run it here, on this policy."""

    job: PromptJob
    policy: Policy


@dataclass(frozen=True, slots=True)
class Avoid:
    """Run it here only where no other host can: it was lost here before, and is in danger of ending dead."""

    job: PromptJob
    policy: Policy


@dataclass(frozen=True, slots=True)
class Pass:
    """Run it here, unless this host can be asked first: its engine is likely to have the beginning of the prompt."""

    job: PromptJob
    policy: Policy
    host: str


@dataclass(frozen=True, slots=True)
class Park:
    """Leave it for a host that serves `version` or newer to its run."""

    job: PromptJob
    version: int


@dataclass(frozen=True, slots=True)
class Passed:
    """An exact job whose version this host has left behind: for a host still on it, else stale."""

    job: PromptJob


@dataclass(frozen=True, slots=True)
class Expire:
    """Its deadline is over."""

    job: PromptJob


@dataclass(frozen=True, slots=True)
class Fail:
    """It used up a budget."""

    job: PromptJob
    error: str


@dataclass(frozen=True, slots=True)
class Bury:
    """It is not a job at all."""

    error: str


Verdict = Run | Avoid | Pass | Park | Passed | Expire | Fail | Bury


def triage(entry: Entry, *, worker: str, offer: Offer, now_ms: int, budgets: Budgets) -> Verdict:
    """Judge one entry for a host.

    Args:
        entry: as pulled.
        worker: name of this host's worker.
        offer: the policies that this host serves.
        now_ms: server time, milliseconds.
        budgets: what a job may cost before it is dead.
    """
    try:
        job = unpack_job(entry.body)
    except SchemaMismatch as error:
        return Bury(str(error))
    except RecursionError as error:
        return Bury(f"the body is nested too deeply: {error}")
    if entry.fields.get(b"job") != job.id.encode() or entry.fields.get(b"run") != job.run.encode():
        return Bury(f"the entry's fields name another job than its body, {job.run} {job.id}")
    if job.deadline_ms is not None and now_ms > job.deadline_ms:
        return Expire(job)
    record = entry.record
    if why := _used_up(record, budgets):
        return Fail(job, why)
    if policy := offer.choose(job):
        if _in_danger(record, worker):
            return Avoid(job, policy)
        if job.host is not None and job.host != worker and _untouched(record):
            return Pass(job, policy, job.host)
        return Run(job, policy)
    newest = offer.newest(job.run)
    if newest is None or newest < job.oldest_version:
        return Park(job, job.oldest_version)
    return Passed(job)


def _used_up(record: Record, budgets: Budgets) -> str:
    if record.faults >= budgets.faults:
        what = f"{record.faults} engines or workers died while they had this job alone"
    elif record.attempts >= budgets.attempts:
        what = f"{record.attempts} workers or engines were lost while they had this job"
    else:
        return ""
    last = record.history.strip().rpartition("\n")[2]
    return f"{what}; the last time: {last}" if last else what


def _in_danger(record: Record, worker: str) -> bool:
    """One loss may be anybody's; from the second on the host itself may be what is wrong."""
    return record.losses > 1 and record.avoid == worker


def _untouched(record: Record) -> bool:
    """Its host was not asked before, and has not lost it."""
    return not record.passed and not record.losses
