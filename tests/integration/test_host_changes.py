"""A host over changes of its policies: in waves, by swap, by restart, with adapters; and nothing is lost over any.

Engines are in this process and do what the test says; each test ends with the books in order.
"""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeOwner, completion
from stage import RUN, Stage, make_quick
from waiting import until

from rollpool.schemas import Command, Group, SamplingParams, VersionSpan
from rollpool.schemas.wire import pack_model
from rollpool.worker.engines.protocol import Completion, SampleRequest, WeightsRefused
from rollpool.worker.host import Host
from rollpool.worker.policy import change, duties


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    monkeypatch.setattr(change, "LOOK_AGAIN_S", 0.02)
    monkeypatch.setattr(change, "FETCH_AGAIN_S", 0.05)
    monkeypatch.setattr(duties, "LOOK_S", 0.01)


def checkpoint(version: int) -> str:
    return f"/policy/{version}"


async def publish(stage: Stage, version: int, **more: Any) -> None:
    await stage.pool.publish_policy(version, checkpoint=checkpoint(version), check=False, **more)


async def publish_adapter(stage: Stage, version: int, **more: Any) -> None:
    await stage.pool.publish_policy(version, lora_path=f"/lora/{version}", check=False, **more)


async def command(stage: Stage, **fields: Any) -> str:
    order = Command.model_validate(fields)
    entry = await stage.server.xadd(stage.keys.control, {"kind": order.kind, "body": pack_model(order)})
    return str(entry.decode())


async def answered(stage: Stage, state: str, *, kind: str = "policy", version: int | None = None) -> dict[bytes, bytes]:
    """Wait for an answer; its fields."""

    async def found() -> dict[bytes, bytes]:
        for _, fields in await stage.server.xrange(stage.keys.acks):
            told = fields[b"kind"].decode(), fields[b"state"].decode(), fields[b"version"].decode()
            if told == (kind, state, "" if version is None else str(version)):
                return dict(fields)
        return {}

    await until(found, f"{kind} {version} is {state}")
    return await found()


def spans(group: Group) -> list[tuple[int, int, int]]:
    return [tuple(span) for sample in group.samples for span in sample.version_spans]  # type: ignore[misc]


def beginning(tokens: int, first: int = 0) -> Completion:
    return completion(tokens, first=first)


def answer_all(owner: FakeOwner, tokens: int = 2, *, spans: tuple[VersionSpan, ...] = ()) -> None:
    for call in list(owner.engine.open.values()):
        if not call.answer.done():
            call.answer.set_result(replace(completion(tokens), version_spans=spans))


def asked(owner: FakeOwner) -> list[tuple[list[int], str | None]]:
    """Prompt and adapter of each call of the engine of now."""
    requests = [call.request for call in owner.engine.calls]
    return [(each.input_ids.tolist(), each.lora_path) for each in requests if isinstance(each, SampleRequest)]


# By restart


