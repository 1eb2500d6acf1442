"""The training loop: enqueue, collect, pack, update, publish, commit; the same for every way to publish.

Invariant: the batch of a step is trained on at the version that its jobs are tagged with, so no token in it is older
than `staleness` versions; and no number in the history comes from anywhere but the pool's results.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
from numpy.typing import NDArray

from rollpool.producer import Batch, Group, PackedBatch, RolloutPool, SamplingParams, pack
from rollpool.schemas import RollpoolError

from . import task
from .grpo import Rows, advantages, make_update, minibatches

#: Seconds until a batch must be there: several restarts of an engine on two busy cores.
COLLECT_S = 600.0

#: The version that training begins with.
FIRST = 1


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    #: Policy updates. On 0.0.1.post1 each costs an engine's restart.
    steps: int = 12
    #: Prompts of a step, samples of each, tokens of each sample.
    prompts: int = 32
    samples: int = 16
    tokens: int = 4
    #: Samples of one optimizer step. Each is trained on once: a second pass did not learn more.
    minibatch: int = 256
    #: Held-out prompts, and samples of each.
    held_out: int = 64
    held_out_samples: int = 4
    #: Steps between two looks at the held-out prompts; there is one before the first step and one after the last.
    look_every: int = 6

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return task.PROMPT_LENGTH + self.tokens


@dataclass(frozen=True)
class Learner:
    """What is trained, and how hosts get it: all that differs between the ways."""

    #: A pytree.
    initial: Any
    #: From the pytree and [B, T] ids to the log-prob of each token, at temperature 1.
    logprobs: Callable[[Any, jax.Array], jax.Array]
    #: Publishes the pytree under a version.
    publish: Callable[[int, Any], object]
    learning_rate: float


@dataclass(frozen=True)
class Score:
    """What a policy gets on held-out prompts."""

    version: int
    mean: float
    #: Standard error over the prompts.
    error: float


@dataclass(frozen=True)
class Step:
    """What one step saw."""

    number: int
    reward: float
    #: Versions by which a token was older than the policy it was trained on: the mean, and the most.
    staleness: float
    oldest: int
    tokens_per_second: float
    seconds: float
    #: Importance ratios of the step's first minibatch, before its update.
    ratios: NDArray[np.float32]


@dataclass
class History:
    """What training saw."""

    scores: list[Score] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def ratio_errors(self) -> NDArray[np.float32]:
        """|ratio - 1| of the same."""
        errors: NDArray[np.float32] = np.abs(self.ratios - 1)
        return errors

    @property
    def ratios(self) -> NDArray[np.float32]:
        """Importance ratios of all first minibatches."""
        return np.concatenate([step.ratios for step in self.steps])


def train(
    pool: RolloutPool, learner: Learner, plan: Plan, *, staleness: int, seed: int, show: Callable[[Step | Score], None]
) -> History:
    """Train, while the pool serves version `FIRST`, which is `learner.initial`.

    Args:
        pool: Where samples come from.
        learner: What is trained.
        plan: How much.
        staleness: Batches that are in the pool beside the one that is trained on.
        seed: Of prompts and minibatches.
        show: Told of each step and each look as it is done.
    """
    rng = np.random.default_rng(seed)
    optimizer = optax.adam(learner.learning_rate)
    trained, state = learner.initial, optimizer.init(learner.initial)
    update = make_update(learner.logprobs, optimizer)
    history, batches = History(), list[Batch]()

    def look(version: int) -> None:
        history.scores.append(evaluate(pool, plan, version))
        show(history.scores[-1])

    look(FIRST)
    for number in range(plan.steps):
        begin, version = time.monotonic(), FIRST + number
        while len(batches) <= min(number + staleness, plan.steps - 1):
            batches.append(enqueue(pool, plan, rng, FIRST + len(batches), staleness))
        batch = batches[number]
        arrays, rewards = collect(batch, plan)
        ratios = None
        for rows in minibatches(rows_of(arrays, rewards), plan.minibatch, rng):
            trained, state, ratio = update(trained, state, rows)
            ratios = np.asarray(ratio)[rows.mask] if ratios is None else ratios
        learner.publish(version + 1, trained)
        batch.commit()  # consumed: the server drops the results
        history.steps.append(_seen(number, version, arrays, rewards, ratios, time.monotonic() - begin))
        show(history.steps[-1])
        if (number + 1) % plan.look_every == 0 or number + 1 == plan.steps:
            look(version + 1)
    return history


def enqueue(pool: RolloutPool, plan: Plan, rng: np.random.Generator, version: int, staleness: int) -> Batch:
    """The prompts that will be trained on when the policy is at `version`; they may run `staleness` versions before."""
    prompts = task.draw(rng, plan.prompts)
    return pool.enqueue_prompts(
        [prompt.text for prompt in prompts],
        policy_version=version,
        max_staleness=staleness,
        n=plan.samples,
        sampling=sampling(plan),
        metadata=[prompt.digit for prompt in prompts],
        batch_id=f"train-{version}",
    )


def sampling(plan: Plan) -> SamplingParams:
    """From the whole distribution, at temperature 1: then the log-probs are those of what was sampled from."""
    return SamplingParams(max_new_tokens=plan.tokens, temperature=1.0, ignore_eos=True)


def collect(batch: Batch, plan: Plan) -> tuple[PackedBatch, NDArray[np.float32]]:
    """All groups of a batch, as arrays, with the reward of each row."""
    groups = list(batch.collect(timeout=COLLECT_S))
    if not groups:
        raise RollpoolError(f"batch {batch.id} brought no group: {batch.report().model_dump_json()}")
    return pack(groups, length=plan.length), np.concatenate([rewards_of(group) for group in groups])


def rewards_of(group: Group) -> NDArray[np.float32]:
    """One a sample."""
    return np.array([task.reward(group.metadata, sample.output_ids) for sample in group.samples], dtype=np.float32)


def rows_of(arrays: PackedBatch, rewards: NDArray[np.float32]) -> Rows:
    """What a loss needs."""
    return Rows(arrays.ids, arrays.mask, arrays.logprobs, advantages(rewards, arrays.group))


def evaluate(pool: RolloutPool, plan: Plan, version: int) -> Score:
    """Ask the held-out prompts, of this version alone, ahead of whatever waits."""
    prompts = task.draw(np.random.default_rng(0), plan.held_out, held_out=True)
    batch = pool.enqueue_prompts(
        [prompt.text for prompt in prompts],
        policy_version=version,
        exact=True,
        lane="high",
        n=plan.held_out_samples,
        sampling=sampling(plan),
        metadata=[prompt.digit for prompt in prompts],
        batch_id=f"held-out-{version}",
    )
    by_prompt = np.array([rewards_of(group).mean() for group in batch.collect(timeout=COLLECT_S)])
    batch.commit()
    if len(by_prompt) < 2:
        raise RollpoolError(f"batch {batch.id} brought {len(by_prompt)} groups: too few for a mean with its error")
    return Score(version, float(by_prompt.mean()), float(by_prompt.std(ddof=1) / len(by_prompt) ** 0.5))


def _seen(
    number: int,
    version: int,
    arrays: PackedBatch,
    rewards: NDArray[np.float32],
    ratios: NDArray[np.float32] | None,
    seconds: float,
) -> Step:
    behind = version - arrays.versions[arrays.mask]
    assert ratios is not None
    return Step(
        number=number + 1,
        reward=float(rewards.mean()),
        staleness=float(behind.mean()),
        oldest=int(behind.max()),
        tokens_per_second=float(arrays.mask.sum()) / seconds,
        seconds=seconds,
        ratios=ratios,
    )
