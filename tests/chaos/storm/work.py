"""What a trainer of the storm asks for at each step: a pure function of seed, run and step.

Invariant: a batch made again for the same step and tag is the same to the last token, so that it may be enqueued again
after any failure; and which of its prompts are poison is known to whoever has the seed, and to nobody else.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

#: Poison by kind: one prompt in so many batches of a run. What an engine refuses costs nothing; what kills or hangs it
#: costs everybody beside it a restart.
POISON_EVERY = {"refuse": 2, "fail": 5, "kill": 12, "hang": 24, "forget": 24}

#: The last step of a run that has poison of a kind: what is forgotten is found out by waiting, five times over, with
#: pauses that grow, and the end of a storm should not wait for that.
LAST_STEP = {"forget": 30}

#: Ordinary tokens: below the vocabulary of a simulated engine, and far below what it takes for orders.
TOKENS = (100, 100_000)

Lane = Literal["high", "default", "low"]
LANES: tuple[Lane, ...] = ("default", "default", "default", "high", "low")

#: Tags: how stale a job may be run. "exact" may end stale, the rest may not.
TAGS = ("any", "any", 0, 1, 2, "exact")

#: What is special about a batch; most are plain.
EXTRAS = (*[None] * 10, "cancel", "first_k", "split", "split", "split", "min_samples", "deadline")


@dataclass(frozen=True)
class Asked:
    """One batch."""

    batch: str
    prompts: list[Any]
    #: Poison prompts: kind by index.
    poison: dict[int, str]
    n: int
    policy_version: int
    max_staleness: int | None
    exact: bool
    lane: Lane
    max_new_tokens: int
    #: The trainer cancels what is open once so many groups have come; None: it does not.
    cancel_after: int | None = None
    #: So many groups are enough; None: it wants all.
    first_k: int | None = None
    #: Jobs into which each group is split.
    split: int = 1
    #: Samples with which a group is `ok`; None: all.
    min_samples: int | None = None
    #: Seconds until what is open expires.
    deadline: float | None = None

    def facts(self) -> dict[str, Any]:
        """What the checker needs to know."""
        return {
            "batch": self.batch,
            "prompts": [digest([prompt]) for prompt in self.prompts],
            "poison": self.poison,
            "n": self.n,
            "tag": self.policy_version,
            "max_staleness": self.max_staleness,
            "exact": self.exact,
            "least": self.min_samples or self.n,
            "deadline": self.deadline is not None,
            "cut": self.cancel_after is not None or self.first_k is not None,
            # A text is tokenized on the host: what comes back is not what was sent.
            "ids": not isinstance(self.prompts[0], str),
        }


def sim_batch(
    seed: int, run: str, step: int, version: int, size: int, orders: dict[str, int], last_poison: int | None = None
) -> Asked:
    """The batch of one step, for simulated engines.

    Args:
        seed: of the storm.
        run: the trainer's.
        step: its step, from 0.
        version: the policy it tags its jobs with.
        size: prompts.
        orders: first tokens that make a simulated engine fail, by the kind of poison.
        last_poison: the last step with poison; None: there is none.
    """
    rng = random.Random(f"{seed}-{run}-{step}")
    prompts = [[rng.randrange(*TOKENS) for _ in range(rng.randint(2, 10))] for _ in range(size)]
    poison: dict[int, str] = {}
    for kind in _due(seed, run, step):
        if kind in orders and (last_poison is None or step <= last_poison):
            index = rng.choice([index for index in range(size) if index not in poison])
            poison[index] = kind
            prompts[index][0] = orders[kind]
    tag, n = rng.choice(TAGS), rng.choice((1, 1, 2, 3, 4))
    extra = rng.choice(EXTRAS)
    return Asked(
        batch=f"step-{step}",
        prompts=prompts,
        poison=poison,
        n=n,
        policy_version=version,
        max_staleness=tag if isinstance(tag, int) else None,
        exact=tag == "exact",
        lane=rng.choice(LANES),
        max_new_tokens=128,
        cancel_after=rng.randrange(1, size) if extra == "cancel" else None,
        first_k=rng.randrange(1, size) if extra == "first_k" else None,
        split=2 if extra == "split" and n % 2 == 0 else 1,
        min_samples=1 if extra == "min_samples" else None,
        deadline=rng.uniform(1.0, 20.0) if extra == "deadline" else None,
    )


def text_batch(seed: int, run: str, step: int, version: int, size: int) -> Asked:
    """The batch of one step, for a real engine: small, since it shares two cores with everything else."""
    rng = random.Random(f"{seed}-{run}-{step}")
    return Asked(
        batch=f"step-{step}",
        prompts=[f"{rng.randrange(100)} + {rng.randrange(100)} =" for _ in range(size)],
        poison={},
        n=rng.choice((1, 2)),
        policy_version=version,
        max_staleness=None,
        exact=False,
        lane="default",
        max_new_tokens=8,
    )


def _due(seed: int, run: str, step: int) -> Iterable[str]:
    """Kinds of poison that a step has: each comes every so many steps, from a step of its own on."""
    for kind, every in POISON_EVERY.items():
        # The first ones early: a short storm must meet all kinds.
        first = random.Random(f"{seed}-{run}-{kind}").randrange(min(every, 6))
        if step % every == first and step <= LAST_STEP.get(kind, step):
            yield kind


def digest(values: Sequence[Any]) -> str:
    """A name for texts or arrays of token ids: equal for equal ones, and for nothing else."""
    said = hashlib.blake2b(digest_size=12)
    for value in values:
        data = value.encode() if isinstance(value, str) else np.asarray(value, dtype="<i4").tobytes()
        said.update(len(data).to_bytes(4, "little"))
        said.update(data)
    return said.hexdigest()
