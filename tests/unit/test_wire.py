"""The codec: what is decoded equals what was encoded, and whatever else arrives is refused by one error."""

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import BaseModel

from rollpool.schemas import (
    LANES,
    OUTCOMES,
    Command,
    Group,
    Policy,
    PromptJob,
    Sample,
    SamplingParams,
    SchemaMismatch,
    VersionSpan,
)
from rollpool.schemas.jobs import NAME_PATTERN
from rollpool.schemas.wire import (
    SCHEMA,
    MapTemplate,
    check_msgpack,
    pack,
    pack_model,
    pack_samples,
    unpack,
    unpack_command,
    unpack_group,
    unpack_job,
    unpack_samples,
)

GOLDEN = Path(__file__).parent / "golden" / "bodies.json"
#: Bodies of jobs as they were written before a group could be split, and before it said how many samples are enough.
EARLIER = Path(__file__).parent / "golden" / "bodies-earlier.json"
#: Set it to write the golden file anew, after a change of the format that is meant.
REGENERATE = "ROLLPOOL_REGENERATE_GOLDEN"

names = st.from_regex(NAME_PATTERN, fullmatch=True)
versions = st.integers(0, 2**31)
int32s = hnp.arrays(np.int32, st.integers(0, 20))
float32s = hnp.arrays(np.float32, st.integers(0, 20))
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
values = st.recursive(
    scalars | int32s | float32s,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.text(min_size=1), "content": st.text(min_size=1)}, optional={"name": st.text(), "tools": values}
    ),
    min_size=1,
    max_size=4,
)
token_ids = hnp.arrays(np.int32, st.integers(1, 20), elements=st.integers(0, 2**31 - 1))
samplings = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(8, 2**31),
    min_new_tokens=st.integers(0, 8),
    temperature=st.floats(0, 10),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.just(-1) | st.integers(1, 1000),
    stop=st.lists(st.text(), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 2**31), max_size=3),
    ignore_eos=st.booleans(),
)
#: Parts of a split group, or a whole one with the samples that are enough.
shapes = st.one_of(
    st.integers(1, 1000).flatmap(
        lambda parts: st.fixed_dictionaries(
            {"parts": st.just(parts), "part": st.integers(0, parts - 1), "n": st.integers(1, 1000)}
        )
    ),
    st.integers(1, 1000).flatmap(
        lambda n: st.fixed_dictionaries({"n": st.just(n), "min_samples": st.none() | st.integers(1, n)})
    ),
)


@st.composite
def _jobs(draw: st.DrawFn) -> PromptJob:
    return PromptJob(
        run=draw(names),
        batch=draw(names),
        index=draw(st.integers(0, 2**31)),
        prompt=draw(st.text(min_size=1) | token_ids | messages),
        sampling=draw(samplings),
        lane=draw(st.sampled_from(LANES)),
        policy_version=draw(versions),
        max_staleness=draw(st.none() | versions),
        exact=draw(st.booleans()),
        deadline_ms=draw(st.none() | st.integers(0, 2**53)),
        endpoint=draw(st.sampled_from(["generate", "chat"])),
        host=draw(st.none() | names),
        metadata=draw(values),
        **draw(shapes),
    )


jobs = _jobs()


@st.composite
def _samples(draw: st.DrawFn) -> Sample:
    ids = draw(int32s)
    cut = draw(st.integers(0, len(ids)))
    return Sample(
        output_ids=ids,
        logprobs=draw(hnp.arrays(np.float32, len(ids))),
        text=draw(st.text()),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
        version_spans=(VersionSpan(1, 0, cut), VersionSpan(2, cut, len(ids))),
        cached_tokens=draw(st.none() | st.integers(0, 2**31)),
    )


groups = st.builds(
    Group,
    run=names,
    batch=names,
    index=st.integers(0, 2**31),
    outcome=st.sampled_from(OUTCOMES),
    policy_version=versions,
    prompt_ids=int32s,
    samples=st.lists(_samples(), max_size=3),
    sampling=samplings,
    metadata=values,
    error=st.none() | st.text(),
    worker=st.text(),
    seconds=st.floats(0, allow_nan=False),
)
commands = st.builds(Command, policy=st.builds(Policy, version=versions, checkpoint=st.text(min_size=1), run=names))
bodies = st.one_of(jobs, groups, commands).map(pack_model)


DECODERS: dict[type[BaseModel], Callable[[bytes], BaseModel]] = {
    PromptJob: unpack_job,
    Group: unpack_group,
    Command: unpack_command,
}


def same(one: Any, other: Any) -> bool:
    """Equal, arrays and NaN included, and of one type."""
    if isinstance(one, BaseModel):
        return type(one) is type(other) and same(dict(one), dict(other))
    if isinstance(one, np.ndarray):
        alike = isinstance(other, np.ndarray) and one.dtype == other.dtype
        return alike and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and bool(one == other)


