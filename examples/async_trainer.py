"""An asyncio trainer that keeps the hosts busy: one batch is always in the pool while another is trained on.

It also shows how a trainer survives its own death: the pool's state is saved beside the weights, and a second start
goes on where the first one stopped. Run `rollpool local` first, and in another terminal its `export` line; then
`python examples/async_trainer.py`. Interrupt it with Ctrl-C and start it again to see it resume.
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from rollpool.producer import AsyncRolloutPool, Group, PackedBatch, SamplingParams, pack

#: Stands for the trainer's checkpoint; a real one holds the weights too.
CHECKPOINT = Path("async-trainer.json")
STEPS, PROMPTS, SAMPLES = 6, 8, 4
SAMPLING = SamplingParams(max_new_tokens=16, temperature=1.0)


def saved() -> dict[str, Any] | None:
    """What an earlier start left, if it did not get to the end."""
    return json.loads(CHECKPOINT.read_text()) if CHECKPOINT.exists() else None


def save(step: int, pool: AsyncRolloutPool) -> None:
    """What the next start needs: the next step, and what the pool has handed out so far."""
    CHECKPOINT.write_text(json.dumps({"step": step, "pool": pool.state_dict()}))


async def enqueue(pool: AsyncRolloutPool, step: int) -> None:
    """One step's prompts, tagged with the current policy; nothing where they are in the pool already."""
    policy = await pool.current_policy()
    if policy is None:
        raise SystemExit("no policy was published yet: start `rollpool local`, or call pool.publish_policy")
    if f"step-{step}" in pool.batches:  # enqueued before a restart
        return
    numbers = range(step * PROMPTS, (step + 1) * PROMPTS)
    await pool.enqueue_prompts(
        [f"{number} + {number} =" for number in numbers],
        policy_version=policy.version,
        n=SAMPLES,
        sampling=SAMPLING,
        max_staleness=1,
        batch_id=f"step-{step}",
        metadata=[str(2 * number) for number in numbers],
    )


def rewards(groups: list[Group]) -> list[float]:
    """One number a sample, in the order of the rows of `pack`."""
    return [float(group.metadata in sample.text) for group in groups for sample in group.samples]


def train(step: int, arrays: PackedBatch, scores: list[float]) -> None:
    """Where the gradient step goes."""
    newest = int(arrays.versions.max(initial=-1))
    print(
        f"step {step}: {len(arrays)} rows, newest policy {newest}, mean reward {sum(scores) / max(1, len(scores)):.3f}"
    )


async def main() -> None:
    """Train on the steps that are left."""
    if before := saved():
        first, pool = before["step"], await AsyncRolloutPool.resume(before["pool"])
        print(f"resuming run {pool.run} at step {first}")
    else:
        first, pool = 0, AsyncRolloutPool(run=f"async-{int(time.time())}")
        save(first, pool)
    async with pool:
        for step in range(first, STEPS):
            for ahead in range(step, min(step + 2, STEPS)):  # the next step's prompts run while this one is trained on
                await enqueue(pool, ahead)
            batch = pool.batches[f"step-{step}"]
            groups = [group async for group in batch.collect(timeout=600)]
            train(step, pack(groups, length=64), rewards(groups))
            # With new weights saved, the hosts are told here: await pool.publish_policy(version, checkpoint=…)
            if batch.dropped:
                print(batch.report().model_dump_json(indent=2))
            save(step + 1, pool)  # first save, then commit: a crash between the two trains nothing twice
            await batch.commit()


if __name__ == "__main__":
    try:
        asyncio.run(main())
        CHECKPOINT.unlink()
    except KeyboardInterrupt:
        print("interrupted; start it again to go on")
