"""Real engines change their policy under way, and each token of each result is proven to be of the policy it names.

The proof is an independent model in numpy (`check_sample`): every log-prob is computed again by the weights of the
version in whose span the token is, on all tokens before it, and greedy tokens must be the most likely ones. One host
stands for all tests here; each moves it to versions of its own.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from real_pool import SERVE_S, wait_for

from rollpool.ops.inspect import read_workers
from rollpool.ops.local.engine_env import ensure_engine_env
from rollpool.ops.local.engine_settings import EngineLine
from rollpool.ops.local.hosts import LocalHosts, cpu_engine
from rollpool.ops.local.reference import ReferenceModel, check_sample
from rollpool.ops.local.run import cache_dir, engine_line, wait_until_served
from rollpool.ops.local.server import LocalServer
from rollpool.ops.local.tiny_adapter import make_tiny_adapter
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.producer import Batch, Group, Policy, RolloutPool, SamplingParams
from rollpool.schemas import Ack, Keys, WorkerStatus
from rollpool.schemas.connection import connect
from rollpool.schemas.control_log import ack_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

POOL, HOST = "changes", "changing"

#: Largest difference of a log-prob, and the least that naming another policy for the tokens of a sample makes of it.
TOLERANCE, ANOTHER = 0.016, 1.0

#: New tokens of what is under way during a change: as many as all sequences together have room for in the engine's KV
#: pool, so that there is time for the change; and of what tells that the long ones have begun.
LONG, SHORT = 150, 8

#: Seconds in which those long ones have ended on any machine.
DRAIN_S = 120

#: Prompts of each kind of sampling.
PROMPTS = [[11, 42, 7], [99, 5, 203, 17]]
GREEDY = SamplingParams(max_new_tokens=SHORT, temperature=0.0, ignore_eos=True)

#: Why tests of the main line are skipped, and what runs them.
NO_MAIN = (
    "0.0.1.post1 changes nothing while it serves; with the Python of an engine of the main line: "
    "ROLLPOOL_LOCAL_ENGINE_PYTHON=… .venv/bin/pytest tests/engine/test_policy_changes.py"
)


@dataclass
class Scene:
    """A pool with one host, and what was published to it."""

    url: str
    hosts: LocalHosts
    trainer: RolloutPool
    directory: Path
    line: EngineLine
    #: What each version computes; 0 is one that nobody ever serves, to compare with.
    models: dict[int, ReferenceModel]
    _seeds: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def publish(self, **how: Any) -> int:
        """A new checkpoint; its version."""
        version = max(self.models) + 1
        path = make_tiny_model(self.directory / f"checkpoint-{version}", seed=next(self._seeds))
        self.models[version] = ReferenceModel.from_checkpoint(path)
        self.trainer.publish_policy(version, checkpoint=str(path), **how)
        return version

    def publish_adapter(self, **how: Any) -> int:
        """A new adapter on the newest checkpoint; its version."""
        version = max(self.models) + 1
        path = make_tiny_adapter(self.directory / f"adapter-{version}", seed=next(self._seeds))
        policy = self.trainer.publish_policy(version, lora_path=str(path), **how)
        self.models[version] = self._base_of(policy).with_adapter(path)
        return version

    def _base_of(self, policy: Policy) -> ReferenceModel:
        assert policy.base is not None
        return ReferenceModel.from_checkpoint(Path(policy.base))

    def until_serving(self, version: int) -> None:
        wait_until_served(self.trainer, self.hosts, version, SERVE_S)

    def until_loaded(self, *versions: int) -> None:
        """Wait until these adapters serve, all at once."""
        wait_for(lambda: set(versions) <= set(self.status().versions_for(self.trainer.run)), timeout=SERVE_S)

    def serving(self) -> int:
        """The version that the trainer's jobs are given now."""
        return self.status().versions_for(self.trainer.run)[-1]

    def engine(self) -> list[int]:
        """The processes that serve."""
        worker = psutil.Process(self.hosts.workers[HOST].pid)
        return sorted(child.pid for child in worker.children() if "--model-path" in child.cmdline())

    def status(self) -> WorkerStatus:
        with connect(self.url) as client:
            (status,) = read_workers(client, Keys(POOL))
        return status

    def how(self, version: int) -> str:
        """What the host said of how it came to a policy."""

        def answers() -> list[Ack]:
            with connect(self.url) as client:
                entries: Any = client.xrange(Keys(POOL).acks)
            acks = [ack_of(fields) for _, fields in entries]
            return [ack for ack in acks if ack and ack.version == version and ack.state != "received"]

        wait_for(lambda: len(answers()) > 0, timeout=SERVE_S)
        (answer,) = answers()
        assert answer.state == "applied", answer.error
        return answer.detail

    def enqueue(self, tokens: int, **options: Any) -> list[Batch]:
        """Greedy sequences, and groups of sampled ones."""
        return [
            self.trainer.enqueue_prompts(
                PROMPTS,
                n=n,
                sampling=SamplingParams(max_new_tokens=tokens, temperature=temperature, ignore_eos=True),
                **{"policy_version": 1, **options},
            )
            for n, temperature in ((1, 0.0), (2, 0.7))
        ]

    def under_way(self) -> list[Batch]:
        """Long sequences, which have begun to make tokens."""
        batches = self.enqueue(LONG)
        # Begun after them and no faster than they: when these have ended, those have some tokens.
        self.collected(*self.enqueue(SHORT))
        return batches

    def collected(self, *batches: Batch) -> list[Group]:
        """All groups, each whole and once."""
        groups = [group for batch in batches for group in batch.collect(timeout=SERVE_S)]
        for batch in batches:
            assert batch.dropped == []
            batch.commit()
        assert len({group.id for group in groups}) == len(groups) == sum(len(batch) for batch in batches)
        for group in groups:
            for sample in group.samples:
                assert len(sample.output_ids) == group.sampling.max_new_tokens
                assert sample.finish_reason == "length"
        return groups

    def prove(self, groups: Sequence[Group]) -> None:
        """Each token is of the policy that its span names; and the proof would have told another."""
        for group in groups:
            temperature = group.sampling.temperature
            for sample in group.samples:
                assert check_sample(self.models, group.prompt_ids, sample, temperature=temperature) < TOLERANCE
                never = dict.fromkeys(self.models, self.models[0])
                assert check_sample(never, group.prompt_ids, sample, temperature=temperature) > ANOTHER


