"""Which weights made which tokens of one request, while they changed under it; pure.

Invariant: each piece is what its weights make of the prompt and all tokens before the piece, beginning with a nonce of
its own, as if whoever asked had sent those tokens as its prompt: so it does not matter to a proof who continued.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rollpool.ops.sim.tokens import logprob_places, output_of


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that one policy makes in a row."""

    #: Where it begins among the tokens of the request.
    start: int
    signature: int
    #: Label of the weights, as the engine tells it.
    version: str
    nonce: int


class Made(NamedTuple):
    """The tokens of a request, and their log-probs as places in the table of all that there are."""

    ids: NDArray[np.int32]
    places: NDArray[np.int64]


class Pieces:
    """All of one request, in order."""

    def __init__(self, signature: int, version: str, nonce: int) -> None:
        self._pieces = [Piece(0, signature, version, nonce)]

    def change(self, at: int, signature: int, version: str, nonce: int) -> None:
        """Go on under other weights, with `at` tokens made so far."""
        if self._pieces[-1].start == at:  # it has made nothing
            self._pieces.pop()
        self._pieces.append(Piece(at, signature, version, nonce))

    def made(self, prompt_ids: NDArray[np.int64], count: int) -> Made:
        """The first `count` tokens."""
        ids, places = np.empty(0, np.int32), np.empty(0, np.int64)
        for piece, end in self._until(count):
            prompt = np.concatenate([prompt_ids, ids]) if len(ids) else prompt_ids
            more = output_of(piece.signature, prompt, piece.nonce, end - piece.start)
            places = np.concatenate([places, logprob_places(piece.signature, prompt, more)])
            ids = np.concatenate([ids, more])
        return Made(ids, places)

    def versions(self, count: int) -> list[dict[str, Any]]:
        """Which version made which of the first `count` tokens, as a reply tells it."""
        return [{"version": piece.version, "start": piece.start, "end": end} for piece, end in self._until(count)]

    def _until(self, count: int) -> Iterator[tuple[Piece, int]]:
        """Each piece that has tokens among the first `count`, and where it ends."""
        ends = [*(piece.start for piece in self._pieces[1:]), count]
        for piece, end in zip(self._pieces, ends, strict=True):
            if min(end, count) > piece.start:
                yield piece, min(end, count)
