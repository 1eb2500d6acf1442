"""What to do with a pulled entry. Pure: no I/O, time passed in.

Invariant: no entry makes it past here that this host must not run: bodies that are not jobs, jobs past their
deadline or budget, and jobs whose tag forbids the policy served.
"""

from dataclasses import dataclass

from rollpool.schemas import PromptJob, SchemaMismatch
from rollpool.schemas.scripts import Entry
from rollpool.schemas.wire import unpack_job


@dataclass(frozen=True, slots=True)
class Run:
    """Run it here."""

    job: PromptJob


@dataclass(frozen=True, slots=True)
class Park:
    """Leave it for a host that serves `version` or newer."""

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
    """It used up its attempts."""

    job: PromptJob
    error: str


@dataclass(frozen=True, slots=True)
class Bury:
    """It is not a job at all."""

    error: str


Verdict = Run | Park | Passed | Expire | Fail | Bury


def triage(entry: Entry, *, version: int, now_ms: int, max_attempts: int) -> Verdict:
    """Judge one entry for a host that serves policy `version`.

    Args:
        entry: as pulled.
        version: the policy version this host serves.
        now_ms: server time, milliseconds.
        max_attempts: workers or engines a job may lose before it fails.
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
    if entry.attempts >= max_attempts:
        return Fail(job, f"{entry.attempts} workers or engines were lost while they had this job")
    if job.may_run_on(version):
        return Run(job)
    if version < job.oldest_version:
        return Park(job, job.oldest_version)
    return Passed(job)