def arrays_in(value: Any) -> list[np.ndarray[Any, Any]]:
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, dict):
        value = list(value.values())
    return [array for item in value for array in arrays_in(item)] if isinstance(value, list | tuple) else []


@given(st.one_of(jobs, groups, commands))
def test_a_model_comes_back_as_it_went(model: BaseModel) -> None:
    assert same(DECODERS[type(model)](pack_model(model)), model)


@given(values)
def test_a_value_comes_back_as_it_went(value: Any) -> None:
    assert same(unpack(pack(value)), value)


@given(st.one_of(jobs, groups))
def test_decoded_arrays_are_read_only_views_that_own_no_copy(model: BaseModel) -> None:
    for array in arrays_in(DECODERS[type(model)](pack_model(model))):
        assert not array.flags.writeable
        assert not array.flags.owndata
        received: Any = array.base
        assert isinstance(received, bytes)
        assert np.shares_memory(array, np.frombuffer(received, np.uint8)) or not len(array)


samples_by_position = st.dictionaries(st.integers(0, 1000), _samples(), max_size=4)


@given(samples_by_position, st.integers(0, 9))
def test_finished_samples_come_back_at_their_positions(samples: dict[int, Sample], generation: int) -> None:
    read = unpack_samples(pack_samples(samples, generation))
    assert read.generation == generation
    assert same(dict(read.samples), dict(sorted(samples.items())))


@given(samples_by_position)
def test_the_order_in_which_samples_finished_does_not_show(samples: dict[int, Sample]) -> None:
    assert pack_samples(samples) == pack_samples(dict(reversed(samples.items())))


@pytest.mark.parametrize(
    "samples", [None, {}, [1], [[0]], [["0", {}]], [[0, {}]], [[0, 1, 2]], [[True, {}]], "samples"], ids=repr
)
def test_what_are_no_finished_samples_is_refused(samples: Any) -> None:
    with pytest.raises(SchemaMismatch, match="samples"):
        unpack_samples(pack({"schema": SCHEMA, "samples": samples}))


def test_finished_samples_of_another_major_version_are_refused() -> None:
    with pytest.raises(SchemaMismatch, match="same version on both sides"):
        unpack_samples(pack({"schema": SCHEMA + 1, "samples": []}))


def test_arrays_travel_as_little_endian_bytes() -> None:
    big_endian = np.array([1, -2], ">i4"), np.array([0.5, -1], ">f4")
    assert pack(big_endian[0]) == b"\xd7\x01" + b"\x01\x00\x00\x00\xfe\xff\xff\xff"
    assert pack(big_endian[1]) == b"\xd7\x02" + b"\x00\x00\x00\x3f\x00\x00\x80\xbf"


@pytest.mark.parametrize(
    ("value", "decoded"),
    [
        (np.array([1, 2], np.int64), np.array([1, 2], np.int32)),
        (np.array([0.5, np.nan], np.float64), np.array([0.5, np.nan], np.float32)),
        (np.arange(8, dtype=np.int32)[::2], np.array([0, 2, 4, 6], np.int32)),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        ((1, 2), [1, 2]),
    ],
    ids=repr,
)
def test_what_has_an_exact_equal_on_the_wire_is_carried_as_that(value: Any, decoded: Any) -> None:
    assert same(unpack(pack(value)), decoded)


@pytest.mark.parametrize(
    "value",
    [
        np.array([2**31]),
        np.array([0.1]),
        np.zeros((2, 2), np.int32),
        np.array(1),
        2**64,
        {1, 2},
        object(),
        lambda: None,
        1j,
    ],
    ids=repr,
)
def test_what_would_come_back_different_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        pack({"value": value})


def with_fields(model: BaseModel, **fields: Any) -> bytes:
    return pack({**unpack(pack_model(model)), **fields})


@given(st.one_of(jobs, groups, commands), values)
def test_fields_of_a_newer_minor_version_are_ignored(model: BaseModel, value: Any) -> None:
    body = with_fields(model, a_newer_field=value)
    assert same(DECODERS[type(model)](body), model)


def test_a_newer_sampling_parameter_is_refused_for_ignoring_it_would_sample_otherwise() -> None:
    job = PromptJob(run="r", batch="b", index=0, prompt="p", policy_version=1)
    with pytest.raises(SchemaMismatch, match=r"sampling\.typical_p"):
        unpack_job(with_fields(job, sampling={**dict(job.sampling), "typical_p": 0.5}))


