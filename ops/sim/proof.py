"""Whether the policies that a sample names made it, over changes of weights in the midst of it; pure.

A piece is a run of tokens that one policy made of all tokens before it, in one go: its first token is drawn, and each
later one follows (`tokens.py`). Where a sample was aborted and went on under the same policy, there, or on another
host, a span holds more pieces than one, and nobody tells where they meet: that is searched for.

Invariants: each sample whose spans tell the truth passes, as long as it has no more pieces than are allowed, but for a
chance of one in 10^15 a boundary. What others made passes by chance alone. All tokens but the first of each piece are
evidence, and each wrong one passes with a chance of 1 in 150,000: so n tokens in m pieces pass wrongly about once in
150,000^(n - m). Hence `most_pieces`: a sample of so few tokens could be all pieces of one token, which prove nothing by
themselves; and a boundary that is told wrongly passes where it is off by fewer tokens than pieces are left. With
log-probs such pieces prove something too: each that is wrong passes with a chance of 1 in 512.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rollpool.ops.sim.tokens import VOCABULARY, logprobs_of, output_of

#: Pieces of a sample with one span, where nobody says otherwise: more than it is moved in its life, and few enough that
#: one of a dozen tokens cannot pass by chance.
MOST_PIECES = 8

#: Tokens by which a piece may seem longer than it is, since the next one happened to begin with what it would have gone
#: on with: each has a chance of 1 in 150,000.
_BY_CHANCE = 2

#: Version, start and end: a `VersionSpan`.
Span = tuple[int, int, int] | Sequence[int]


def made_by_spans(
    signature_of_version: Mapping[int, int],
    prompt_ids: ArrayLike,
    output_ids: ArrayLike,
    spans: Sequence[Span],
    *,
    logprobs: ArrayLike | None = None,
    most_pieces: int = MOST_PIECES,
) -> bool:
    """True when each span's policy made the span's tokens, for the prompt and the tokens before; nobody makes none.

    Args:
        signature_of_version: who each version is: `signature_of` a checkpoint, or `adapted` to an adapter.
        prompt_ids: the prompt, [P].
        output_ids: the sample, [G].
        spans: its version spans: in order, without gaps, over all tokens; empty ones say nothing.
        logprobs: its log-probs, [G], where they are to be proved too: then pieces of one token prove something.
        most_pieces: of a sample with one span; each further span may be one more. See above for what a larger number
            costs.
    """
    prompt, output = np.asarray(prompt_ids, np.int64), np.asarray(output_ids, np.int64)
    if output.ndim != 1 or not len(output) or not _cover(spans, len(output)):
        return False
    if logprobs is not None and np.shape(logprobs) != output.shape:
        return False
    told = None if logprobs is None else np.asarray(logprobs, np.float32)
    told_of = [(version, start, end) for version, start, end in spans if start < end]
    left = most_pieces + len(told_of) - 1
    for version, start, end in told_of:
        if version not in signature_of_version:
            return False
        search = _Search(signature_of_version[version], prompt, output[:end], told)
        if (found := search.fewest_pieces(start, left)) is None:
            return False
        left -= found
    return True


def _cover(spans: Sequence[Span], count: int) -> bool:
    ends = [0, *(end for _, _, end in spans)]
    starts = [start for _, start, _ in spans]
    return starts == ends[:-1] and ends[-1] == count and ends == sorted(ends)


class _Search:
    """For the fewest pieces of one policy that make up the end of `output`."""

    def __init__(
        self,
        signature: int,
        prompt: NDArray[np.int64],
        output: NDArray[np.int64],
        logprobs: NDArray[np.float32] | None,
    ) -> None:
        self._signature = signature
        self._all = np.concatenate([prompt, output])
        self._prompt_length = len(prompt)
        self._end = len(output)
        self._logprobs = logprobs

    def fewest_pieces(self, start: int, most: int) -> int | None:
        """Pieces that make `start:`, None when `most` do not; each boundary is looked for at the end of the piece."""
        begins = {start}
        for pieces in range(1, most + 1):
            reached = {start: self._reach(start) for start in begins}
            if self._end in reached.values():
                return pieces
            begins = {
                end - less for start, end in reached.items() for less in range(_BY_CHANCE + 1) if end - less > start
            }
        return None

    def _reach(self, start: int) -> int:
        """How far one piece that begins at `start` goes."""
        before, after = np.split(self._all, [self._prompt_length + start])
        if not 0 <= after[0] < VOCABULARY:
            return start
        alike = after == output_of(self._signature, before, int(after[0]), len(after))
        if self._logprobs is not None:
            alike &= self._logprobs[start : self._end] == logprobs_of(self._signature, before, after)
        return self._end if alike.all() else start + int(np.argmin(alike))
