"""Dead letters, on real servers: listed, shown, enqueued again once, dropped, and nothing that was not meant."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from typer.testing import CliRunner, Result

from rollpool.ops.cli.app import app
from rollpool.ops.dead import DeadLetter, Selection, find, replay, select
from rollpool.ops.doctor import examine
from rollpool.producer import RolloutPool
from rollpool.schemas import Group, Keys, PromptJob, SamplingParams
from rollpool.schemas.connection import connect
from rollpool.schemas.scripts import RunOffer, Settlement, enqueue, pull, settle
from rollpool.schemas.wire import pack_model, unpack_job

pytestmark = pytest.mark.both_servers

runner = CliRunner()

#: Two hours, in milliseconds.
TWO_HOURS = 7_200_000


@pytest.fixture
def blocking(redis_url: str) -> Iterator[Redis]:
    with connect(redis_url) as client:
        yield client


async def bury(
    client: AsyncRedis, keys: Keys, *, run: str = "math", batch: str = "step-1", error: str = "engine died", **job: Any
) -> None:
    """A job that fails as one that used up its attempts."""
    made = PromptJob.model_validate(
        {"run": run, "batch": batch, "index": 0, "prompt": "one and one", "policy_version": 3, "n": 2} | job
    )
    both = [part for _ in range(made.parts) for part in (made.preview(), pack_model(made))]
    named: dict[str, Any] = {"run": run, "batch": batch, "lane": made.lane, "content": "c"}
    await enqueue(client, keys, **named, policy=3, n=made.n, parts=made.parts, previews_and_bodies=both)
    pulled = await pull(client, keys, offers=[RunOffer(run, 3, (3,))], consumer="vm:1", wanted=1)
    group = Group.model_validate(
        {
            **{"run": run, "batch": batch, "index": 0, "outcome": "failed", "policy_version": 3, "samples": ()},
            **{"prompt_ids": np.empty(0, np.int32), "sampling": SamplingParams(), "worker": "vm-1", "error": error},
        }
    )
    await settle(client, keys, [Settlement(pulled.entries[0], group, error, made.part)])


def add(client: Redis, keys: Keys, fields: Any) -> str:
    """One that somebody wrote by hand; its id."""
    made: Any = client.xadd(keys.dead, fields)
    return str(made.decode())


@pytest.fixture
async def three(redis_client: AsyncRedis, keys: Keys) -> None:
    """The oldest first: two of one run, one of another."""
    await bury(redis_client, keys, batch="step-1", error="engine died three times")
    await bury(redis_client, keys, batch="step-2", error="the prompt is too long", policy_version=4)
    await bury(redis_client, keys, run="code", batch="step-1", error="engine died alone")


def letters(client: Redis, keys: Keys, **conditions: Any) -> list[DeadLetter]:
    return list(select(client, keys, Selection(**conditions)))


def call(url: str, *command: str, said: str | None = None) -> Result:
    return runner.invoke(app, ["dead", *command, "--url", url, "--pool", "test"], input=said, env={"COLUMNS": "200"})


def jobs_of(found: Sequence[DeadLetter]) -> list[str]:
    return [f"{letter.run}:{letter.job}" for letter in found]


@pytest.mark.usefixtures("three")
def test_the_newest_come_first(blocking: Redis, keys: Keys) -> None:
    assert jobs_of(letters(blocking, keys)) == ["code:step-1/0", "math:step-2/0", "math:step-1/0"]
    assert jobs_of(letters(blocking, keys, limit=2)) == ["code:step-1/0", "math:step-2/0"]


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    ("conditions", "jobs"),
    [
        ({"run": "math"}, ["math:step-2/0", "math:step-1/0"]),
        ({"batch": "step-1"}, ["code:step-1/0", "math:step-1/0"]),
        ({"batch": "step-1", "run": "math"}, ["math:step-1/0"]),
        ({"error": "ENGINE died"}, ["code:step-1/0", "math:step-1/0"]),
        ({"error": "engine died", "limit": 1}, ["code:step-1/0"]),
        ({"policy": 3, "run": "nobody"}, []),
        ({"since_s": 3600}, ["code:step-1/0", "math:step-2/0", "math:step-1/0"]),
        ({"before_s": 3600}, []),
    ],
)
def test_every_condition_must_hold(blocking: Redis, keys: Keys, conditions: Any, jobs: list[str]) -> None:
    assert jobs_of(letters(blocking, keys, **conditions)) == jobs


def test_times_are_the_servers(blocking: Redis, keys: Keys) -> None:
    time: Any = blocking.time()
    blocking.xadd(keys.dead, {"error": "old"}, id=f"{1000 * time[0] - TWO_HOURS}-0")
    blocking.xadd(keys.dead, {"error": "new"})
    assert [letter.error for letter in letters(blocking, keys, since_s=3600)] == ["new"]
    assert [letter.error for letter in letters(blocking, keys, before_s=3600)] == ["old"]
    assert letters(blocking, keys, since_s=3 * 3600, before_s=2.5 * 3600) == []


def test_more_than_a_page_is_found(blocking: Redis, keys: Keys) -> None:
    for number in range(250):
        blocking.xadd(keys.dead, {"run": "even" if number % 2 == 0 else "odd", "job": f"b/{number}"})
    assert len(letters(blocking, keys)) == 250
    assert [letter.job for letter in letters(blocking, keys, run="even", limit=60)][-1] == "b/130"


@pytest.mark.usefixtures("three")
def test_a_list_can_be_read_by_people_and_programs(redis_url: str) -> None:
    shown = call(redis_url, "list", "--error", "engine died")
    assert shown.exit_code == 0, shown.output
    for word in ("engine died three times", "engine died alone", "step-1/0", "math", "code", "2 shown of 3"):
        assert word in shown.output
    assert "too long" not in shown.output
    listed = json.loads(call(redis_url, "list", "--json", "--since", "2h").output)
    assert [each["error"] for each in listed] == [
        "engine died alone",
        "the prompt is too long",
        "engine died three times",
    ]
    assert listed[0]["worker"] == "vm-1"


def test_there_being_none_is_said(redis_url: str, blocking: Redis, keys: Keys) -> None:
    assert "pool test has no dead letters" in call(redis_url, "list").output
    blocking.xadd(keys.dead, {"error": "one"})
    assert (
        "none of the 1 dead letters of pool test meets these conditions" in call(redis_url, "list", "--run", "x").output
    )
    assert json.loads(call(redis_url, "list", "--run", "x", "--json").output) == []


async def test_one_is_shown_with_all_that_is_known(redis_url: str, redis_client: AsyncRedis, keys: Keys) -> None:
    await bury(redis_client, keys, metadata={"answer": 2, "ids": np.arange(3, dtype=np.int32)})
    with connect(redis_url) as blocking:
        reply: Any = blocking.xrange(keys.dead)
        blocking.delete(keys.dead)
        counts = {
            "attempts": 2,
            "faults": 1,
            "losses": 3,
            "company": 1,
            "history": "10:00 vm-1 died\n10:05 vm-2 died\n",
        }
        number = add(blocking, keys, reply[0][1] | counts)
    shown = call(redis_url, "show", number)
    assert shown.exit_code == 0, shown.output
    for words in ("engine died", "attempts 2, faults 1, losses 3, company 1", "10:00 vm-1 died", "10:05 vm-2 died"):
        assert words in shown.output
    for words in ("step-1/0 of run math", "one and one", '"answer": 2', "max_new_tokens"):
        assert words in shown.output
    told = json.loads(call(redis_url, "show", number, "--json").output)
    assert told["payload"]["metadata"] == {"answer": 2, "ids": [0, 1, 2]}
    assert told["history"] == ["10:00 vm-1 died", "10:05 vm-2 died"]
    assert told["undecodable"] is None


def test_what_is_no_job_is_shown_and_not_replayed(redis_url: str, blocking: Redis, keys: Keys) -> None:
    number = add(blocking, keys, {"error": "not a job", "body": b"\xff\x00", "history": b"\xff"})
    shown = call(redis_url, "show", number)
    assert shown.exit_code == 0, shown.output
    assert "is no job and cannot be replayed: not a rollpool body" in shown.output
    done = call(redis_url, "replay", number, "--yes")
    assert done.exit_code == 1
    assert "not replayed: its payload is no job" in done.output
    assert blocking.xlen(keys.dead) == 1


@pytest.mark.usefixtures("three")
def test_a_replayed_job_runs_again_in_a_batch_of_its_own(redis_url: str, blocking: Redis, keys: Keys) -> None:
    (letter,) = letters(blocking, keys, batch="step-2")
    done = call(redis_url, "replay", letter.id, "--yes")
    assert done.exit_code == 0, done.output
    assert f"is now batch replay-{letter.id}" in done.output
    assert letter.id not in {each.id for each in letters(blocking, keys)}
    reply: Any = blocking.xrange(keys.jobs("math", "default"))
    (_, fields) = reply[-1]
    assert fields[b"job"].decode() == f"replay-{letter.id}/0"
    again, before = unpack_job(fields[b"body"]), letter.decoded()
    assert again == before.model_copy(update={"batch": letter.replay})
    assert examine(blocking, keys).healthy


async def test_a_part_of_a_group_becomes_a_job_and_an_old_deadline_is_left_out(
    redis_client: AsyncRedis, redis_url: str, keys: Keys
) -> None:
    await bury(redis_client, keys, parts=3, part=1, deadline_ms=1, lane="high", exact=True)
    with connect(redis_url) as blocking:
        (letter,) = letters(blocking, keys)
        assert (await replay(redis_client, keys, letter)).outcome == "replayed"
        reply: Any = blocking.xrange(keys.jobs("math", "high"))
        again = unpack_job(reply[-1][1][b"body"])
        assert examine(blocking, keys).healthy
    assert (again.parts, again.part, again.n, again.deadline_ms, again.exact) == (1, 0, 2, None, True)


async def test_a_replay_that_was_interrupted_enqueues_once(
    redis_client: AsyncRedis, redis_url: str, keys: Keys
) -> None:
    await bury(redis_client, keys)
    with connect(redis_url) as blocking:
        (letter,) = letters(blocking, keys)
        entry: Any = blocking.xrange(keys.dead)
        assert (await replay(redis_client, keys, letter)).outcome == "replayed"
        assert (await replay(redis_client, keys, letter)).outcome == "gone"
        # As if it had ended before the dead letter was removed.
        blocking.delete(keys.dead)
        blocking.xadd(keys.dead, entry[0][1], id=letter.id)
        assert (await replay(redis_client, keys, letter)).outcome == "replayed"
        assert blocking.xlen(keys.dead) == 0
        assert blocking.hget(keys.run("math"), "open") == b"1"
        assert examine(blocking, keys).healthy


async def test_another_batch_of_that_name_is_left_alone(redis_client: AsyncRedis, redis_url: str, keys: Keys) -> None:
    await bury(redis_client, keys)
    with connect(redis_url) as blocking:
        (letter,) = letters(blocking, keys)
        blocking.hset(keys.batch("math", letter.replay), mapping={"content": "other", "size": 1})
        done = await replay(redis_client, keys, letter)
        assert (done.outcome, "other content" in done.why) == ("cannot", True)
        assert blocking.xlen(keys.dead) == 1


@pytest.mark.usefixtures("three")
def test_a_trainer_finds_what_was_replayed_when_it_resumes(redis_url: str) -> None:
    call(redis_url, "replay", "--batch", "step-2", "--yes")
    with RolloutPool(redis_url, pool="test", run="math") as pool:
        state = pool.state_dict()
    with RolloutPool.resume(state, redis_url, pool="test") as resumed:
        assert [name for name in resumed.batches if name.startswith("replay-")]


@pytest.mark.usefixtures("three")
def test_it_is_said_what_will_be_done_and_asked(redis_url: str, blocking: Redis, keys: Keys) -> None:
    asked = call(redis_url, "drop", "--run", "math", said="n\n")
    assert asked.exit_code == 0, asked.output
    for words in (
        "math",
        "the prompt is too long",
        "engine died three times",
        "drop for good 2 dead letters of pool test?",
    ):
        assert words in asked.output
    assert "nothing was done" in asked.output
    assert blocking.xlen(keys.dead) == 3
    assert "dropped 2" in call(redis_url, "drop", "--run", "math", said="y\n").output
    assert jobs_of(letters(blocking, keys)) == ["code:step-1/0"]


@pytest.mark.usefixtures("three")
def test_all_are_taken_when_all_is_said(redis_url: str, blocking: Redis, keys: Keys) -> None:
    assert "replayed 2 of 2" in call(redis_url, "replay", "--all", "--limit", "2", "--yes").output
    assert jobs_of(letters(blocking, keys)) == ["math:step-1/0"]
    assert "dropped 1" in call(redis_url, "drop", "--all", "--yes").output
    assert call(redis_url, "drop", "--all", "--yes").exit_code == 0


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("command", ["replay", "drop"])
@pytest.mark.parametrize(
    "said", [[], ["--all", "--run", "math"], ["1-0", "--all"], ["1-0", "--run", "x"], ["--limit", "1"]]
)
def test_it_must_be_said_which(redis_url: str, blocking: Redis, keys: Keys, command: str, said: list[str]) -> None:
    done = call(redis_url, command, *said, "--yes")
    assert done.exit_code == 1
    assert "say which dead letters" in done.output
    assert blocking.xlen(keys.dead) == 3


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("command", ["replay", "drop"])
def test_conditions_that_meet_none_do_nothing(redis_url: str, command: str) -> None:
    done = call(redis_url, command, "--run", "nobody", "--yes")
    assert done.exit_code == 0
    assert "none of the 3 dead letters of pool test meets these conditions; nothing was done" in done.output


@pytest.mark.parametrize("command", [["show"], ["replay", "--yes"], ["drop", "--yes"]])
@pytest.mark.parametrize(
    ("number", "words"), [("step-1/0", "is no id"), ("1732-0", "has no dead letter 1732-0"), ("17", "is no id")]
)
def test_a_wrong_id_is_one_line(redis_url: str, command: list[str], number: str, words: str) -> None:
    done = call(redis_url, *command, number)
    assert done.exit_code == 1
    assert words in done.output
    assert "rollpool dead list" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("text", ["2", "h", "2x", "-2h", "2h 3m", "", "1h2"])
def test_a_wrong_duration_is_named(redis_url: str, text: str) -> None:
    done = call(redis_url, "list", "--since", text)
    assert done.exit_code == 1
    assert "--since" in done.output
    assert "as 90s, 2h or 1d12h" in done.output


def test_an_id_is_found_once_however_often_it_is_named(blocking: Redis, keys: Keys) -> None:
    number = add(blocking, keys, {"error": "x"})
    assert [letter.id for letter in find(blocking, keys, [number, number])] == [number]
