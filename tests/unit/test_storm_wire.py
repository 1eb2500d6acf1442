"""The storm's own reader of results reads what the pool writes; and a failing machine loses the end of its file."""

import sys
import time
from pathlib import Path

import numpy as np
from waiting import until_blocking

sys.path.append(str(Path(__file__).parents[1] / "chaos"))

from storm import wire
from storm.everysec import LOST_S, FileSizes

from rollpool.schemas import Group, Sample, SamplingParams
from rollpool.schemas.results import VersionSpan
from rollpool.schemas.wire import pack_model


def group(*first_ids):
    samples = tuple(
        Sample(
            output_ids=np.array([first, first + 1], np.int32),
            logprobs=np.array([-0.5, -1.5], np.float32),
            text="",
            finish_reason="stop",
            version_spans=(VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)),
        )
        for first in first_ids
    )
    return Group(
        run="r",
        batch="b",
        index=7,
        outcome="ok",
        policy_version=3,
        prompt_ids=np.array([5, 6], np.int32),
        samples=samples,
        sampling=SamplingParams(),
    )


def test_a_result_is_read_with_its_tokens_and_spans():
    found = wire.result({b"job": b"b/7", b"outcome": b"ok", b"body": pack_model(group(10))})
    assert (found.index, found.outcome, found.prompt) == (7, "ok", [5, 6])
    assert found.samples == [wire.Sample([10, 11], [[3, 0, 1], [4, 1, 2]], [-0.5, -1.5])]


def test_the_parts_of_a_split_group_are_read_in_order():
    bodies = {b"body": group(10), b"body:1": group(20), b"body:2": group(30)}
    fields = {b"job": b"b/7", b"outcome": b"ok"} | {name: pack_model(each) for name, each in bodies.items()}
    assert [sample.ids[0] for sample in wire.result(fields).samples] == [10, 20, 30]


def test_a_result_without_a_body_is_what_its_fields_say():
    found = wire.result({b"job": b"b/7", b"outcome": b"cancelled", b"error": b"enough"})
    assert (found.outcome, found.samples, found.error) == ("cancelled", [], "enough")


def test_a_machine_that_fails_loses_what_was_written_last(tmp_path):
    path = tmp_path / "appendonlydir" / "appendonly.aof.1.incr.aof"
    path.parent.mkdir()
    path.write_bytes(b"on the disk")
    sizes = FileSizes(tmp_path)
    sizes.start()
    try:
        begin = time.monotonic()
        until_blocking(lambda: time.monotonic() - begin > LOST_S + 0.3, "a second passes")
        with path.open("ab") as file:
            file.write(b", not yet")
        assert sizes.cut_back() == len(b", not yet")
    finally:
        sizes.finish()
    assert path.read_bytes() == b"on the disk"
