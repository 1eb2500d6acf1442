"""An evaluation beside training: its jobs are in the `high` lane, so they get the next free slots and drain nothing.

Each answer is the named policy's and no other's (`exact=True`), whatever is published meanwhile. Run `rollpool local`
first, and in another terminal its `export` line; then `python examples/evaluation.py`.
"""

import time

from rollpool.producer import Batch, Group, RolloutPool, SamplingParams

TRAINING = SamplingParams(max_new_tokens=32, temperature=1.0)
#: Greedy: the same policy gets the same marks again.
EVALUATION = SamplingParams(max_new_tokens=8, temperature=0.0)
QUESTIONS = {f"{left} + {right} =": str(left + right) for left in range(4) for right in range(4)}


def is_right(group: Group) -> bool:
    """Whether the answer stands in what was said."""
    return group.metadata in group.samples[0].text


def evaluate(pool: RolloutPool, version: int) -> float:
    """The share of questions that this version answers right; what it could not be asked is not counted."""
    batch = pool.enqueue_prompts(
        list(QUESTIONS),
        policy_version=version,
        exact=True,  # stale, should the last host leave this version before it is asked
        sampling=EVALUATION,
        lane="high",
        metadata=list(QUESTIONS.values()),
    )
    marks = [is_right(group) for group in batch.collect(timeout=600)]
    if batch.dropped:
        print(f"{len(batch.dropped)} questions were not answered, the first: {batch.dropped[0].error}")
    batch.commit()
    return sum(marks) / max(1, len(marks))


def train(batch: Batch) -> None:
    """Where the training steps go."""
    samples = sum(len(group.samples) for group in batch.collect(timeout=600))
    print(f"training went on beside it: {samples} samples")
    batch.commit()


def main() -> None:
    """Evaluate the current policy while training has work of its own in the pool."""
    with RolloutPool(run=f"evaluation-{int(time.time())}") as pool:
        policy = pool.current_policy()
        if policy is None:
            raise SystemExit("no policy was published yet: start `rollpool local`, or call pool.publish_policy")
        prompts = [f"{number} + {number} =" for number in range(64)]
        training = pool.enqueue_prompts(prompts, policy_version=policy.version, n=4, sampling=TRAINING)
        print(f"policy {policy.version}: {evaluate(pool, policy.version):.1%} of {len(QUESTIONS)} questions right")
        train(training)


if __name__ == "__main__":
    main()
