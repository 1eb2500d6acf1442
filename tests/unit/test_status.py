"""A worker's heartbeat: plain text in its hash, the same again when it is read, and readable as it is drawn."""

import re
from io import StringIO
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rollpool.ops.inspect import PoolStatus
from rollpool.ops.status import draw
from rollpool.schemas import WorkerState, WorkerStatus

statuses = st.builds(
    WorkerStatus,
    name=st.text(),
    host=st.text(),
    pid=st.integers(),
    state=st.sampled_from(get_args(WorkerState)),
    policy=st.none() | st.integers(0),
    generation=st.integers(0),
    heading=st.none() | st.integers(0),
    adapters=st.text(),
    staging=st.text(),
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


# As it is drawn


def worker(name: str, **facts: Any) -> WorkerStatus:
    return WorkerStatus.model_validate({"name": name, "host": "h", "pid": 1, "state": "serving", **facts})


def drawn(*workers: WorkerStatus, width: int = 200) -> str:
    console = Console(width=width, file=StringIO(), record=True)
    console.print(draw(PoolStatus("p", 13, None, 0, 0, 0, 0, workers=list(workers))))
    return console.export_text()


def row(shown: str, name: str) -> list[str]:
    (line,) = [line for line in shown.splitlines() if re.match(rf"\W*{name}\b", line) and "│" in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.mark.parametrize(
    ("facts", "cell"),
    [
        ({}, ""),
        ({"policy": 13}, "13"),
        ({"policy": 13, "generation": 2}, "13 g2"),
        ({"policy": 13, "heading": 14}, "13 → 14"),
        ({"policy": 13, "generation": 2, "heading": 12}, "13 g2 → 12"),
        ({"heading": 14}, "→ 14"),
        ({"policy": 13, "heading": 13}, "13"),
    ],
)
def test_a_policy_is_shown_with_its_generation_and_with_where_the_host_is_going(
    facts: dict[str, int], cell: str
) -> None:
    assert row(drawn(worker("a", **facts)), "a")[2] == cell


def test_adapters_and_staging_have_columns_while_any_host_has_them() -> None:
    plain = drawn(worker("a", policy=13))
    assert ("adapters" in plain, "staging" in plain) == (False, False)
    shown = drawn(
        worker("a", policy=13, adapters="math:14,15 code:14"),
        worker("b", policy=13, staging="policy 16: 10 of 900 MiB"),
        worker("c", policy=13, state="paused"),
    )
    assert row(shown, "a")[3:5] == ["math:14,15 code:14", ""]
    assert row(shown, "b")[3:5] == ["", "policy 16: 10 of 900 MiB"]
    assert row(shown, "c")[1] == "paused"


def test_errors_stand_under_the_table() -> None:
    shown = drawn(worker("a", state="broken", error="no disk " * 20), worker("b", error="long " * 100))
    assert row(shown, "a")[1] == "broken"
    assert "a: no disk no disk" in shown
    assert shown.rstrip().endswith("…")


def test_what_a_host_waits_for_does_not_push_everything_else_out() -> None:
    waits = "its turn to change: 3 other hosts would go on serving, and 4 must"
    cell = row(drawn(worker("a", policy=13, staging=waits)), "a")[3]
    assert cell.endswith("…")
    assert waits.startswith(cell[:-1])


@pytest.mark.parametrize("width", [70, 80, 100, 140])
def test_a_narrow_terminal_loses_whole_columns_and_is_told_which(width: int) -> None:
    host = worker("vm-1", policy=13, generation=1, engine="0.0.1.post1", tokens_made=1_234_567)
    shown = drawn(host, width=width)
    assert max(map(len, shown.splitlines())) <= width
    assert row(shown, "vm-1")[:4] == ["vm-1", "serving", "13 g1", "0/0 (runs 0)"]
    (missing,) = re.findall("not shown, for want of width: (.*)", shown) or [""]
    for column, cell in (("tokens", "1,234,567"), ("engine", "0.0.1.post1")):
        assert (cell in shown) != (column in missing)


def test_a_narrower_one_has_adapters_and_staging_under_the_table() -> None:
    host = worker("vm-1", policy=13, adapters="math:14", staging="policy 16: 10 of 900 MiB")
    shown = drawn(host, width=60)
    assert max(map(len, shown.splitlines())) <= 60
    assert row(shown, "vm-1") == ["vm-1", "serving", "13", "math:14", "0/0 (runs 0)"]
    assert "vm-1: staging policy 16: 10 of 900 MiB" in shown
    assert "vm-1: adapters math:14" in drawn(host, width=45)
