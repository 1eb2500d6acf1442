"""A host in this process, with a real server and an engine that does what the test says.

Each test ends with the books in order: every job enqueued is settled once or still open, and nobody holds an entry.
"""

import asyncio
import contextlib
import importlib
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
from fakes import FakeEngine, FakeOwner, Reply, Request, completion, job
from stage import POOL, RUN, Stage, answered, make_quick, running, staged
from waiting import until

from rollpool.ops.local.server import LocalServer
from rollpool.producer import AsyncRolloutPool
from rollpool.schemas import GROUP, Command, EngineUnavailable, Keys, Policy
from rollpool.schemas.wire import pack, pack_model, unpack_job
from rollpool.worker import host as host_module
from rollpool.worker.engines.protocol import ChatRequest, RequestRefused, SampleRequest
from rollpool.worker.policy import follow


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


# Settling


async def test_every_job_is_settled_once(stage: Stage) -> None:
    owner = FakeOwner()
    host = await stage.host(owner)
    await stage.enqueue(200, n=2, batch_id="b", metadata=[{"answer": index} for index in range(200)])
    groups = await stage.settled("b", *["ok"] * 200)
    assert [group.metadata for group in groups] == [{"answer": index} for index in range(200)]
    assert [group.prompt_ids.tolist() for group in groups] == [[index + 1] for index in range(200)]
    assert all(len(group.samples) == 2 and group.worker == "w" for group in groups)
    await until(lambda: not host.busy)
    assert (host.settled, host.failed, answered(owner)) == (200, 0, 400)
    assert owner.engine.most_open <= host.status().target


async def test_two_hosts_share_the_work_and_settle_each_job_once(stage: Stage) -> None:
    owners = [FakeOwner(holding=True) for _ in range(2)]
    hosts = [await stage.host(owner, name) for owner, name in zip(owners, ("one", "two"), strict=True)]
    await stage.enqueue(100, batch_id="b")
    await until(lambda: all(owner.engine.open for owner in owners))
    for owner in owners:
        owner.engine.reply = lambda _: completion()
        for call in list(owner.engine.open.values()):
            call.answer.set_result(completion())
    await stage.settled("b", *["ok"] * 100)
    await until(lambda: sum(host.settled for host in hosts) == 100)
    assert all(host.settled > 0 for host in hosts)


async def test_a_job_larger_than_the_target_runs_whole(stage: Stage) -> None:
    owner = FakeOwner(slots=2)
    host = await stage.host(owner)
    await stage.enqueue(2, n=40, batch_id="b")
    groups = await stage.settled("b", "ok", "ok")
    assert [len(group.samples) for group in groups] == [40, 40]
    assert owner.engine.most_open <= host.status().target < 40


async def test_a_group_is_settled_whole_or_not_at_all(stage: Stage) -> None:
    owner = FakeOwner(slots=8, holding=True)
    await stage.host(owner)
    await stage.enqueue(n=4, batch_id="b")
    await until(lambda: len(owner.engine.open) == 4)
    for call in list(owner.engine.open.values())[:3]:
        call.answer.set_result(completion())
    await until(lambda: len(owner.engine.open) == 1)
    assert await stage.states("b") == ["open"]
    next(iter(owner.engine.open.values())).answer.set_result(completion())
    [group] = await stage.settled("b", "ok")
    assert len(group.samples) == 4


async def test_the_high_lane_goes_first(stage: Stage) -> None:
    owner = FakeOwner(slots=1, holding=True)
    await stage.enqueue(prompts=[[1]], batch_id="low", lane="low")
    await stage.enqueue(prompts=[[2]], batch_id="default")
    await stage.enqueue(prompts=[[3]], batch_id="high", lane="high")
    await stage.host(owner, oversubscription=1.0)
    for _ in range(3):
        await until(lambda: len(owner.engine.open) == 1)
        call = next(iter(owner.engine.open.values()))
        call.answer.set_result(completion())
        await until(lambda call=call: call.request.rid not in owner.engine.open)  # type: ignore[misc]
    for batch in ("low", "default", "high"):
        await stage.settled(batch, "ok")
    sent = [call.request.input_ids.tolist() for call in owner.engine.calls if isinstance(call.request, SampleRequest)]
    assert sent == [[3], [2], [1]]


async def test_a_run_that_comes_later_does_not_wait_for_one_that_is_never_empty(stage: Stage) -> None:
    owner = FakeOwner(slots=1, holding=True)
    await stage.enqueue(50, batch_id="b")
    await stage.host(owner)
    async with AsyncRolloutPool(stage.url, pool=POOL, run="later") as later:
        await later.enqueue_prompts([[999]], policy_version=0, batch_id="late")
        while [999] not in [call.request.input_ids.tolist() for call in owner.engine.calls]:  # type: ignore[union-attr]
            await until(lambda: bool(owner.engine.open))
            assert await stage.server.xlen(stage.keys.jobs(RUN, "default")) > 0, "the first run went first, whole"
            for call in list(owner.engine.open.values()):
                if not call.answer.done():
                    call.answer.set_result(completion())
            await asyncio.sleep(0.01)


async def test_a_cancelled_job_is_not_run(stage: Stage) -> None:
    batch = await stage.enqueue(3, batch_id="b")
    await batch.cancel()
    owner = FakeOwner()
    host = await stage.host(owner)
    await until(lambda: host.idle_seconds() > 0)
    assert answered(owner) == 0
    await stage.settled("b", *["cancelled"] * 3)


