"""A worker's heartbeat: plain text in its hash, and the same again when it is read."""

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from rollpool.schemas import WorkerState, WorkerStatus

statuses = st.builds(
    WorkerStatus,
    name=st.text(),
    host=st.text(),
    pid=st.integers(),
    state=st.sampled_from(get_args(WorkerState)),
    policy=st.none() | st.integers(0),
    engine=st.text(),
    engine_url=st.text(),
    max_running_requests=st.integers(0),
    target=st.integers(0),
    jobs_in_flight=st.integers(0),
    samples_in_flight=st.integers(0),
    jobs_settled=st.integers(0),
    samples_made=st.integers(0),
    tokens_made=st.integers(0),
    engine_restarts=st.integers(0),
    backlog_seconds=st.floats(0, allow_infinity=False),
    underfull_seconds=st.floats(0, allow_infinity=False),
    error=st.text(),
    seen_ms=st.integers(0),
)


def stored(status: WorkerStatus) -> dict[bytes, bytes]:
    """As a server returns it: redis-py sends text as UTF-8 and floats by their repr."""
    return {name.encode(): str(value).encode() for name, value in status.fields().items()}


@given(statuses)
def test_a_heartbeat_reads_back_as_it_was_written(status: WorkerStatus) -> None:
    assert WorkerStatus.from_fields(stored(status)) == status


@given(statuses)
def test_every_field_is_in_the_hash_as_text_or_number(status: WorkerStatus) -> None:
    fields = status.fields()
    assert set(fields) == set(WorkerStatus.model_fields)
    assert {type(value) for value in fields.values()} <= {str, int, float}


def test_a_heartbeat_of_a_newer_worker_can_be_read() -> None:
    status = WorkerStatus(name="w", host="h", pid=1, state="serving", policy=0)
    assert WorkerStatus.from_fields({**stored(status), b"newer": b"field"}) == status


def test_no_policy_is_told_from_policy_nought() -> None:
    status = WorkerStatus(name="w", host="h", pid=1, state="starting")
    assert WorkerStatus.from_fields(stored(status)).policy is None
    assert WorkerStatus.from_fields(stored(status.model_copy(update={"policy": 0}))).policy == 0
