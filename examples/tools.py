"""Conversations with a tool: the model says something, a calculator answers, and the model goes on from there.

Tokens in, tokens out: a turn's prompt is exactly what was said before, never decoded and encoded again, so that its
beginning is in the cache of the engine that made the turn before; `affinity` brings it back there. Run `rollpool local`
first, and in another terminal its `export` line; then `python examples/tools.py`.
"""

import asyncio
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from rollpool.producer import AsyncRolloutPool, Group, Policy, SamplingParams

CONVERSATIONS, TURNS = 6, 4
SAMPLING = SamplingParams(max_new_tokens=16, temperature=1.0)


def calculator(said: str) -> str:
    """Adds up the numbers in what was said. A random model calls no tool by its name: whatever it says is the call."""
    return str(sum(int(number) for number in re.findall(r"[0-9]{1,9}", said)))


@dataclass
class Conversation:
    """All its tokens, and which of them the model made: only those are trained on."""

    key: str
    ids: np.ndarray
    by_model: list[bool] = field(default_factory=list)
    #: Of each turn: tokens of its prompt, those that were in the engine's cache (None: not known), and the worker.
    turns: list[tuple[int, int | None, str]] = field(default_factory=list)

    def add(self, ids: np.ndarray, *, by_model: bool) -> None:
        """Go on with these tokens."""
        self.ids = np.concatenate([self.ids, ids]).astype(np.int32)
        self.by_model += [by_model] * len(ids)


async def say(pool: AsyncRolloutPool, talk: Conversation, version: int) -> Group | None:
    """The model's turn; None where it was dropped."""
    batch = await pool.enqueue_prompts([talk.ids], policy_version=version, sampling=SAMPLING, affinity=talk.key)
    groups = [group async for group in batch.collect(timeout=600)]
    await batch.commit()
    return groups[0] if groups else None


async def converse(pool: AsyncRolloutPool, tokenizer: Tokenizer, version: int, number: int) -> Conversation:
    """Turn by turn, the model's and the tool's."""

    def tokens(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    talk = Conversation(key=f"conversation-{number}", ids=np.empty(0, np.int32))
    talk.add(tokens(f"Add {number} and {number + 1} with the calculator."), by_model=False)
    for _ in range(TURNS):
        if (group := await say(pool, talk, version)) is None:
            break
        sample = group.samples[0]
        talk.turns.append((len(group.prompt_ids), sample.cached_tokens, group.worker))
        talk.add(sample.output_ids, by_model=True)
        talk.add(tokens(f" [{calculator(sample.text)}] "), by_model=False)
    return talk


def tokenizer_of(policy: Policy) -> Tokenizer:
    """The policy's own, where its directory is on this machine, as in `rollpool local`."""
    file = Path(policy.checkpoint or policy.base or "") / "tokenizer.json"
    if not file.is_file():
        raise SystemExit(f"{file} is not on this machine: load the tokenizer that your policy was trained with here")
    return Tokenizer.from_file(str(file))


async def main() -> None:
    """Several conversations at once."""
    async with AsyncRolloutPool(run=f"tools-{int(time.time())}") as pool:
        policy = await pool.current_policy()
        if policy is None:
            raise SystemExit("no policy was published yet: start `rollpool local`, or call pool.publish_policy")
        tokenizer = tokenizer_of(policy)
        talks = [converse(pool, tokenizer, policy.version, number) for number in range(CONVERSATIONS)]
        for talk in await asyncio.gather(*talks):
            print(f"{talk.key}: {sum(talk.by_model)} of {len(talk.ids)} tokens are the model's")
            for prompt, cached, worker in talk.turns:
                print(f"  {worker}: {'?' if cached is None else cached} of {prompt} prompt tokens were in its cache")


if __name__ == "__main__":
    asyncio.run(main())