@pytest.mark.parametrize("schema", [0, SCHEMA + 1, "1", None, [1], b"1", {}], ids=repr)
def test_another_major_version_is_refused(schema: Any) -> None:
    command = Command(policy=Policy(version=1, checkpoint="/c", run="r"))
    with pytest.raises(SchemaMismatch, match="same version on both sides"):
        unpack_command(with_fields(command, schema=schema))


@pytest.mark.parametrize("body", [b"", b"\x80", b"\x90", b"\xc0", b"\x01", pack("text"), pack({"run": "r"})], ids=repr)
@pytest.mark.parametrize("decode", DECODERS.values(), ids=lambda decode: decode.__name__)
def test_what_is_no_body_is_refused(decode: Callable[[bytes], BaseModel], body: bytes) -> None:
    with pytest.raises(SchemaMismatch):
        decode(body)


def test_the_body_of_another_model_is_refused() -> None:
    command = Command(policy=Policy(version=1, checkpoint="/c", run="r"))
    with pytest.raises(SchemaMismatch, match="a PromptJob body does not validate"):
        unpack_job(pack_model(command))


def test_the_schema_number_comes_first() -> None:
    for body in (pack_model(model) for model in golden_models().values()):
        assert next(iter(unpack(body).items())) == ("schema", SCHEMA)


def only_schema_mismatch(body: bytes) -> None:
    """Decoding may succeed; if it fails, then by the one error that callers handle."""
    for decode in (*DECODERS.values(), unpack_samples):
        try:
            decode(body)
        except SchemaMismatch:
            continue


@given(bodies, st.data())
def test_a_truncated_body_gives_schema_mismatch_alone(body: bytes, data: st.DataObject) -> None:
    cut = body[: data.draw(st.integers(0, len(body) - 1))]
    for decode in DECODERS.values():
        with pytest.raises(SchemaMismatch):
            decode(cut)


@given(bodies | samples_by_position.map(pack_samples), st.data())
def test_damaged_bytes_give_schema_mismatch_alone(body: bytes, data: st.DataObject) -> None:
    damaged = bytearray(body)
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=5)):
        damaged[place] = data.draw(st.integers(0, 255))
    only_schema_mismatch(bytes(damaged))


@given(st.binary())
def test_random_bytes_give_schema_mismatch_alone(body: bytes) -> None:
    only_schema_mismatch(body)


@given(st.sampled_from([PromptJob, Group, Command]), st.data())
def test_fields_of_the_wrong_kind_give_schema_mismatch_alone(model: type[BaseModel], data: st.DataObject) -> None:
    fields = data.draw(st.dictionaries(st.sampled_from(list(model.model_fields)), values))
    only_schema_mismatch(pack({"schema": SCHEMA, **fields}))


@given(st.sampled_from(sorted(Group.model_fields)), values)
def test_one_wrong_field_of_a_good_group_gives_schema_mismatch_alone(field: str, value: Any) -> None:
    group = golden_models()["group"]
    only_schema_mismatch(with_fields(group, **{field: value}))


@given(st.sampled_from(sorted(Sample.model_fields)), values)
def test_one_wrong_field_of_a_sample_gives_schema_mismatch_alone(field: str, value: Any) -> None:
    fields = unpack(pack_model(golden_models()["group"]))
    fields["samples"][0][field] = value
    only_schema_mismatch(pack(fields))


@pytest.mark.parametrize("schema", [np.arange(3, dtype=np.int32), np.zeros(0, np.float32)], ids=repr)
def test_an_array_for_a_schema_number_is_refused(schema: Any) -> None:
    with pytest.raises(SchemaMismatch):
        unpack_job(pack({"schema": schema}))


@pytest.mark.parametrize("ids", [[{}], [None], [2**40], [1.5], None, 1.5, "1", {}], ids=repr)
def test_what_is_no_array_of_ids_is_refused_and_not_cast(ids: Any) -> None:
    with pytest.raises(SchemaMismatch, match="prompt_ids"):
        unpack_group(with_fields(golden_models()["group"], prompt_ids=ids))


def test_nesting_deeper_than_the_decoder_goes_is_refused() -> None:
    with pytest.raises(SchemaMismatch):
        unpack(b"\x91" * 100_000 + b"\x90")


def test_an_ext_type_of_somebody_else_is_refused_by_its_number() -> None:
    with pytest.raises(SchemaMismatch, match="ext type 42"):
        unpack(msgpack.packb(msgpack.ExtType(42, b"")))


@given(
    shared=st.dictionaries(st.text(), values, max_size=5),
    rows=st.lists(st.tuples(values, values), min_size=1, max_size=3),
)
def test_a_template_encodes_what_pack_encodes(shared: dict[str, Any], rows: list[tuple[Any, Any]]) -> None:
    shared = {name: value for name, value in shared.items() if name not in ("one", "two")}
    template = MapTemplate(shared, own=("one", "two"))
    for row in rows:
        assert same(unpack(template.pack(row)), {**shared, "one": row[0], "two": row[1]})


