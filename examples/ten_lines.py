"""The smallest trainer: three steps of eight prompts with four samples each, and where the training step goes.

Run `rollpool local` first, and in another terminal its `export` line; then `python examples/ten_lines.py`.
"""

from rollpool.producer import RolloutPool, SamplingParams, pack

with RolloutPool(run="ten-lines") as pool:  # ROLLPOOL_URL and ROLLPOOL_POOL say where
    policy = pool.current_policy() or pool.publish_policy(1, checkpoint="/checkpoints/1")
    for step in range(3):
        prompts = [f"{step} + {number} =" for number in range(8)]
        sampling = SamplingParams(max_new_tokens=16, temperature=1.0)
        batch = pool.enqueue_prompts(prompts, policy_version=policy.version, n=4, sampling=sampling, max_staleness=1)
        groups = list(batch.collect(timeout=600))  # as they finish, each once
        arrays = pack(groups, length=64)  # numpy: ids, mask, logprobs, versions [32, 64]
        print(step, arrays.ids.shape, "trained tokens:", int(arrays.mask.sum()))  # your training step goes here
        batch.commit()  # consumed: the server drops the results