async def test_a_result_that_comes_after_its_job_was_cancelled_is_dropped(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = await stage.host(owner)
    batch = await stage.enqueue(1, batch_id="b")
    await until(lambda: len(owner.engine.open) == 1)
    await batch.cancel()
    for call in owner.engine.open.values():
        call.answer.set_result(completion())
    await until(lambda: not host.busy)
    await stage.settled("b", "cancelled")
    assert host.settled == 0


# What is no job, or may not run


def malformed(good: dict[bytes, bytes]) -> list[dict[Any, Any]]:
    """Entries that are no jobs; those whose fields name an open job, or none, are dead letters, the others vanish."""
    body = good[b"body"]
    return [
        {"x": "y"},
        {"job": "b/0"},
        {"job": "b/0", "run": RUN, "body": body[: len(body) // 2]},
        {"job": "b/1", "run": RUN, "body": b"\xc1"},
        {"job": "b/2", "run": RUN, "body": pack({"schema": 2})},
        {"job": "b/x", "run": RUN, "body": pack([1, 2])},
        {"job": "b/" + "9" * 5000, "run": RUN, "body": body},
        {"job": "b/²", "run": RUN, "body": body},
        {"job": b"\xff/0", "run": b"\xff", "body": body},
        {"job": "../0", "run": "a:b", "body": body},
        {"job": "b/9", "run": RUN, "body": pack({**unpack_job(body).__dict__, "schema": 1, "n": "many"})},
        {"job": "b/9", "run": "other", "body": body},
        {f"field{number}": "x" for number in range(3000)},
    ]


async def test_malformed_entries_are_dead_lettered_and_the_host_goes_on(stage: Stage) -> None:
    await stage.enqueue(4, batch_id="b")
    stream = stage.keys.jobs(RUN, "default")
    [*_, (last, good)] = await stage.server.xrange(stream)
    await stage.server.xtrim(stream, maxlen=1, approximate=False)
    for fields in malformed(good):
        await stage.server.xadd(stream, fields)
    foreign = {**good, "attempts": "9" * 5000, "faults": "-1", "foreign": "field"}
    await stage.server.xadd(stream, foreign)
    await stage.server.xdel(stream, last)
    host = await stage.host(FakeOwner())
    groups = await stage.settled("b", "failed", "failed", "failed", "ok")
    assert "no schema number" not in (groups[1].error or "")
    await until(lambda: not host.busy)
    letters = [fields.get(b"job", b"") for fields in await stage.dead()]
    assert Counter(letters) == {b"": 2, b"b/0": 2, b"b/1": 1, b"b/2": 1, b"b/x": 1, "b/²".encode(): 1}


async def test_malformed_entries_that_come_to_an_idle_host_do_not_end_it(stage: Stage) -> None:
    host = await stage.host(FakeOwner())
    await stage.enqueue(3, batch_id="b")
    await stage.settled("b", "ok", "ok", "ok")
    stream = stage.keys.jobs(RUN, "default")
    good = {b"body": pack_model(job(run=RUN))}
    for fields in malformed(good):
        await until(lambda: host.idle_seconds() > 0)
        await stage.server.xadd(stream, fields)

        async def gone() -> bool:
            return not await stage.server.xlen(stream)

        await until(gone)
    await stage.enqueue(1, batch_id="after")
    await stage.settled("after", "ok")


async def test_an_entry_in_a_stream_without_its_group_harms_nobody(stage: Stage) -> None:
    await stage.enqueue(1, batch_id="b")
    await stage.server.xadd(stage.keys.jobs(RUN, "high"), {"x": "y"})
    await stage.host(FakeOwner())
    await stage.settled("b", "ok")
    await until(lambda: stage.dead())
    assert len(await stage.dead()) == 1


async def test_a_job_that_the_engine_refuses_fails_and_is_a_dead_letter(stage: Stage) -> None:
    owner = FakeOwner()
    host = await stage.host(owner)

    def reply(request: Request) -> Reply:
        assert isinstance(request, SampleRequest)
        return RequestRefused("the prompt is too long") if request.input_ids[0] == 2 else completion()

    owner.engine.reply = reply
    await stage.enqueue(3, n=3, batch_id="b", metadata=["x", "y", "z"])
    groups = await stage.settled("b", "ok", "failed", "ok")
    assert (groups[1].error, groups[1].metadata, groups[1].samples) == ("the prompt is too long", "y", ())
    [dead] = await stage.dead()
    assert dead[b"error"] == b"the prompt is too long"
    assert unpack_job(dead[b"body"]).index == 1
    await until(lambda: (host.settled, host.failed) == (2, 1))


async def test_text_without_a_tokenizer_fails_the_job_alone(stage: Stage) -> None:
    await stage.enqueue(prompts=["text"], batch_id="text")
    await stage.enqueue(prompts=[[1]], batch_id="ids")
    await stage.host(FakeOwner())
    [group] = await stage.settled("text", "failed")
    assert "no tokenizer.json" in (group.error or "")
    await stage.settled("ids", "ok")


async def test_a_chat_goes_to_the_engine_as_messages(stage: Stage) -> None:
    owner = FakeOwner()
    await stage.host(owner)
    await stage.enqueue(prompts=["hi"], batch_id="b", endpoint="chat", logprobs=False)
    await stage.settled("b", "ok")
    assert isinstance(owner.engine.calls[0].request, ChatRequest)


async def test_a_job_past_its_deadline_expires(stage: Stage) -> None:
    await stage.enqueue(2, batch_id="b", deadline=0.001)
    await asyncio.sleep(0.01)
    await stage.enqueue(1, batch_id="c", deadline=60)
    owner = FakeOwner()
    await stage.host(owner)
    await stage.settled("c", "ok")
    groups = await stage.settled("b", "expired", "expired")
    assert "deadline" in (groups[0].error or "")
    assert answered(owner) == 1
    assert await stage.dead() == []


async def test_a_job_that_used_up_its_attempts_is_dead(stage: Stage) -> None:
    owner = FakeOwner()
    await stage.host(owner, max_attempts=3)

    def reply(request: Request) -> Reply:
        assert isinstance(request, SampleRequest)
        return EngineUnavailable("500 Internal Server Error") if request.input_ids[0] == 2 else completion()

    owner.engine.reply = reply
    await stage.enqueue(3, batch_id="b")
    groups = await stage.settled("b", "ok", "failed", "ok")
    assert "3 workers or engines were lost" in (groups[1].error or "")
    [dead] = await stage.dead()
    assert dead[b"attempts"] == b"3"


# Policies


async def test_a_policy_change_finishes_what_runs_and_serves_the_new_one(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = await stage.host(owner, change_mode="drain")
    await stage.enqueue(20, batch_id="old")
    await until(lambda: len(owner.engine.open) == host.status().target)
    await stage.pool.publish_policy(3, checkpoint="/policy/3", check=False)
    await until(lambda: host.status().state == "changing")
    await until(lambda: host.status().jobs_in_flight == host.status().target)  # the rest was given back at once
    owner.holding = False
    for call in list(owner.engine.open.values()):
        call.answer.set_result(completion(first=0))
    groups = await stage.settled("old", *["ok"] * 20)
    by_policy = Counter(group.samples[0].version_spans[0].version for group in groups)
    assert by_policy == {0: host.status().target, 3: 20 - host.status().target}
    for group in groups:  # what made the tokens is what the result says
        assert group.samples[0].output_ids[0] == group.samples[0].version_spans[0].version
    assert owner.launches == ["/policy/0", "/policy/3"]
    await stage.pool.wait_for_policy(3, timeout=30)
    assert await stage.acks() == ["w received 3", "w applied 3"]
    await until(lambda: not_there(stage))


async def test_a_drain_that_takes_too_long_gives_back_without_charging_an_attempt(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = await stage.host(owner, drain_s=0.05, change_mode="drain")
    await stage.enqueue(1, n=2, batch_id="b")
    await until(lambda: len(owner.engine.open) == 2)
    before = owner.engine
    owner.holding = False
    await stage.pool.publish_policy(1, checkpoint="/policy/1", check=False)
    [group] = await stage.settled("b", "ok")
    assert len(before.aborted) == 2
    assert {sample.version_spans[0].version for sample in group.samples} == {1}
    assert host.status().engine_restarts == 0


async def test_a_late_host_starts_on_the_newest_policy_and_answers_each_command_once(stage: Stage) -> None:
    for version in range(1, 6):
        await stage.pool.publish_policy(version, checkpoint=f"/policy/{version}", check=False)
    owner = FakeOwner()
    await stage.host(owner)
    assert owner.launches == ["/policy/5"]

    async def answered_once() -> bool:
        return await stage.acks() == ["w received 5", "w applied 5"]

    await until(answered_once)


async def test_a_host_without_a_model_waits_for_the_first_policy(stage: Stage) -> None:
    owner = FakeOwner()
    host = await stage.host(owner, serving=False, initial=None)
    await until(lambda: "no policy was published" in host.status().error)
    await stage.pool.publish_policy(4, checkpoint="/policy/4", check=False)
    await until(lambda: host.status().policy == 4)


async def test_two_hosts_change_in_turn(stage: Stage) -> None:
    owners = [FakeOwner(), FakeOwner()]
    hosts = [await stage.host(owner, name) for owner, name in zip(owners, ("one", "two"), strict=True)]
    for owner in owners:
        owner.gate = asyncio.Event()
    await stage.pool.publish_policy(1, checkpoint="/policy/1", check=False)
    for turn_of in range(2):
        await until(lambda: any(len(owner.launches) == 2 and owner.open_now == 0 for owner in owners))
        [changing] = [host for host in hosts if host.status().state == "changing"]
        [other] = [host for host in hosts if host is not changing]
        assert await stage.server.zrange(stage.keys.rollout, 0, -1) == [changing.status().name.encode()]
        await asyncio.sleep(0.2)  # ten tries of the other
        assert other.status().state == "serving"
        assert other.status().policy == turn_of
        gate = owners[hosts.index(changing)].gate
        assert gate is not None
        gate.set()
        await until(lambda changing=changing: changing.status().policy == 1)  # type: ignore[misc]
    await until(lambda: not_there(stage))
    assert all(owner.launches == ["/policy/0", "/policy/1"] for owner in owners)


async def not_there(stage: Stage) -> bool:
    return not await stage.server.exists(stage.keys.rollout)


async def test_a_policy_that_does_not_start_is_rolled_back_and_the_old_one_serves(stage: Stage) -> None:
    owner = FakeOwner(faults={"/policy/1": "out of memory"})
    host = await stage.host(owner)
    await stage.pool.publish_policy(1, checkpoint="/policy/1", check=False)
    await until(lambda: len(owner.launches) == 3 and host.status().state == "serving")
    assert owner.launches == ["/policy/0", "/policy/1", "/policy/0"]
    await stage.enqueue(2, batch_id="b")
    groups = await stage.settled("b", "ok", "ok")
    assert {group.samples[0].version_spans[0].version for group in groups} == {0}
    assert await stage.acks() == ["w received 1", "w failed 1"]
    assert (await stage.server.xrange(stage.keys.acks))[-1][1][b"error"] == b"out of memory"
    await until(lambda: not_there(stage))
    await stage.pool.publish_policy(2, checkpoint="/policy/2", check=False)  # the next one is tried again
    await until(lambda: host.status().policy == 2)


async def test_a_policy_whose_checkpoint_is_not_there_costs_the_serving_engine_nothing(stage: Stage) -> None:
    owner = FakeOwner()
    owner.missing["/policy/1"] = "there is no model at /policy/1"
    host = await stage.host(owner)
    await stage.pool.publish_policy(1, checkpoint="/policy/1", check=False)

    async def answered_failed() -> bool:
        return await stage.acks() == ["w received 1", "w failed 1"]

    await until(answered_failed)
    assert owner.launches == ["/policy/0"]
    assert host.status().policy == 0
    assert "no model at /policy/1" in host.status().error
    await until(lambda: not_there(stage))


async def test_a_policy_that_failed_on_one_host_is_not_tried_on_the_others(stage: Stage) -> None:
    owners = [FakeOwner(faults={"/policy/1": "out of memory"}) for _ in range(2)]
    hosts = [await stage.host(owner, name) for owner, name in zip(owners, ("one", "two"), strict=True)]
    await stage.pool.publish_policy(1, checkpoint="/policy/1", check=False)

    async def both_answered() -> bool:
        return sum(" failed " in ack for ack in await stage.acks()) == 2

    await until(both_answered)
    await until(lambda: all(host.status().state == "serving" for host in hosts))
    assert sorted(len(owner.launches) for owner in owners) == [1, 3]
    await until(lambda: any("not tried here, since it failed on" in host.status().error for host in hosts))
    await until(lambda: not_there(stage))


async def test_a_checkpoint_with_a_broken_template_is_a_policy_that_does_not_start(
    stage: Stage, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "1"
    checkpoint.mkdir()
    (checkpoint / "chat_template.jinja").write_text("{% for %}")
    owner = FakeOwner()
    host = await stage.host(owner)
    await stage.pool.publish_policy(1, checkpoint=str(checkpoint), check=False)

    async def failed() -> bool:
        return "w failed 1" in await stage.acks()

    await until(failed)
    assert (host.status().state, host.status().policy) == ("serving", 0)
    assert owner.launches == ["/policy/0"]


async def test_a_broken_host_neither_keeps_the_turn_nor_condemns_the_policy(stage: Stage) -> None:
    owners = [FakeOwner(), FakeOwner()]
    hosts = [await stage.host(owner, name) for owner, name in zip(owners, ("one", "two"), strict=True)]
    for owner in owners:
        owner.gate = asyncio.Event()
    await stage.pool.publish_policy(1, checkpoint="/policy/1", check=False)
    await until(lambda: any(host.status().state == "changing" for host in hosts))
    first = next(index for index, host in enumerate(hosts) if host.status().state == "changing")
    owners[first].faults = {f"/policy/{version}": "the TPU is gone" for version in range(2)}
    for owner in owners:
        assert owner.gate is not None
        owner.gate.set()
    await until(lambda: hosts[first].status().state == "broken")
    await until(lambda: hosts[1 - first].status().policy == 1)


async def test_a_job_for_a_newer_policy_waits_outside_and_runs_after_the_change(stage: Stage) -> None:
    owner = FakeOwner()
    host = await stage.host(owner)
    await stage.enqueue(20, policy_version=2, max_staleness=0, batch_id="newer")
    await stage.enqueue(1, policy_version=2, max_staleness=2, batch_id="may")

    async def parked() -> bool:
        return bool(await stage.server.zcard(stage.keys.parked(RUN)) == 20)

    await until(parked)
    [group] = await stage.settled("may", "ok")
    assert group.samples[0].version_spans[0].version == 0
    await until(lambda: host.idle_seconds() > 0)  # parked jobs keep nobody busy
    assert await stage.states("newer") == ["open"] * 20
    await stage.pool.publish_policy(2, checkpoint="/policy/2", check=False)
    groups = await stage.settled("newer", *["ok"] * 20)
    assert {group.samples[0].version_spans[0].version for group in groups} == {2}


async def test_an_exact_job_whose_version_nobody_serves_any_more_is_stale(stage: Stage) -> None:
    owner = FakeOwner()
    await stage.pool.publish_policy(5, checkpoint="/policy/5", check=False)
    await stage.host(owner)
    await stage.enqueue(2, policy_version=4, exact=True, batch_id="b")
    await stage.enqueue(1, policy_version=5, exact=True, batch_id="c")
    groups = await stage.settled("b", "stale", "stale")
    assert "exact job for policy 4" in (groups[0].error or "")
    await stage.settled("c", "ok")
    assert answered(owner) == 1


async def test_an_exact_job_goes_to_the_host_that_still_serves_its_version(stage: Stage) -> None:
    behind = FakeOwner(holding=True)
    old = await stage.host(behind, "old", change_mode="drain")
    await stage.enqueue(1, batch_id="keeps-old-busy")
    await until(lambda: len(behind.engine.open) == 1)
    await stage.pool.publish_policy(1, checkpoint="/policy/1", check=False)
    await until(lambda: old.status().state == "changing")
    await until(lambda: heartbeat_says(stage, "old", 0))
    new = await stage.host(FakeOwner(), "new")
    assert new.status().policy == 1
    await stage.enqueue(1, policy_version=0, exact=True, batch_id="b")

    async def waits() -> int:
        return int(await stage.server.zcard(stage.keys.exact(RUN)))

    await until(waits)
    assert await stage.states("b") == ["open"]
    for call in list(behind.engine.open.values()):
        call.answer.set_result(completion())
    await stage.settled("keeps-old-busy", "ok")
    await stage.settled("b", "stale")  # the old one has changed by now


async def heartbeat_says(stage: Stage, name: str, policy: int) -> bool:
    status = await stage.heartbeat(name)
    return status is not None and status.policy == policy


# Engines that die


async def test_an_engine_that_dies_charges_nobody_in_company_and_is_restarted(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = await stage.host(owner)
    await stage.enqueue(3, n=2, batch_id="b")
    await until(lambda: len(owner.engine.open) == host.status().target)
    owner.holding, owner.gate = False, asyncio.Event()
    owner.die()
    await until(lambda: len(owner.launches) == 2 and not host.busy)
    records = await stage.records()
    assert {job: (record.attempts, record.faults) for job, record in records.items()} == {
        f"b/{index}": (0, 0) for index in range(3)
    }
    assert all(record.company == 3 for record in records.values() if record.losses)
    assert "its engine died with 3 jobs in it" in records["b/0"].history
    owner.gate.set()
    await stage.settled("b", "ok", "ok", "ok")
    assert host.status().engine_restarts == 1


async def test_a_job_that_kills_engines_ends_dead_and_takes_no_innocent_with_it(stage: Stage) -> None:
    owner = FakeOwner(slots=10)

    def die_of_it(engine: FakeEngine) -> None:
        if engine is owner.engine and engine.dead is None:
            owner.die()

    def reply(request: Request) -> Reply:
        assert isinstance(request, SampleRequest)
        if request.input_ids[0] == 5:
            asyncio.get_running_loop().call_later(0.02, die_of_it, owner.engine)
        return None

    async def answer_the_innocent() -> None:
        while True:
            await asyncio.sleep(0.05)
            for call in list(owner.engine.open.values()):
                if (
                    isinstance(call.request, SampleRequest)
                    and call.request.input_ids[0] != 5
                    and not call.answer.done()
                ):
                    call.answer.set_result(completion())

    owner.reply = reply
    host = await stage.host(owner, oversubscription=1.2)
    answering = asyncio.create_task(answer_the_innocent())
    await stage.enqueue(12, batch_id="b")
    groups = await stage.settled("b", *["ok"] * 4, "failed", *["ok"] * 7)
    assert "died while they had this job alone" in (groups[4].error or "")
    [dead] = await stage.dead()
    answering.cancel()
    assert (dead[b"job"], dead[b"faults"]) == (b"b/4", b"2")
    assert dead[b"history"].count(b"its engine died") == int(dead[b"losses"])
    assert unpack_job(dead[b"body"]).id == "b/4"
    # One death at first sight, one for each smaller company, two alone.
    assert host.status().engine_restarts <= 5


async def test_a_host_that_lost_a_job_twice_leaves_it_to_another(stage: Stage) -> None:
    sick, well = FakeOwner(), FakeOwner()
    sick.reply = lambda _: EngineUnavailable("500 Internal Server Error")
    await stage.enqueue(1, batch_id="b")
    await stage.host(sick, "sick", max_attempts=3)
    await until(lambda: answered(sick) >= 6)  # twice lost, three calls each
    await stage.host(well, "well", max_attempts=3)
    [group] = await stage.settled("b", "ok")
    assert group.worker == "well"


async def test_a_sample_that_the_engine_forgot_is_made_again(stage: Stage) -> None:
    owner = FakeOwner(slots=2)
    first = iter([True])
    owner.reply = lambda _: None if next(first, False) else completion()
    host = await stage.host(owner, sample_timeout_s=0.2)
    await stage.enqueue(4, batch_id="b")
    await stage.settled("b", *["ok"] * 4)
    assert owner.engine.calls[0].cancelled
    assert host.status().engine_restarts == 0


async def test_a_neighbour_that_left_just_before_a_death_was_company(stage: Stage) -> None:
    """A killer hangs its engine and is cancelled; only then the engine counts as dead, and the other is alone in it."""
    owner = FakeOwner(holding=True)
    host = await stage.host(owner, lease_s=600.0)
    killer = await stage.enqueue(1, batch_id="killer")
    await stage.enqueue(1, batch_id="innocent")
    await until(lambda: len(owner.engine.open) == 2)
    await killer.cancel()
    await until(lambda: len(owner.engine.open) == 1)
    owner.gate, owner.holding = asyncio.Event(), False
    owner.die("it made no progress")
    await until(lambda: len(owner.launches) == 2 and not host.busy)
    assert (await stage.records())["innocent/0"].company == 2
    owner.gate.set()
    await stage.settled("innocent", "ok")


async def test_a_job_that_only_this_host_may_run_is_not_left_to_one_that_may_not(stage: Stage) -> None:
    await stage.host(FakeOwner(), "old")
    new, failing = FakeOwner(), [EngineUnavailable("500")] * 6  # twice lost, three calls each
    new.reply = lambda _: failing.pop() if failing else completion()
    await stage.host(new, "new", initial="/policy/1", initial_version=1)
    await stage.enqueue(1, batch_id="b", policy_version=1, max_staleness=0)
    [group] = await stage.settled("b", "ok")
    assert group.worker == "new"


async def test_a_group_of_enough_samples_has_its_prompt_where_no_engine_saw_it_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("rollpool.schemas.scripts.finish")  # its name is also a function's
    monkeypatch.setattr(module, "EXPIRE_GRACE_MS", 600_000)  # the server itself is not to end it
    first = FakeOwner(slots=8, holding=True)
    host = stage.made(first, "first", drain_s=0.0)
    async with running(host):
        await until(lambda: host.status().state == "serving")
        await stage.enqueue(n=4, min_samples=2, batch_id="b", prompts=[[7, 8, 9]], deadline=4.0)
        await until(lambda: len(first.engine.open) == 4)
        for call in list(first.engine.open.values())[:3]:
            call.answer.set_result(completion())
        await until(lambda: len(first.engine.open) == 1)
    await asyncio.sleep(4.0)  # until it is over
    await stage.host(FakeOwner(slots=8, holding=True), "second")
    [group] = await stage.settled("b", "ok")
    assert (len(group.samples), group.prompt_ids.tolist()) == (3, [7, 8, 9])


# Deadlines, cancelling, parts


async def test_a_deadline_ends_what_runs(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = await stage.host(owner)
    await stage.enqueue(1, batch_id="b", deadline=0.5)
    await until(lambda: len(owner.engine.open) == 1)
    [group] = await stage.settled("b", "expired")
    assert "0 of 1 samples" in (group.error or "")
    await until(lambda: not owner.engine.open and not host.busy)
    assert owner.engine.calls[0].cancelled


async def test_a_deadline_ends_what_waits_for_a_policy_that_never_comes(stage: Stage) -> None:
    await stage.host(FakeOwner())
    await stage.enqueue(1, batch_id="b", policy_version=7, max_staleness=0, deadline=0.5)
    await stage.settled("b", "expired")
    assert await stage.server.zcard(stage.keys.parked(RUN)) == 0


async def test_enough_samples_are_a_group_when_the_deadline_comes(stage: Stage) -> None:
    owner = FakeOwner(slots=8, holding=True)
    await stage.host(owner)
    await stage.enqueue(1, n=4, min_samples=2, batch_id="b", deadline=1.5)
    await until(lambda: len(owner.engine.open) == 4)
    for call in list(owner.engine.open.values())[:3]:
        call.answer.set_result(completion())
    [group] = await stage.settled("b", "ok")
    assert len(group.samples) == 3


async def test_cancelling_frees_the_engine_at_once(stage: Stage) -> None:
    owner = FakeOwner(slots=4, holding=True)
    host = await stage.host(owner, lease_s=600.0)  # renewals alone would take minutes to tell
    batch = await stage.enqueue(3, batch_id="b")
    await until(lambda: len(owner.engine.open) == 3)
    await until(lambda: host.status().state == "serving")
    assert await batch.cancel() == 3
    await until(lambda: not owner.engine.open and not host.busy)
    await stage.settled("b", *["cancelled"] * 3)


async def test_finished_samples_go_with_a_job_that_is_given_back(stage: Stage) -> None:
    first, second = FakeOwner(slots=8, holding=True), FakeOwner(slots=8, holding=True)
    host = stage.made(first, "first", drain_s=0.0)
    async with running(host):
        await until(lambda: host.status().state == "serving")
        await stage.enqueue(1, n=4, batch_id="b")
        await until(lambda: len(first.engine.open) == 4)
        for call in list(first.engine.open.values())[:3]:
            call.answer.set_result(completion(first=100))
        await until(lambda: len(first.engine.open) == 1)
    await stage.host(second, "second")
    await until(lambda: len(second.engine.open) == 1)
    next(iter(second.engine.open.values())).answer.set_result(completion(first=200))
    [group] = await stage.settled("b", "ok")
    assert sorted(int(sample.output_ids[0]) for sample in group.samples) == [100, 100, 100, 200]
    assert answered(second) == 1


async def test_parts_of_a_group_run_on_two_hosts_and_come_back_as_one(stage: Stage) -> None:
    owners = [FakeOwner(slots=2, holding=True) for _ in range(2)]
    for owner, name in zip(owners, ("one", "two"), strict=True):
        await stage.host(owner, name, oversubscription=1.0)
    await stage.enqueue(1, n=4, split=2, batch_id="b")
    await until(lambda: all(len(owner.engine.open) == 2 for owner in owners))
    for number, owner in enumerate(owners):
        assert await stage.states("b") == ["open"]
        for call in list(owner.engine.open.values()):
            call.answer.set_result(completion(first=100 * number))
        await until(lambda owner=owner: not owner.engine.open)  # type: ignore[misc]
    [group] = await stage.settled("b", "ok")
    assert sorted(int(sample.output_ids[0]) for sample in group.samples) == [0, 0, 100, 100]
    assert sorted(group.worker.split(",")) == ["one", "two"]


async def test_a_run_whose_results_nobody_reads_stops_and_the_others_go_on(stage: Stage) -> None:
    owner = FakeOwner()
    owner.reply = lambda _: completion(tokens=30_000)  # some 240 KB a result
    host = await stage.host(owner, unread_mib=1)
    batch = await stage.enqueue(40, batch_id="b")
    await until(lambda: host.settled > 0 and host.idle_seconds() > 0)
    made = host.settled
    assert 1 << 20 <= 240_000 * made < 5 << 20
    async with AsyncRolloutPool(stage.url, pool=POOL, run="other") as other:
        theirs = await other.enqueue_prompts([[1]], policy_version=0)
        assert [group.index async for group in theirs.collect(timeout=30)] == [0]
    assert (await stage.states("b")).count("open") == 40 - made
    assert len([group async for group in batch.collect(timeout=60)]) == 40  # reading lets them be made


async def test_a_dead_engine_costs_the_backlog_nothing_until_it_is_noticed(stage: Stage) -> None:
    owner = FakeOwner(slots=4, holding=True)
    host = await stage.host(owner)
    await stage.enqueue(100, batch_id="b")
    await until(lambda: len(owner.engine.open) == host.status().target)
    owner.engine.fail_all(EngineUnavailable("connection refused"))
    await asyncio.sleep(0.3)
    assert await stage.server.zcard(stage.keys.delayed) == 0
    assert len(owner.engine.calls) <= 2 * host.status().target
    owner.holding = False
    owner.die()
    await stage.settled("b", *["ok"] * 100)
    assert await stage.dead() == []


async def test_the_same_version_from_another_checkpoint_is_another_policy(stage: Stage) -> None:
    owner = FakeOwner()
    host = await stage.host(owner)  # on engine.model_path, as version 0
    await stage.pool.publish_policy(0, checkpoint="/policy/7", check=False)
    await until(lambda: len(owner.launches) == 2 and host.status().state == "serving")
    assert owner.launches == ["/policy/0", "/policy/7"]

    async def answered_applied() -> bool:
        return await stage.acks() == ["w received 0", "w applied 0"]

    await until(answered_applied)


async def test_a_host_that_starts_after_a_failed_policy_serves_what_the_others_do(stage: Stage) -> None:
    faults = {"/policy/2": "out of memory"}
    await stage.host(FakeOwner(faults=faults), "old")
    await stage.pool.publish_policy(1, checkpoint="/policy/1", check=False)
    await stage.pool.publish_policy(2, checkpoint="/policy/2", check=False)

    async def failed() -> bool:
        return "old failed 2" in await stage.acks()

    await until(failed)
    owner = FakeOwner(faults=faults)
    late = await stage.host(owner, "late", initial=None)
    assert late.status().policy == 1
    assert owner.launches == ["/policy/1"]

    async def answered() -> bool:
        answers = [ack for ack in await stage.acks() if ack.startswith("late")]
        return answers == ["late received 2", "late failed 2", "late applied 1"]

    await until(answered)


async def test_an_engine_that_fails_every_call_does_not_use_up_the_backlog(stage: Stage) -> None:
    sick = FakeOwner(slots=8)
    sick.reply = lambda _: EngineUnavailable("internal server error")  # while it answers all else
    await stage.enqueue(60, batch_id="b")
    broken = await stage.host(sick, "sick")
    await stage.host(FakeOwner(slots=8), "well")
    await stage.settled("b", *["ok"] * 60)
    assert broken.status().engine_restarts > 0
    assert await stage.dead() == []


async def test_an_engine_that_dies_before_it_makes_anything_is_restarted_ever_later(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    backoff = host_module._backoff
    monkeypatch.setattr(host_module, "_backoff", lambda failures: pauses.append(backoff(failures)) or pauses[-1])  # type: ignore[func-returns-value]
    owner = FakeOwner()
    host = await stage.host(owner)
    for deaths in range(1, 5):
        await until(lambda deaths=deaths: len(owner.engines) == deaths and host.status().state == "serving")  # type: ignore[misc]
        owner.die("it died at once")
    await until(lambda: len(owner.engines) == 5 and host.status().state == "serving")
    assert pauses == [0.05, 0.1, 0.2, 0.2]
    await stage.enqueue(1, batch_id="b")
    await stage.settled("b", "ok")
    owner.die("it had worked")
    await until(lambda: len(owner.engines) == 6 and host.status().state == "serving")
    assert len(pauses) == 4


async def test_an_engine_that_does_not_start_is_tried_again_until_it_does(stage: Stage) -> None:
    owner = FakeOwner(faults={"/policy/0": "no TPU"})
    host = await stage.host(owner, serving=False)
    await until(lambda: len(owner.launches) > 3)
    assert (host.status().state, host.status().error) == ("broken", "no TPU")
    await stage.enqueue(1, batch_id="b")
    owner.faults = {}
    await stage.settled("b", "ok")
    assert (host.status().state, host.status().error) == ("serving", "")


def test_the_pause_before_another_start_is_bounded_after_any_number_of_failures() -> None:
    assert [host_module._backoff(failures) for failures in (1, 2, 10, 10_000)] == [0.05, 0.1, 0.2, 0.2]


async def test_a_death_at_the_moment_of_the_turn_leaves_no_turn_behind(stage: Stage) -> None:
    owner = FakeOwner()
    host = await stage.host(owner)
    await stage.server.zadd(stage.keys.rollout, {"another": 9e15})
    await stage.pool.publish_policy(1, checkpoint="/policy/1", check=False)
    await until(lambda: stage.acks())
    await asyncio.sleep(0.1)  # a few tries to get the turn
    owner.die()
    await stage.server.delete(stage.keys.rollout)
    await until(lambda: host.status().policy == 1)
    await until(lambda: not_there(stage))


# Ending, pausing, and a server that goes


async def test_a_warm_stop_finishes_what_runs_and_gives_back_the_rest(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = stage.made(owner)
    async with running(host) as task:
        await until(lambda: host.status().state == "serving")
        await stage.enqueue(20, batch_id="b")
        await until(lambda: len(owner.engine.open) == host.status().target)
        host.stop()
        await until(lambda: host.status().state == "stopping")
        for call in list(owner.engine.open.values()):
            call.answer.set_result(completion())
        await task
    assert Counter(await stage.states("b")) == {"ok": 5, "open": 15}
    assert await stage.pending() == 0
    assert await stage.heartbeat("w") is None
    entries = await stage.server.xrange(stage.keys.jobs(RUN, "default"))
    assert {fields.get(b"attempts", b"0") for _, fields in entries} == {b"0"}


async def test_a_cold_stop_gives_back_at_once(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = stage.made(owner, drain_s=300.0)
    async with running(host) as task:
        await until(lambda: host.status().state == "serving")
        await stage.enqueue(20, batch_id="b")
        await until(lambda: len(owner.engine.open) == host.status().target)
        host.stop()
        await until(lambda: host.status().state == "stopping")
        host.stop_now()
        await task
    assert await stage.states("b") == ["open"] * 20
    assert await stage.pending() == 0


async def test_a_stop_does_not_wait_for_an_engine_that_starts(stage: Stage) -> None:
    owner = FakeOwner()
    owner.gate = asyncio.Event()
    host = stage.made(owner)
    async with running(host) as task:
        await until(lambda: bool(owner.launches))
        host.stop()
        await task
    assert owner.engines == []


async def test_a_host_that_is_cancelled_leaves_nothing_running(stage: Stage) -> None:
    owner = FakeOwner()
    owner.gate = asyncio.Event()
    host = stage.made(owner)
    task = asyncio.create_task(host.run())
    await until(lambda: bool(owner.launches))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    left = [other for other in asyncio.all_tasks() if other is not asyncio.current_task()]
    assert [other for other in left if "rollpool" in repr(other.get_coro()) and "Host" in repr(other.get_coro())] == []
    owner.gate.set()
    await asyncio.sleep(0)
    assert owner.engines == []


async def test_a_paused_host_pulls_nothing_is_not_idle_and_can_be_stopped(stage: Stage) -> None:
    owner = FakeOwner()
    host = stage.made(owner)
    paused = True
    host.paused = lambda: paused
    async with running(host) as task:
        await until(lambda: host.status().state == "suspended")
        await stage.enqueue(3, batch_id="b")
        await asyncio.sleep(0.2)
        assert (await stage.states("b"), answered(owner), host.idle_seconds()) == (["open"] * 3, 0, 0.0)
        paused = False
        await stage.settled("b", "ok", "ok", "ok")
        await until(lambda: host.idle_seconds() > 0)
        paused = True
        await until(lambda: host.idle_seconds() == 0)
        host.stop()
        await task


async def test_a_host_is_idle_only_once_it_has_looked(stage: Stage) -> None:
    await stage.enqueue(30, batch_id="b")
    host = await stage.host(FakeOwner(slots=1), serving=False)
    while "open" in await stage.states("b"):
        assert host.idle_seconds() == 0
        await asyncio.sleep(0)
    await until(lambda: host.idle_seconds() > 0)


async def test_a_bug_ends_the_host_with_its_error_and_gives_the_work_back(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = stage.made(owner)
    task = asyncio.create_task(host.run())
    await until(lambda: host.status().state == "serving")
    await stage.enqueue(2, batch_id="b")
    await until(lambda: len(owner.engine.open) == 2)
    next(iter(owner.engine.open.values())).answer.set_exception(KeyError("a bug"))
    with pytest.raises(KeyError):
        await task
    assert await stage.states("b") == ["open", "open"]


async def test_a_server_that_is_emptied_kills_nobody(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = await stage.host(owner)
    await stage.enqueue(10, batch_id="gone")
    await until(lambda: len(owner.engine.open) == host.status().target)
    await stage.server.flushall()
    owner.engine.reply = lambda _: completion()
    for call in list(owner.engine.open.values()):
        if not call.answer.done():
            call.answer.set_result(completion())
    await stage.enqueue(10, batch_id="b")
    await stage.settled("b", *["ok"] * 10)
    await until(lambda: not host.busy)


async def test_a_server_that_is_killed_and_comes_back_loses_nothing(tmp_path: Path) -> None:
    server = LocalServer(appendonly=True, appendfsync="always", directory=tmp_path)
    with server:
        async with staged(server.url) as stage:
            owner = FakeOwner(holding=True)
            host = await stage.host(owner, lease_s=2.0)
            await stage.enqueue(20, batch_id="b")
            await until(lambda: len(owner.engine.open) == host.status().target)
            await asyncio.to_thread(server.kill)
            owner.engine.reply = lambda _: completion()
            for call in list(owner.engine.open.values()):
                call.answer.set_result(completion())
            await until(lambda: not owner.engine.open)
            await asyncio.to_thread(server.restart)
            await stage.settled("b", *["ok"] * 20)
            await stage.enqueue(20, batch_id="c")
            await stage.settled("c", *["ok"] * 20)


async def test_an_engine_that_is_ready_while_the_server_is_away_serves_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = LocalServer(appendonly=True, appendfsync="always", directory=tmp_path)
    with server:
        async with staged(server.url) as stage:
            owner = FakeOwner()
            owner.gate = asyncio.Event()
            host = await stage.host(owner, serving=False)
            await stage.enqueue(5, batch_id="b")
            await until(lambda: bool(owner.launches))
            await asyncio.to_thread(server.kill)
            owner.gate.set()
            await until(lambda: host.status().state == "serving")
            await asyncio.to_thread(server.restart)
            await stage.settled("b", *["ok"] * 5)


async def test_a_job_that_another_host_took_is_dropped_here(stage: Stage) -> None:
    owner = FakeOwner(holding=True)
    host = await stage.host(owner)
    await stage.enqueue(1, batch_id="b")
    await until(lambda: len(owner.engine.open) == 1)
    stream = stage.keys.jobs(RUN, "default")
    [(entry_id, _)] = await stage.server.xrange(stream)
    await stage.server.xclaim(stream, GROUP, "thief:1", 0, [entry_id])
    await until(lambda: not owner.engine.open)
    assert owner.engine.calls[0].cancelled
    await until(lambda: not host.busy)
    assert await stage.states("b") == ["open"]
    owner.engine.reply = lambda _: completion()  # the thief never renews: a lease later it comes back
    await stage.settled("b", "ok")


async def test_backlog_ends_with_the_pull_that_finds_none(stage: Stage) -> None:
    host = await stage.host(FakeOwner(slots=1))
    await stage.enqueue(30, batch_id="b")
    await stage.settled("b", *["ok"] * 30)
    await until(lambda: host.idle_seconds() > 0)
    before = host.status().backlog_seconds
    await asyncio.sleep(0.3)
    await stage.enqueue(1, batch_id="c")
    await stage.settled("c", "ok")
    await until(lambda: host.idle_seconds() > 0)
    assert host.status().backlog_seconds - before < 0.25


async def test_a_change_of_policy_wakes_whoever_decided_before_it() -> None:
    reader = _Log()
    follower = follow.ControlFollower(cast(Any, reader), Keys(POOL), "w", lambda *_: asyncio.sleep(0))
    waiting = asyncio.create_task(follower.changed(follower.orders))
    reader.add(Command(policy=Policy(version=1, checkpoint="/policy/1", run="r")))
    await follower.catch_up()  # before the task's first step
    async with asyncio.timeout(10):
        await waiting
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.01):
            await follower.changed(follower.orders)
            pytest.fail("nothing changed")


class _Log:
    """Answers reads of the control log at once."""

    def __init__(self) -> None:
        self._entries: list[tuple[bytes, dict[bytes, bytes]]] = []

    def add(self, command: Command) -> None:
        self._entries.append((b"1-1", {b"body": pack_model(command)}))

    async def xread(self, _: dict[str, str], **__: Any) -> Any:
        entries, self._entries = self._entries, []
        return [(b"control", entries)] if entries else []