def test_msgpack_of_today_passes_its_check() -> None:
    check_msgpack()


def test_the_old_msgpack_in_disguise_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgpack, "unpackb", functools.partial(msgpack.unpackb, raw=True))
    with pytest.raises(SchemaMismatch, match="pip uninstall -y msgpack-python"):
        check_msgpack()


def golden_models() -> dict[str, BaseModel]:
    """One of each body that is sent, with every field set to something of its own."""

    def job(index: int, prompt: Any, **fields: Any) -> PromptJob:
        return PromptJob(run="run-1", batch="step-12", index=index, prompt=prompt, policy_version=12, **fields)

    sampling = SamplingParams(
        max_new_tokens=64,
        min_new_tokens=1,
        temperature=0.5,
        top_p=0.75,
        top_k=40,
        min_p=0.25,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        stop=("\n\n", "Ende"),
        stop_token_ids=(2, 151645),
        ignore_eos=True,
    )
    sample = Sample(
        output_ids=np.array([5, 6, 151645], np.int32),
        logprobs=np.array([-0.5, -1.25, 0.0], np.float32),
        text="zwölf",
        finish_reason="stop",
        version_spans=(VersionSpan(11, 0, 2), VersionSpan(12, 2, 3)),
    )
    group = Group(
        run="run-1",
        batch="step-12",
        index=0,
        outcome="ok",
        policy_version=12,
        prompt_ids=np.array([1, 2, 3], np.int32),
        samples=(sample, sample),
        sampling=sampling,
        metadata={"weights": np.array([0.5], np.float32)},
        error="none",
        worker="tpu-0",
        seconds=1.5,
    )
    cached = sample.model_copy(update={"cached_tokens": 2})
    return {
        "job_text": job(
            0, "Wie viel ist 5 + 7?", n=8, sampling=sampling, max_staleness=2, deadline_ms=1_800_000_000_000
        ),
        "job_ids": job(1, np.array([1, 2, 151644], np.int32), lane="high", exact=True, metadata={"answer": "12"}),
        "job_messages": job(
            2, [{"role": "user", "content": "5 + 7?", "name": "x"}], lane="low", endpoint="chat", metadata=[1, None]
        ),
        "job_part": job(3, "5 + 7?", n=4, parts=3, part=2),
        "job_with_enough": job(4, "5 + 7?", n=8, min_samples=6),
        "job_with_host": job(5, "5 + 7?", host="tpu-0"),
        "group": group,
        "group_with_cache": group.model_copy(update={"samples": (cached, sample)}),
        "command": Command(policy=Policy(version=12, checkpoint="/ckpt/12", run="run-1")),
    }


def golden_samples() -> dict[int, Sample]:
    """What travels with a job of which some samples are finished."""
    group = golden_models()["group"]
    assert isinstance(group, Group)
    return {5: group.samples[0], 0: group.samples[1]}


def golden_bodies() -> dict[str, bytes]:
    return {
        **{name: pack_model(model) for name, model in golden_models().items()},
        "samples": pack_samples(golden_samples()),
    }


@pytest.fixture(scope="session")
def golden() -> dict[str, str]:
    if os.environ.get(REGENERATE):
        encoded = {name: body.hex() for name, body in golden_bodies().items()}
        GOLDEN.write_text(json.dumps(encoded, indent=1) + "\n")
    stored: dict[str, str] = json.loads(GOLDEN.read_text())
    return stored


def test_the_golden_file_has_one_of_each_body(golden: dict[str, str]) -> None:
    assert golden.keys() == golden_bodies().keys()


@pytest.mark.parametrize("name", golden_bodies())
def test_encoding_is_what_it_always_was(name: str, golden: dict[str, str]) -> None:
    assert golden_bodies()[name].hex() == golden[name], f"if this is meant, run with {REGENERATE}=1"


@pytest.mark.parametrize("name", golden_models())
def test_bodies_written_before_are_still_read(name: str, golden: dict[str, str]) -> None:
    model = golden_models()[name]
    assert same(DECODERS[type(model)](bytes.fromhex(golden[name])), model)


def test_samples_written_before_are_still_read(golden: dict[str, str]) -> None:
    read = dict(unpack_samples(bytes.fromhex(golden["samples"])).samples)
    assert list(read) == [0, 5]
    assert same(read, golden_samples())


@pytest.mark.parametrize("name", json.loads(EARLIER.read_text()))
def test_bodies_of_an_earlier_minor_version_are_still_read(name: str) -> None:
    model = golden_models()[name]
    assert same(DECODERS[type(model)](bytes.fromhex(json.loads(EARLIER.read_text())[name])), model)
