"""What a simulated engine answers, and how anybody can tell who made it; pure, vectorised.

Invariant: the tokens after the first, and all log-probs, follow from the policy's signature, the prompt and the first
token. So a completion proves which weights made it, for which prompt, whole and in order; and a completion that was cut
off, continued by other weights, or mixed up with another's does not pass (`proof.py` has the proof of a continued one).
"""

from random import Random
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Hashes: TypeAlias = NDArray[np.uint64]

#: Ordinary ids are below: about what models of today have (Qwen3: 151,936).
VOCABULARY = 150_000

# Prompts that begin with one of these bring out a fault of the engine. They are far over any ordinary id, so that no
# prompt has one by accident, and below 2^31, since ids travel as int32.

#: The engine's processes die once this request has decoded for a few steps, as after a crash in its scheduler.
KILL = 1_000_000_001
#: The scheduler stands still for all requests from then on, while `/health` goes on answering 200.
HANG = 1_000_000_002
#: The request is refused with 400: its own fault.
REFUSE = 1_000_000_003
#: The request is never answered, while others are.
FORGET = 1_000_000_004
#: The request is answered with 500, however often it is sent, while others are answered well.
FAIL = 1_000_000_005

#: What the model's config names as its vocabulary: over all of the above, since a worker refuses ids outside it.
VOCABULARY_WITH_FAULTS = 1_000_000_006

#: Log-probs are whole multiples of 1/128: exact in float32, and short as JSON.
LOGPROB_STEPS, LOGPROB_STEP = 512, 1 / 128

# SplitMix64 (Steele, Lea, Flood 2014): each bit of its result depends on each bit of what it is given.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def _mix(values: Hashes) -> Hashes:
    values = (values ^ (values >> _SHIFTS[0])) * _MULTIPLIERS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return values ^ (values >> _SHIFTS[2])


def _unsigned(values: ArrayLike) -> Hashes:
    return np.atleast_1d(np.asarray(values, np.int64)).astype(np.uint64)


def _at_places(values: Hashes) -> Hashes:
    """Hashes of the values, each with its place in the row."""
    return _mix(values + _GAMMA * np.arange(1, len(values) + 1, dtype=np.uint64))


def _chain(signature: int, prompt_ids: ArrayLike, nonce: int, count: int) -> Hashes:
    """One hash for each output token; the tokens and log-probs are made of them."""
    prompt = _unsigned(prompt_ids)
    key = _mix(_at_places(prompt).sum(dtype=np.uint64, keepdims=True) + _mix(_unsigned(signature)))
    return _at_places(np.broadcast_to(_mix(key ^ _mix(_unsigned(nonce) + _GAMMA)), count))


def draw_nonce(random: Random) -> int:
    """The first token of a completion: what makes two samples of one prompt differ."""
    return random.randrange(VOCABULARY)


def output_of(signature: int, prompt_ids: ArrayLike, nonce: int, count: int) -> NDArray[np.int32]:
    """The `count` tokens that the policy answers when it begins with `nonce`, int32 [count]."""
    tokens = (_chain(signature, prompt_ids, nonce, count) % np.uint64(VOCABULARY)).astype(np.int32)
    tokens[:1] = nonce
    return tokens


def made_by(signature: int, prompt_ids: ArrayLike, output_ids: ArrayLike) -> bool:
    """True when the policy of this signature made all of these tokens for this prompt; nobody makes none."""
    output = np.asarray(output_ids, np.int64)
    if output.ndim != 1 or not len(output) or not 0 <= output[0] < VOCABULARY:
        return False
    return bool(np.array_equal(output, output_of(signature, prompt_ids, int(output[0]), len(output))))


def adapted(base_signature: int, adapter_signature: int) -> int:
    """Which policy a base is with an adapter on it; 0 to 2^63 - 1."""
    mixed = _mix(_mix(_unsigned(base_signature) + _GAMMA) + _unsigned(adapter_signature))
    return int(mixed[0] >> np.uint64(1))


def logprob_places(signature: int, prompt_ids: ArrayLike, output_ids: ArrayLike) -> NDArray[np.int64]:
    """Where each log-prob is in the table of all that there are: `-(place + 1) * LOGPROB_STEP`."""
    output = np.asarray(output_ids, np.int64)
    if not len(output):
        return np.empty(0, np.int64)
    hashes = _chain(signature, prompt_ids, int(output[0]), len(output))
    return (_mix(hashes + _GAMMA) % np.uint64(LOGPROB_STEPS)).astype(np.int64)


def logprobs_of(signature: int, prompt_ids: ArrayLike, output_ids: ArrayLike) -> NDArray[np.float32]:
    """The log-probs that come with this completion, float32 [G]."""
    return ((logprob_places(signature, prompt_ids, output_ids) + 1) * -LOGPROB_STEP).astype(np.float32)


def draw_length(random: Random, median: float, sigma: float, *, least: int, most: int) -> int:
    """Tokens until a completion would end by itself, log-normal as those of real models; at most `most`.

    Args:
        random: what draws.
        median: half of the completions are shorter.
        sigma: deviation of the logarithm; 0: all of one length.
        least: as a request's `min_new_tokens` asks.
        most: as its `max_new_tokens` cuts.
    """
    drawn = round(median * random.lognormvariate(0.0, sigma))
    return max(1, min(most, max(least, drawn)))
