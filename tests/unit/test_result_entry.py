"""Entries of a results stream: settled by a host, put together from parts, or ended by the server."""

import numpy as np
import pytest

from rollpool.schemas import Group, Outcome, Sample, SamplingParams, SchemaMismatch
from rollpool.schemas.result_entry import bodies_of, group_of, size_of
from rollpool.schemas.wire import pack_model


def group(text: str = "x", worker: str = "w1", seconds: float = 1.0, outcome: Outcome = "ok") -> Group:
    sample = Sample(
        output_ids=np.array([7, 8], np.int32),
        logprobs=np.array([-1.0, -2.0], np.float32),
        text=text,
        finish_reason="stop",
        version_spans=((3, 0, 2),),
    )
    return Group(
        run="r",
        batch="b",
        index=4,
        outcome=outcome,
        policy_version=3,
        prompt_ids=np.array([1], np.int32),
        samples=(sample,) if outcome == "ok" else (),
        sampling=SamplingParams(temperature=0.5),
        metadata={"answer": 1},
        worker=worker,
        seconds=seconds,
    )


def entry(*groups: Group, **fields: bytes) -> dict[bytes, bytes]:
    names = [b"body", *(f"body:{number}".encode() for number in range(1, len(groups)))]
    plain = {name.encode(): value for name, value in fields.items()}
    return {b"job": b"b/4", b"outcome": b"ok"} | plain | dict(zip(names, map(pack_model, groups), strict=True))


def test_a_group_of_one_body_is_that_body() -> None:
    read = group_of("r", "b", entry(group()))
    assert (read.index, read.outcome, read.metadata, read.worker) == (4, "ok", {"answer": 1}, "w1")
    np.testing.assert_array_equal(read.samples[0].output_ids, [7, 8])


def test_parts_are_joined_in_their_order_and_say_who_made_them() -> None:
    parts = [group(f"part {number}", f"w{number % 2}", float(number)) for number in range(12)]
    read = group_of("r", "b", entry(*parts))
    assert [sample.text for sample in read.samples] == [f"part {number}" for number in range(12)]
    assert (read.index, read.worker, read.seconds, read.metadata) == (4, "w0,w1", 11.0, {"answer": 1})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {b"job": b"b/4", b"outcome": b"cancelled", b"policy": b"7", b"error": b"by the trainer"},
            (4, "cancelled", 7, "by the trainer"),
        ),
        ({b"job": b"b/12", b"outcome": b"expired", b"policy": b"", b"error": b""}, (12, "expired", 0, None)),
        ({b"job": b"b/0", b"outcome": b"of another version"}, (0, "failed", 0, None)),
    ],
)
def test_what_the_server_ended_is_told_by_its_plain_fields(
    fields: dict[bytes, bytes], expected: tuple[int, str, int, str | None]
) -> None:
    read = group_of("r", "b", fields)
    assert (read.index, read.outcome, read.policy_version, read.error) == expected
    assert (read.run, read.batch, read.samples, len(read.prompt_ids)) == ("r", "b", (), 0)


def test_the_size_is_that_of_the_bodies() -> None:
    parts = [group(), group("longer " * 9)]
    assert size_of(entry(*parts, policy=b"3", worker=b"w")) == sum(len(pack_model(part)) for part in parts)
    assert size_of({b"job": b"b/4", b"outcome": b"expired"}) == 0
    assert len(bodies_of(entry(*parts))) == 2


def test_a_body_of_another_schema_is_refused() -> None:
    with pytest.raises(SchemaMismatch):
        group_of("r", "b", {b"job": b"b/4", b"outcome": b"ok", b"body": b"\x80"})