async def test_what_is_cut_short_goes_on_where_it_was_and_says_which_policy_made_which_token(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = await stage.host(owner, change_mode="resume")
    sampling = SamplingParams(max_new_tokens=10, min_new_tokens=4)
    await stage.enqueue(2, n=2, batch_id="b", sampling=sampling, max_staleness=None)
    await until(lambda: len(owner.engine.open) == 4)
    next(iter(owner.engine.open.values())).answer.set_result(completion(10, first=50))
    await until(lambda: len(owner.engine.open) == 3)
    owner.engine.partial = lambda _: beginning(3, first=100)
    await publish(stage, 1)
    await until(lambda: len(owner.engines) == 2 and len(owner.engine.open) == 3)
    assert host.status().policy == 1
    for call in list(owner.engine.open.values()):
        request = call.request
        assert isinstance(request, SampleRequest)
        assert request.input_ids[1:].tolist() == [100, 101, 102]
        assert (request.sampling.max_new_tokens, request.sampling.min_new_tokens) == (7, 1)
        call.answer.set_result(completion(7, first=200))
    groups = await stage.settled("b", "ok", "ok")
    assert sorted(spans(groups[0]) + spans(groups[1])) == [(0, 0, 3)] * 3 + [(0, 0, 10)] + [(1, 3, 10)] * 3
    continued = [sample for group in groups for sample in group.samples if len(sample.version_spans) == 2]
    assert all(sample.output_ids.tolist() == [100, 101, 102, *range(200, 207)] for sample in continued)
    assert all(group.prompt_ids.tolist() == [group.index + 1] for group in groups)


async def test_requeueing_begins_again_and_draining_finishes_first(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    await stage.host(owner)
    await stage.enqueue(1, batch_id="b")
    await until(lambda: len(owner.engine.open) == 1)
    await publish(stage, 1, mode="requeue")
    await until(lambda: len(owner.engines) == 2 and len(owner.engine.open) == 1)
    assert owner.engines[0].aborted == []
    assert asked(owner) == [([1], None)]
    await publish(stage, 2, mode="drain")
    await until(lambda: len(owner.staged) == 3)
    await asyncio.sleep(0.1)
    assert len(owner.engines) == 2
    answer_all(owner)
    [group] = await stage.settled("b", "ok")
    assert spans(group) == [(1, 0, 2)]
    await until(lambda: len(owner.engines) == 3)


async def test_exact_work_is_never_gone_on_with_under_another_policy(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    await stage.host(owner)
    await stage.enqueue(1, batch_id="b", exact=True)
    await until(lambda: len(owner.engine.open) == 1)
    owner.engine.partial = lambda _: beginning(1)
    await publish(stage, 1)
    [group] = await stage.settled("b", "stale")
    assert group.samples == ()
    assert owner.engines[0].aborted == []


async def test_going_back_begins_again_what_the_abandoned_policy_began(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    await stage.host(owner)
    await publish(stage, 1)
    await publish(stage, 2)
    await stage.pool.wait_for_policy(2, timeout=10.0)
    await stage.enqueue(1, batch_id="b", policy_version=1, max_staleness=None)
    await stage.enqueue(1, batch_id="abandoned", policy_version=2)
    await until(lambda: len(owner.engine.open) == 2)
    owner.engine.partial = lambda _: beginning(1)
    before = len(owner.engines)
    await stage.pool.rollback_policy()
    await stage.settled("abandoned", "stale")
    await until(lambda: len(owner.engines) > before and len(owner.engine.open) == 1)
    assert owner.launches[-1] == checkpoint(1)
    assert asked(owner) == [([1], None)]
    answer_all(owner)
    [group] = await stage.settled("b", "ok")
    assert spans(group) == [(1, 0, 2)]


async def test_a_host_that_never_left_the_policy_that_is_gone_back_to_stays_as_it_is(stage: Stage) -> None:
    owner = FakeOwner()
    host = await stage.host(owner)
    await publish(stage, 1)
    await stage.pool.wait_for_policy(1, timeout=10.0)
    owner.missing[checkpoint(2)] = "no such directory"
    await publish(stage, 2)
    await answered(stage, "failed", version=2)
    before = len(owner.engines)
    await stage.pool.rollback_policy(1)
    await until(lambda: host.status().generation == 1)
    assert len(owner.engines) == before
    await stage.enqueue(1, batch_id="b", policy_version=1)
    await stage.settled("b", "ok")


async def test_a_source_is_staged_while_the_engine_goes_on(stage: Stage) -> None:
    owner = FakeOwner()
    await stage.host(owner)
    owner.unreachable[checkpoint(1)] = "the bucket does not answer"
    await publish(stage, 1)
    await until(lambda: owner.staged.count(checkpoint(1)) > 2, "it is tried again")
    await stage.enqueue(3, batch_id="b")
    await stage.settled("b", "ok", "ok", "ok")
    del owner.unreachable[checkpoint(1)]
    await stage.pool.wait_for_policy(1, timeout=10.0)
    assert owner.launches == [checkpoint(0), checkpoint(1)]
    assert owner.kept == {checkpoint(1)}


# By swap


async def test_a_swap_changes_the_weights_under_what_runs(stage: Stage) -> None:
    owner = FakeOwner(holding=True, swaps=True)
    host = await stage.host(owner)
    await stage.enqueue(1, batch_id="b", max_staleness=None)
    await until(lambda: len(owner.engine.open) == 1)
    await publish(stage, 1)
    answer = await answered(stage, "applied", version=1)
    assert b"swapped while serving" in answer[b"detail"]
    assert owner.engine.swapped == [(checkpoint(1), 1)]
    assert host.status().policy == 1
    assert len(owner.engine.open) == 1, "it goes on in the engine"
    answer_all(owner, 5, spans=(VersionSpan(0, 0, 2), VersionSpan(1, 2, 5)))
    [group] = await stage.settled("b", "ok")
    assert spans(group) == [(0, 0, 2), (1, 2, 5)]
    assert len(owner.engines) == 1


async def test_exact_work_leaves_the_engine_before_a_swap(stage: Stage) -> None:
    owner = FakeOwner(holding=True, swaps=True)
    await stage.host(owner)
    await stage.enqueue(1, batch_id="b", exact=True)
    await until(lambda: len(owner.engine.open) == 1)
    await publish(stage, 1)
    await stage.settled("b", "stale")
    assert owner.engine.swapped == [(checkpoint(1), 1)]


async def test_exact_work_that_was_begun_in_the_middle_of_a_swap_is_not_kept(stage: Stage) -> None:
    owner = FakeOwner(holding=True, swaps=True)
    await stage.host(owner)
    owner.engine.swap_gate = asyncio.Event()
    await publish(stage, 1)
    await until(lambda: owner.staged.count(checkpoint(1)) > 0)
    await stage.enqueue(1, batch_id="b", exact=True)
    await until(lambda: len(owner.engine.open) == 1)
    owner.engine.swap_gate.set()
    await until(lambda: bool(owner.engine.swapped))
    answer_all(owner, 4, spans=(VersionSpan(0, 0, 3), VersionSpan(1, 3, 4)))
    [group] = await stage.settled("b", "stale")
    assert group.samples == ()


@pytest.mark.parametrize("restart_may_help", [True, False])
async def test_a_swap_that_is_refused_is_a_restart_or_a_failure(stage: Stage, restart_may_help: bool) -> None:
    owner = FakeOwner(swaps=True)
    host = await stage.host(owner)
    refusal = WeightsRefused("another shape", restart_may_help=restart_may_help)
    owner.engine.refusals[checkpoint(1)] = refusal
    await publish(stage, 1)
    if restart_may_help:
        await answered(stage, "applied", version=1)
        assert owner.launches == [checkpoint(0), checkpoint(1)]
        assert host.status().policy == 1
    else:
        answer = await answered(stage, "failed", version=1)
        assert answer[b"error"] == b"another shape"
        assert owner.launches == [checkpoint(0)]
        assert host.status().policy == 0
    await stage.enqueue(1, batch_id="b")
    await stage.settled("b", "ok")


async def test_a_restart_can_be_asked_for_where_a_swap_would_do(stage: Stage) -> None:
    owner = FakeOwner(swaps=True)
    await stage.host(owner)
    await publish(stage, 1, way="restart")
    await answered(stage, "applied", version=1)
    assert owner.launches == [checkpoint(0), checkpoint(1)]


# Adapters


async def test_adapters_are_loaded_while_serving_and_several_serve_side_by_side(stage: Stage) -> None:
    owner = FakeOwner(lora="runtime", adapter_slots=2)
    host = await stage.host(owner)
    for version in (1, 2):
        await publish_adapter(stage, version)
        await stage.pool.wait_for_policy(version, timeout=10.0)
    assert host.status().adapters == f"{RUN}:1,2"
    assert len(owner.engines) == 1
    await stage.enqueue(1, batch_id="old", policy_version=1, exact=True)
    await stage.enqueue(1, batch_id="new", policy_version=2)
    await stage.enqueue(1, batch_id="base", policy_version=0, exact=True)
    made = {batch: spans((await stage.settled(batch, "ok"))[0]) for batch in ("old", "new", "base")}
    assert made == {"old": [(1, 0, 2)], "new": [(2, 0, 2)], "base": [(0, 0, 2)]}
    assert {name for _, name in asked(owner)} == {"r.g0.v1", "r.g0.v2", None}


async def test_the_oldest_adapter_makes_room_once_nobody_uses_it(stage: Stage) -> None:
    owner = FakeOwner(lora="runtime", adapter_slots=1, holding=True)
    host = await stage.host(owner)
    await publish_adapter(stage, 1)
    await stage.pool.wait_for_policy(1, timeout=10.0)
    await stage.enqueue(1, batch_id="b", policy_version=1)
    await until(lambda: len(owner.engine.open) == 1)
    await publish_adapter(stage, 2)
    await asyncio.sleep(0.2)
    assert list(owner.engine.adapters) == ["r.g0.v1"]
    answer_all(owner)
    await stage.settled("b", "ok")
    await stage.pool.wait_for_policy(2, timeout=10.0)
    assert owner.engine.unloaded == ["r.g0.v1"]
    assert host.status().adapters == f"{RUN}:2"


async def test_a_job_for_an_adapter_that_is_not_loaded_yet_waits_for_it(stage: Stage) -> None:
    owner = FakeOwner(lora="runtime", adapter_slots=4)
    await stage.host(owner)
    await stage.enqueue(1, batch_id="b", policy_version=3, max_staleness=0)

    async def parked() -> bool:
        return bool(await stage.server.zcard(stage.keys.parked(RUN)))

    await until(parked)
    await publish_adapter(stage, 3)
    [group] = await stage.settled("b", "ok")
    assert spans(group) == [(3, 0, 2)]


async def test_an_adapter_that_the_engine_refuses_is_a_failure_and_the_rest_serves_on(stage: Stage) -> None:
    owner = FakeOwner(lora="runtime", adapter_slots=4)
    host = await stage.host(owner)
    owner.engine.refusals["/lora/1"] = WeightsRefused("rank 64 is over 16")
    await publish_adapter(stage, 1)
    answer = await answered(stage, "failed", version=1)
    assert b"rank 64" in answer[b"error"]
    await publish_adapter(stage, 2)
    await stage.pool.wait_for_policy(2, timeout=10.0)
    assert host.status().adapters == f"{RUN}:2"


async def test_an_engine_that_takes_adapters_at_launch_is_started_with_the_last_few(stage: Stage) -> None:
    owner = FakeOwner(lora="launch", adapter_slots=2)
    await stage.host(owner)
    for version in (1, 2, 3):
        await publish_adapter(stage, version)
        await stage.pool.wait_for_policy(version, timeout=10.0)
    assert owner.launched_adapters == [[], ["r.g0.v1"], ["r.g0.v2", "r.g0.v1"], ["r.g0.v3", "r.g0.v2"]]
    await stage.enqueue(1, batch_id="b", policy_version=2, exact=True)
    [group] = await stage.settled("b", "ok")
    assert spans(group) == [(2, 0, 2)]


async def test_an_engine_without_adapters_gets_them_merged_and_runs_no_other_runs_jobs_on_them(stage: Stage) -> None:
    owner = FakeOwner()
    host = await stage.host(owner)
    await publish_adapter(stage, 1)
    await stage.pool.wait_for_policy(1, timeout=10.0)
    assert owner.launches == [checkpoint(0), f"{checkpoint(0)}+/lora/1"]
    assert host.status().policy is None
    await stage.enqueue(1, batch_id="b", policy_version=1)
    [group] = await stage.settled("b", "ok")
    assert spans(group) == [(1, 0, 2)]
    assert asked(owner) == [([1], None)], "an engine without adapters is never sent one"


async def test_a_new_checkpoint_ends_the_adapters_on_the_one_before(stage: Stage) -> None:
    owner = FakeOwner(lora="runtime", adapter_slots=4, swaps=True, holding=True)
    host = await stage.host(owner)
    await publish_adapter(stage, 1)
    await stage.pool.wait_for_policy(1, timeout=10.0)
    await stage.enqueue(1, batch_id="b", policy_version=1)
    await until(lambda: len(owner.engine.open) == 1)
    await publish(stage, 2)
    await answered(stage, "applied", version=2)
    assert owner.engine.adapters == {}
    assert host.status().adapters == ""
    await until(lambda: len(owner.engine.open) == 1)
    assert asked(owner)[-1] == ([1], None)
    answer_all(owner)
    [group] = await stage.settled("b", "ok")
    assert spans(group) == [(2, 0, 2)]


# Orders that are about no policy


async def test_a_paused_host_finishes_what_it_has_and_pulls_again_when_it_is_told_to(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = await stage.host(owner)
    await stage.enqueue(1, batch_id="a")
    await until(lambda: len(owner.engine.open) == 1)
    await command(stage, kind="pause")
    await answered(stage, "applied", kind="pause")
    assert host.status().state == "paused"
    await stage.enqueue(1, batch_id="b")
    answer_all(owner)
    await stage.settled("a", "ok")
    await asyncio.sleep(0.2)
    assert not owner.engine.open
    await command(stage, kind="resume")
    await until(lambda: len(owner.engine.open) == 1)
    answer_all(owner)
    await stage.settled("b", "ok")


async def test_a_drain_gives_back_what_does_not_finish_in_time_with_its_tokens(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    await stage.host(owner)
    await stage.enqueue(2, batch_id="b")
    await until(lambda: len(owner.engine.open) == 2)
    owner.engine.partial = lambda _: beginning(1, first=7)
    await command(stage, kind="drain", within_s=0.05)
    answer = await answered(stage, "applied", kind="drain")
    assert answer[b"detail"] == b"2 jobs were given back"
    await command(stage, kind="resume")
    await until(lambda: len(owner.engine.open) == 2)
    assert sorted(ids for ids, _ in asked(owner)[2:]) == [[1, 7], [2, 7]]
    answer_all(owner)
    await stage.settled("b", "ok", "ok")


async def test_orders_for_one_host_bind_no_other(stage: Stage) -> None:
    one, two = await stage.host(FakeOwner(), "one"), await stage.host(FakeOwner(), "two")
    await command(stage, kind="pause", workers=["two"])
    await until(lambda: two.status().state == "paused")
    assert one.status().state == "serving"
    await answered(stage, "applied", kind="pause")
    assert {ack.split()[0] for ack in await stage.acks()} == {"two"}


async def test_concurrency_is_what_was_said_last_also_for_a_host_that_comes_later(stage: Stage) -> None:
    owner = FakeOwner(slots=8, holding=True)
    host = await stage.host(owner)
    usual = host.status().target
    await command(stage, kind="concurrency", concurrency=2)
    await answered(stage, "applied", kind="concurrency")
    await stage.enqueue(5, batch_id="b")
    await until(lambda: len(owner.engine.open) == 2)
    late = await stage.host(FakeOwner(slots=8), "late")
    assert late.status().target == 2
    await command(stage, kind="concurrency")
    await until(lambda: host.status().target == usual == late.status().target)
    owner.engine.reply = lambda _: completion()
    answer_all(owner)
    await stage.settled("b", *["ok"] * 5)


async def test_a_flush_reaches_the_engine_and_a_shutdown_ends_the_host(stage: Stage) -> None:
    owner = FakeOwner()
    async with stage.hosted(owner) as serving:
        await until(lambda: bool(owner.engines))
        await command(stage, kind="flush")
        await answered(stage, "applied", kind="flush")
        assert owner.engine.flushed == 1
        await command(stage, kind="shutdown")
        await asyncio.wait_for(serving, 10.0)
    await answered(stage, "applied", kind="shutdown")
    again = await stage.host(FakeOwner(), "again")
    assert again.status().state == "serving", "an old order to shut down is not obeyed"


async def test_cancelled_jobs_leave_the_engine_and_the_host_says_so(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host: Host = await stage.host(owner)
    batch = await stage.enqueue(2, batch_id="b")
    await until(lambda: len(owner.engine.open) == 2)
    await batch.cancel()
    await command(stage, kind="cancel", run=RUN)
    await answered(stage, "applied", kind="cancel")
    assert not host.busy
    await stage.settled("b", "cancelled", "cancelled")


async def test_an_engine_that_was_killed_as_it_started_says_nothing_of_its_policy(stage: Stage) -> None:
    owner = FakeOwner()
    host = await stage.host(owner)
    owner.killings = 1
    await publish(stage, 1)
    await answered(stage, "applied", version=1)
    assert owner.launches == [checkpoint(0), checkpoint(1), checkpoint(1)]
    owner.killings = 2
    await publish(stage, 2)
    await answered(stage, "failed", version=2)
    await until(lambda: host.status().state == "serving" and host.status().policy == 1)


async def test_a_host_that_goes_back_pulls_nothing_more_while_it_waits_for_its_turn(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    await stage.host(owner)
    for version in (1, 2):
        await publish(stage, version)
        await stage.pool.wait_for_policy(version, timeout=10.0)
    await stage.server.zadd(stage.keys.rollout, {"another": 9e15})
    await stage.pool.rollback_policy(1)
    await until(lambda: owner.staged.count(checkpoint(1)) > 1)
    await stage.enqueue(1, batch_id="b", policy_version=1)
    await asyncio.sleep(0.3)
    assert not owner.engine.open
    await stage.server.zrem(stage.keys.rollout, "another")
    await until(lambda: len(owner.engine.open) == 1)
    assert owner.launches[-1] == checkpoint(1)
    answer_all(owner)
    await stage.settled("b", "ok")


async def test_a_restarted_worker_frees_the_turn_it_had(stage: Stage) -> None:
    await stage.server.zadd(stage.keys.rollout, {"w": 9e15})
    await stage.host(FakeOwner())
    assert not await stage.server.exists(stage.keys.rollout)
