"""The task: a digit somewhere in the prompt says which tokens are good.

Invariant: the reward is a function of the prompt and the answer's token ids alone, and an answer that does not depend
on the prompt gets 1/8 on average; no held-out prompt is ever trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: The digit is one of so many; a token is good for the digit that its id leaves modulo this.
DIGITS = 8

#: Capitals stand alone in the tiny tokenizer, as digits do: one character is one token.
FILLER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

#: Characters of a prompt.
PROMPT_LENGTH = 6

#: Prompts whose filler, as a number, leaves 0 modulo this are held out: never trained on.
HELD_OUT_EVERY = 4


@dataclass(frozen=True)
class Prompt:
    """What is asked."""

    text: str
    digit: int


def draw(rng: np.random.Generator, count: int, *, held_out: bool = False) -> list[Prompt]:
    """So many prompts, each digit as often as any other, all for training or all held out."""
    digits = rng.permutation(np.resize(np.arange(DIGITS), count))
    return [_prompt(rng, int(digit), held_out) for digit in digits]


def _prompt(rng: np.random.Generator, digit: int, held_out: bool) -> Prompt:
    while True:
        filler = "".join(rng.choice(list(FILLER), PROMPT_LENGTH - 1))
        if is_held_out(filler) == held_out:
            place = rng.integers(PROMPT_LENGTH)
            return Prompt(f"{filler[:place]}{digit}{filler[place:]}", digit)


def is_held_out(filler: str) -> bool:
    """True for filler that is kept for the evaluation."""
    return sum(FILLER.index(letter) for letter in filler) % HELD_OUT_EVERY == 0


def reward(digit: int, output_ids: Sequence[int] | NDArray[np.integer[Any]]) -> float:
    """Share of the answer's tokens that are good for the digit."""
    return float(np.mean(np.asarray(output_ids) % DIGITS == digit)) if len(output_ids) else 0.0
