"""`rollpool control` and `rollpool policies`, on a real server, with hosts that answer as they are told to."""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import NoPermissionError
from typer.testing import CliRunner, Result

from rollpool.ops.cli import control as drawn
from rollpool.ops.cli.app import app
from rollpool.ops.control import Sent
from rollpool.producer import RolloutPool, control
from rollpool.producer.control import Heard
from rollpool.schemas import Ack, Command, Keys, NotPermitted, WorkerStatus
from rollpool.schemas.connection import connect
from rollpool.schemas.control_log import command_of

runner = CliRunner()
KEYS = Keys("test")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "POLL_S", 0.01)


#: What a host says to a command: a state, and what it says more; None: nothing.
Says = Callable[[str, Command], tuple[str, str] | None]


def obeys(_: str, __: Command) -> tuple[str, str]:
    return "applied", "done"


class Hosts:
    """Hosts without an engine, in a thread: the command under test blocks."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client: Any = connect(url)
        self.says: Says = obeys
        self.heard: list[Command] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._answer)

    def beat(self, *names: str, **status: Any) -> None:
        for name in names:
            made = WorkerStatus.model_validate({"name": name, "host": "vm", "pid": 1, "state": "serving", **status})
            self.client.hset(KEYS.worker(name), mapping=made.fields())

    def __enter__(self) -> "Hosts":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self.client.close()

    def _answer(self) -> None:
        after = "0"
        with connect(self.url) as client:
            while not self._ending.is_set():
                reply: Any = client.xread({KEYS.control: after}, block=50)
                for _, entries in reply or ():
                    for entry, fields in entries:
                        after = entry.decode()
                        self._obey(client, after, command_of(fields))

    def _obey(self, client: Any, entry: str, command: Command | None) -> None:
        assert command is not None
        self.heard.append(command)
        names = [key.decode().rpartition(":")[2] for key in client.scan_iter(match=KEYS.worker("*"))]
        for name in sorted(filter(command.is_for, names)):
            said = self.says(name, command)
            version = "" if command.policy is None else command.policy.version
            told = {"worker": name, "command": entry, "kind": command.kind, "version": version}
            client.xadd(KEYS.acks, {**told, "state": "received", "seconds": 0})
            if said is not None:
                state, more = said
                words = {"error": more} if state == "failed" else {"detail": more}
                client.xadd(KEYS.acks, {**told, "state": state, "seconds": 1.25, **words})


@pytest.fixture
def hosts(redis_url: str) -> Iterator[Hosts]:
    with Hosts(redis_url) as made:
        yield made


def call(url: str, *command: str, said: str | None = None, **env: str) -> Result:
    where = ["--url", url, "--pool", "test"]
    return runner.invoke(app, [*command, *where], input=said, env={"COLUMNS": "200", **env})


def controlled(hosts: Hosts, *command: str, said: str | None = None) -> Result:
    return call(hosts.url, "control", *command, said=said)


# Commands


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pause", {"kind": "pause"}),
        ("resume", {"kind": "resume"}),
        ("drain --within 5 --yes", {"kind": "drain", "within_s": 5.0}),
        ("drain --worker a", {"kind": "drain", "workers": ("a",)}),
        ("concurrency 24", {"kind": "concurrency", "concurrency": 24}),
        ("concurrency default", {"kind": "concurrency"}),
        ("flush --worker b --worker a", {"kind": "flush", "workers": ("b", "a")}),
        ("shutdown --worker a --yes", {"kind": "shutdown", "workers": ("a",)}),
    ],
)
def test_a_command_reaches_the_hosts_it_is_for_and_their_answers_are_shown(
    hosts: Hosts, words: str, expected: dict[str, Any]
) -> None:
    hosts.beat("a", "b")
    result = controlled(hosts, *words.split())
    assert result.exit_code == 0, result.output
    assert hosts.heard == [Command.model_validate(expected)]
    named = expected.get("workers", ("a", "b"))
    for name in named:
        assert f"{name}: received" in result.output
        assert f"{name}: applied after 1.2 s: done" in result.output
    assert result.output.rstrip().endswith(f"{len(named)} applied")


def test_a_host_that_fails_is_told_with_its_error_and_by_the_exit_status(hosts: Hosts) -> None:
    hosts.beat("a", "b")
    hosts.says = lambda name, _: ("failed", "no engine serves") if name == "b" else ("applied", "")
    result = controlled(hosts, "flush")
    assert result.exit_code == 1
    assert "b: failed after 1.2 s: no engine serves" in result.output
    assert "flush: 1 applied, 1 failed" in result.output


def test_a_host_that_does_not_answer_in_time_has_an_exit_status_of_its_own(hosts: Hosts) -> None:
    hosts.beat("a", "b")
    hosts.says = lambda name, _: None if name == "b" else ("applied", "")
    result = controlled(hosts, "pause", "--timeout", "1")
    assert result.exit_code == 3
    assert "1 applied and 0 failed after 1 s; not answered by b (serving)" in result.output


def test_without_waiting_the_entry_is_all_that_is_told(hosts: Hosts) -> None:
    hosts.beat("a")
    hosts.says = lambda *_: None
    result = controlled(hosts, "pause", "--no-wait")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"pause: command \d+-\d+\n", result.output)


@pytest.mark.parametrize("words", ["pause --worker x", "shutdown --worker a --worker x --yes"])
def test_an_unknown_worker_stops_the_command_for_all_and_those_alive_are_listed(hosts: Hosts, words: str) -> None:
    hosts.beat("a", "b")
    hosts.beat("leaving", state="stopping")
    result = controlled(hosts, *words.split())
    assert result.exit_code == 1
    assert "--worker x: no live host of pool test has this name; alive: a, b" in result.output
    assert not hosts.client.exists(KEYS.control)


@pytest.mark.parametrize("words", ["shutdown", "shutdown --worker a", "drain"])
def test_what_takes_work_away_is_asked_first(hosts: Hosts, words: str) -> None:
    hosts.beat("a")
    refused = controlled(hosts, *words.split(), said="n\n")
    assert (refused.exit_code, "nothing was done" in refused.output) == (0, True)
    assert not hosts.client.exists(KEYS.control)
    agreed = controlled(hosts, *words.split(), said="y\n")
    assert (agreed.exit_code, len(hosts.heard)) == (0, 1)


def test_a_state_is_ordered_of_hosts_to_come_and_what_is_done_once_is_not(hosts: Hosts) -> None:
    result = controlled(hosts, "pause")
    assert (result.exit_code, "no host is alive; those that start later do it" in result.output) == (0, True)
    once = controlled(hosts, "flush")
    assert (once.exit_code, "nobody would hear it" in once.output) == (1, True)
    assert hosts.client.xlen(KEYS.control) == 1


@pytest.mark.parametrize("text", ["0", "many", "1.5"])
def test_a_number_of_samples_that_cannot_be_is_refused(hosts: Hosts, text: str) -> None:
    result = controlled(hosts, "concurrency", text)
    assert result.exit_code == 1
    assert f"concurrency {text}: expected a number of samples from 1 on, or `default`" in result.output


def test_cancelling_a_run_settles_its_open_jobs_and_has_the_hosts_drop_them(hosts: Hosts) -> None:
    hosts.beat("a")
    with RolloutPool(hosts.url, pool="test", run="math") as pool, RolloutPool(hosts.url, pool="test", run="r") as other:
        one = pool.enqueue_prompts([[1], [2]], policy_version=1)
        pool.enqueue_prompts([[3]], policy_version=2)
        other.enqueue_prompts([[4]], policy_version=1)
        result = controlled(hosts, "cancel", "--run", "math", "--policy", "1", said="y\n")
        assert result.exit_code == 0, result.output
        assert "tagged with policy 1 (3 are open in all)" in result.output
        assert "2 jobs of run math are settled as cancelled" in result.output
        assert hosts.heard == [Command(kind="cancel", run="math")]
        assert (list(one.collect(10)), len(one.dropped)) == ([], 2)
        assert hosts.client.hget(KEYS.run("math"), "open") == b"1"
        assert hosts.client.hget(KEYS.run("r"), "open") == b"1"


def test_cancelling_an_unknown_run_lists_those_there_are(hosts: Hosts) -> None:
    with RolloutPool(hosts.url, pool="test", run="math") as pool:
        pool.enqueue_prompts([[1]], policy_version=1)
    result = controlled(hosts, "cancel", "--run", "meth", "--yes")
    assert result.exit_code == 1
    assert "--run meth: pool test has no such run; there are: math" in result.output
    assert not hosts.client.exists(KEYS.control)


def test_a_server_out_of_reach_is_told_at_once() -> None:
    for words in ("pause", "publish 1 --checkpoint /c --no-check"):
        result = runner.invoke(app, ["control", *words.split(), "--url", "redis://127.0.0.1:1/0"])
        assert result.exit_code == 1
        assert "cannot be reached" in result.output
        assert "Traceback" not in result.output


# Policies


def test_publishing_follows_the_hosts_to_the_policy(hosts: Hosts) -> None:
    hosts.beat("a", "b")
    words = "publish 3 --checkpoint /models/3 --no-check --run math --mode drain --restart --min-serving 0"
    result = controlled(hosts, *words.split())
    assert result.exit_code == 0, result.output
    assert "policy 3: 2 applied" in result.output
    (command,) = hosts.heard
    assert command.policy is not None
    assert (command.policy.source, command.policy.run) == ("/models/3", "math")
    assert (command.mode, command.way, command.min_serving) == ("drain", "restart", 0)


def test_publishing_again_tells_what_became_of_it(hosts: Hosts) -> None:
    hosts.beat("a")
    hosts.says = lambda *_: ("failed", "cannot read shard 2")
    for _ in range(2):
        result = controlled(hosts, "publish", "3", "--checkpoint", "/models/3", "--no-check")
        assert result.exit_code == 1
        assert "a: failed after 1.2 s: cannot read shard 2" in result.output
    assert len(hosts.heard) == 1


def test_an_adapter_is_published_on_the_current_checkpoint(hosts: Hosts) -> None:
    hosts.beat("a")
    assert controlled(hosts, "publish", "3", "--checkpoint", "/models/3", "--no-check").exit_code == 0
    result = controlled(hosts, "publish", "4", "--lora", "/lora/4", "--no-check", "--run", "math")
    assert result.exit_code == 0, result.output
    assert "policy 4 of run math: 1 applied" in result.output
    policy = hosts.heard[-1].policy
    assert policy is not None
    assert (policy.lora_path, policy.base) == ("/lora/4", "/models/3")


@pytest.mark.parametrize("words", ["publish 1", "publish 1 --checkpoint /c --lora /l"])
def test_a_policy_has_one_source(hosts: Hosts, words: str) -> None:
    result = controlled(hosts, *words.split())
    assert (result.exit_code, "give one of --checkpoint and --lora" in result.output) == (1, True)


def test_a_version_that_does_not_rise_is_refused_in_the_producers_words(hosts: Hosts) -> None:
    hosts.beat("a")
    assert controlled(hosts, "publish", "3", "--checkpoint", "/models/3", "--no-check").exit_code == 0
    result = controlled(hosts, "publish", "2", "--checkpoint", "/models/2", "--no-check")
    assert result.exit_code == 1
    assert "policy 2 is older" in result.output


@pytest.fixture
def published(hosts: Hosts) -> Hosts:
    """Checkpoints 1, 2 and 3, gone back from 3 to 2; an adapter of run math."""
    hosts.beat("a", "b")
    for version in (1, 2, 3):
        source = ("--checkpoint", f"/models/{version}", "--no-check", "--run", "math")
        assert controlled(hosts, "publish", str(version), *source).exit_code == 0
    back = controlled(hosts, "rollback", "2", "--run", "math")
    assert back.exit_code == 0, back.output
    assert "policy 2: 2 applied" in back.output
    adapter = controlled(hosts, "publish", "4", "--lora", "/lora/4", "--no-check", "--run", "math")
    assert adapter.exit_code == 0, adapter.output
    return hosts


def shown(url: str, *options: str) -> dict[str, Any]:
    result = call(url, "policies", "--json", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_policies_tells_lineages_generations_and_who_serves_what(published: Hosts) -> None:
    published.beat("a", policy=2, generation=1, adapters="math:4 other:9")
    published.beat("b", policy=2, generation=0)
    found = shown(published.url)
    checkpoints, adapters = found["lineages"]
    assert (checkpoints["name"], checkpoints["current"], checkpoints["generation"]) == ("checkpoints", 2, 1)
    facts = [(row["version"], row["current"], row["abandoned"]) for row in checkpoints["policies"]]
    assert (1, False, False) in facts
    assert [fact for fact in facts if fact[1]] == [(2, True, False)]
    assert (3, False, True) in facts
    (current,) = [row for row in checkpoints["policies"] if row["current"]]
    assert (current["generation"], current["hosts"]) == (1, 1)
    assert (adapters["name"], adapters["current"]) == ("lora:math", 4)
    assert [(row["version"], row["base"], row["hosts"]) for row in adapters["policies"]] == [(4, "/models/2", 1)]
    assert found["acks"] == []


def test_policies_are_readable_as_tables(published: Hosts) -> None:
    result = call(published.url, "policies")
    assert result.exit_code == 0, result.output
    for word in ("checkpoints, went back once", "adapters of run math", "/lora/4 on /models/2", "current", "abandoned"):
        assert word in result.output


def test_answers_are_the_last_of_each_live_host_with_errors_in_full(published: Hosts) -> None:
    error = "the engine said:\n" + "no " * 200 + "more"
    published.says = lambda name, _: ("failed", error) if name == "b" else ("applied", "swapped")
    failing = controlled(published, "publish", "5", "--checkpoint", "/models/5", "--no-check", "--run", "math")
    assert failing.exit_code == 1
    for command in ("drain", "pause"):  # of which the last one is in force
        assert controlled(published, command, "--worker", "a").exit_code == 0
    answers = shown(published.url, "--acks")["acks"]
    said = [(ack["worker"], ack["asked"], ack["state"]) for ack in answers]
    of_a = [("a", "policy 4 of run math", "applied"), ("a", "policy 5", "applied"), ("a", "pause", "applied")]
    assert said == [*of_a, ("b", "policy 4 of run math", "applied"), ("b", "policy 5", "failed")]
    table = call(published.url, "policies", "--acks")
    assert f"b failed at policy 5: {error}" in table.output


def test_an_adapter_on_another_checkpoint_is_told(published: Hosts) -> None:
    assert [row["misplaced"] for row in shown(published.url)["lineages"][1]["policies"]] == [False]
    source = ("--checkpoint", "/models/5", "--no-check", "--run", "math")
    assert controlled(published, "publish", "5", *source).exit_code == 0
    assert [row["misplaced"] for row in shown(published.url)["lineages"][1]["policies"]] == [True]
    assert "current, other base" in call(published.url, "policies").output


def test_policies_of_a_pool_without_any_is_no_error(redis_url: str) -> None:
    result = call(redis_url, "policies")
    assert (result.exit_code, "no policy was published" in result.output) == (0, True)
    assert shown(redis_url, "--acks")["lineages"] == []


# In a terminal


def test_the_table_tells_of_every_host_what_it_said_or_does_instead() -> None:
    def ack(name: str, state: Any, **more: Any) -> Ack:
        return Ack(worker=name, command="1-0", state=state, seconds=2.0, **more)

    fetching = WorkerStatus(name="d", host="h", pid=1, state="serving", staging="policy 3: 1 of 2 MiB")
    heard = Heard(
        new=(),
        latest={
            "a": ack("a", "applied", detail="swapped"),
            "b": ack("b", "failed", error="[no] disk"),
            "d": ack("d", "received"),
        },
        waiting=(fetching, fetching.model_copy(update={"name": "e"})),
        gone=("f",),
        voided={"c": "2-0"},
    )
    made = drawn.rows(Sent("1-0", Command(kind="pause")), heard)
    cells = [list(column.cells) for column in made.columns]
    assert list(zip(*cells, strict=True)) == [
        ("a", "applied", "2.0", "swapped"),
        ("b", "failed", "2.0", r"\[no] disk"),
        ("c", "overtaken", "", "by command 2-0"),
        ("d", "received", "", "serving; policy 3: 1 of 2 MiB"),
        ("e", "sent", "", "serving; policy 3: 1 of 2 MiB"),
        ("f", "gone", "", "its heartbeat ended before it answered"),
    ]


# Roles


def test_an_operator_may_command_publish_and_cancel_and_not_enqueue(hosts: Hosts) -> None:
    text = (Path(__file__).parents[2] / "docs" / "howto-servers.md").read_text(encoding="utf-8")
    (rules,) = re.findall(r"^user operator (on .*)$", text, flags=re.MULTILINE)
    hosts.client.execute_command("ACL", "SETUSER", "operator", *rules.replace("{math}", "{test}").split())
    url = hosts.url.replace("//", "//operator:operator-secret@")
    try:
        hosts.beat("a")
        with RolloutPool(hosts.url, pool="test", run="r") as pool:
            pool.enqueue_prompts([[1], [2]], policy_version=1, exact=True)
            pool.enqueue_prompts([[1], [2]], policy_version=3, exact=True)
        for words in (
            *("pause", "resume", "publish 2 --checkpoint /models/2 --no-check --run r", "cancel --run r --policy 1 -y"),
            *("publish 3 --checkpoint /models/3 --no-check --run r", "rollback 2 --run r"),
            "publish 4 --lora /lora/4 --no-check --run r",
        ):
            result = call(url, "control", *words.split())
            assert result.exit_code == 0, result.output
        for words in ("policies --acks", "status"):
            result = call(url, *words.split())
            assert result.exit_code == 0, result.output
        assert hosts.client.hget(KEYS.run("r"), "open") == b"0", "cancelled, and stale"
        assert hosts.client.acl_log() == [], "the role lacks what it needs"
        before = set(hosts.client.scan_iter())
        for run in ("r", "new"):
            with RolloutPool(url, pool="test", run=run) as pool, pytest.raises(NotPermitted):
                pool.enqueue_prompts([[1]], policy_version=2)
        assert set(hosts.client.scan_iter()) == before, "a refusal leaves something behind"
        with connect(url) as operator, pytest.raises(NoPermissionError):
            operator.xadd(KEYS.jobs("r", "default"), {"job": "b/0"})
    finally:
        hosts.client.execute_command("ACL", "DELUSER", "operator")
        hosts.client.execute_command("ACL", "LOG", "RESET")


# Interrupted


def test_whoever_stops_waiting_is_told_that_the_command_stays(hosts: Hosts) -> None:
    hosts.beat("a")
    hosts.says = lambda *_: None
    main = "from rollpool.ops.cli import main; main()"
    where = ["--url", hosts.url, "--pool", "test"]
    with subprocess.Popen(
        [sys.executable, "-c", main, "control", "pause", *where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("a: received"):
                    process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            said = process.stderr.read()
            assert process.wait(60) == 130
        finally:
            process.kill()
    assert said == "rollpool: no longer waiting; what was sent stays on the log, see `rollpool policies --acks`\n"