def versions_in(groups: Iterable[Group]) -> set[tuple[int, ...]]:
    """The versions of each sample, in the order in which they made it."""
    return {sample.versions for group in groups for sample in group.samples}


@pytest.fixture(scope="module")
def line() -> EngineLine:
    return engine_line(ensure_engine_env())


def start(directory: Path, line: EngineLine, env: dict[str, str] | None = None) -> Iterator[Scene]:
    """A pool whose one host serves a first checkpoint."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    engine = cpu_engine(ensure_engine_env(), cache_dir(), line) | ({"max_lora_rank": 4} if line == "main" else {})
    engine["env"] = engine["env"] | (env or {})
    settings = {"lease_s": 3, "heartbeat_s": 0.5, "drain_s": DRAIN_S, "stage_dir": directory / "staged"}
    with (
        LocalServer() as server,
        LocalHosts(server.url, POOL, directory / "logs", engine, settings) as hosts,
        RolloutPool(server.url, pool=POOL, run="trainer") as trainer,
    ):
        never = ReferenceModel.from_checkpoint(make_tiny_model(directory / "never", seed=1000))
        scene = Scene(server.url, hosts, trainer, directory, line, {0: never})
        scene.publish()
        hosts.start(HOST)
        scene.until_serving(1)
        yield scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, line: EngineLine) -> Iterator[Scene]:
    yield from start(tmp_path_factory.mktemp("changes"), line)


@pytest.fixture
def on_main(scene: Scene) -> Scene:
    """The same where the engine is of the main line."""
    if scene.line != "main":
        pytest.skip(NO_MAIN)
    return scene


def test_resumed_sequences_go_on_under_the_next_checkpoint_from_the_tokens_they_have(scene: Scene) -> None:
    before, batches = scene.serving(), scene.under_way()
    after = scene.publish(mode="resume", way="restart")
    groups = scene.collected(*batches)
    assert {(before, after)} <= versions_in(groups) <= {(before,), (before, after), (after,)}
    assert (before, after) in versions_in(group for group in groups if group.sampling.temperature == 0)
    scene.prove(groups)


def test_requeued_sequences_begin_again_under_the_next_checkpoint(scene: Scene) -> None:
    before, batches = scene.serving(), scene.under_way()
    after = scene.publish(mode="requeue", way="restart")
    groups = scene.collected(*batches)
    assert {(after,)} <= versions_in(groups) <= {(before,), (after,)}
    scene.prove(groups)


def test_drained_sequences_end_under_the_checkpoint_they_began_on(scene: Scene) -> None:
    before, batches = scene.serving(), scene.under_way()
    after = scene.publish(mode="drain", way="restart")
    batches += (fresh := scene.enqueue(SHORT, policy_version=after, max_staleness=0))
    groups = scene.collected(*batches)
    of_fresh = {batch.id for batch in fresh}
    assert versions_in(group for group in groups if group.batch not in of_fresh) == {(before,)}
    assert versions_in(group for group in groups if group.batch in of_fresh) == {(after,)}
    scene.prove(groups)


def test_an_adapter_serves_merged_where_the_engine_has_none_and_beside_the_weights_where_it_has(scene: Scene) -> None:
    before, batches = scene.serving(), scene.under_way()
    after = scene.publish_adapter(mode="resume")
    scene.until_serving(after)
    fresh = scene.collected(*scene.enqueue(SHORT))
    assert versions_in(fresh) == {(after,)}
    scene.prove(fresh)
    groups = scene.collected(*batches)
    if scene.line == "main":
        assert "loaded while serving" in scene.how(after)
        assert versions_in(groups) == {(before,)}, "nothing that runs is touched"
    else:
        assert scene.status().adapters == f"{scene.trainer.run}:{after}"
        assert (before, after) in versions_in(groups)
    scene.prove(groups)


def test_weights_change_in_the_middle_of_sequences_while_the_engine_serves(on_main: Scene) -> None:
    scene, engine = on_main, on_main.engine()
    before = scene.publish(mode="resume")
    scene.until_serving(before)
    batches = scene.under_way()
    after = scene.publish(mode="resume")
    groups = scene.collected(*batches)
    assert "swapped while serving" in scene.how(after)
    assert scene.engine() == engine, "it was not restarted"
    assert (before, after) in versions_in(group for group in groups if group.sampling.temperature == 0)
    scene.prove(groups)


def test_two_versions_of_an_adapter_and_their_base_serve_side_by_side(on_main: Scene) -> None:
    scene, engine = on_main, on_main.engine()
    base = scene.publish(mode="resume")
    scene.until_serving(base)
    adapters = [scene.publish_adapter() for _ in range(2)]
    scene.until_loaded(*adapters)
    batches = [batch for version in adapters for batch in scene.enqueue(LONG // 2, policy_version=version, exact=True)]
    with RolloutPool(scene.url, pool=POOL, run="another") as another:
        of_base = another.enqueue_prompts(PROMPTS, policy_version=base, n=2, sampling=GREEDY)
        groups = scene.collected(*batches, of_base)
    assert versions_in(groups) == {(base,), *((version,) for version in adapters)}
    for group in groups:
        assert versions_in([group]) == {(group.policy_version,)}
    assert scene.engine() == engine, "it was not restarted"
    scene.prove(groups)


def test_an_engine_that_takes_adapters_at_its_launch_alone_is_launched_with_the_last_few(
    on_main: Scene, line: EngineLine, tmp_path: Path
) -> None:
    for scene in start(tmp_path, line, env={"ROLLPOOL_HOT_SWAP": "0"}):
        adapters = [scene.publish_adapter() for _ in range(2)]
        scene.until_loaded(*adapters)
        batches = [batch for version in adapters for batch in scene.enqueue(SHORT, policy_version=version, exact=True)]
        groups = scene.collected(*batches)
        assert versions_in(groups) == {(version,) for version in adapters}
        assert "loaded while serving" not in scene.how(adapters[-1])
        scene.prove(groups)
