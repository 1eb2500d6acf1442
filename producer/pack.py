"""Groups to fixed-shape arrays, for a jitted training step; pure.

Invariant: every output token that fits appears once, at its place behind its prompt, with its own log-prob and the
version that made it; everywhere else the arrays hold their neutral value.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollpool.schemas.errors import RollpoolError
from rollpool.schemas.results import Group, Sample

#: Version of a position that no policy made: prompt and padding.
NO_VERSION = -1


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One row a sample: B rows of T = `length` positions, prompt then output, padded on the right.

    Groups follow each other in the order given, samples in the order of their group.
    """

    #: [B, T] int32, `pad_id` behind the end.
    ids: NDArray[np.int32]
    #: [B, T], True on output tokens: where a policy-gradient loss is taken.
    mask: NDArray[np.bool_]
    #: [B, T], True on prompt and output tokens: what attention may see.
    valid: NDArray[np.bool_]
    #: [B, T] float32, natural-log probabilities of the policy that made each output token; 0 elsewhere.
    logprobs: NDArray[np.float32]
    #: [B, T] int32, the policy version that made each output token; -1 elsewhere.
    versions: NDArray[np.int32]
    #: [B] int32, prompt tokens in the row.
    prompt_lengths: NDArray[np.int32]
    #: [B] int32, prompt and output tokens in the row.
    lengths: NDArray[np.int32]
    #: [B] int32, position in the groups given: rows of one group share it.
    group: NDArray[np.int32]
    #: [B], True where filtering made the behaviour policy differ from the one the log-probs describe.
    filtered: NDArray[np.bool_]
    #: Rows that did not fit and were cut at T.
    truncated: int

    def __len__(self) -> int:
        return len(self.ids)


def pack(groups: Iterable[Group], *, length: int, pad_id: int = 0) -> PackedBatch:
    """Lay the samples of `groups` out as rows of `length` tokens.

    Groups without samples (those in `batch.dropped`) add no rows.

    Args:
        groups: What `collect` yielded.
        length: T; longer rows are cut on the right and counted in `truncated`.
        pad_id: Token id behind the end of a row.

    Raises:
        RollpoolError: `length` is below 1, or a group has no token ids (`endpoint="chat"`).
    """
    if length < 1:
        raise RollpoolError(f"length: a row holds at least 1 token, got {length}")
    rows = [_Row(place, group, sample) for place, group in enumerate(groups) for sample in group.samples]
    full = np.array([row.prompt_length + row.output_length for row in rows], dtype=np.int32)
    lengths = np.minimum(full, length).astype(np.int32)
    prompt_lengths = np.minimum(np.array([row.prompt_length for row in rows], dtype=np.int32), length).astype(np.int32)
    kept = (lengths - prompt_lengths).tolist()
    at = np.arange(length, dtype=np.int32)[None, :]
    valid = at < lengths[:, None]
    mask = valid & (at >= prompt_lengths[:, None])
    return PackedBatch(
        ids=_laid_out(valid, pad_id, np.int32, lambda: [row.ids[:length] for row in rows]),
        mask=mask,
        valid=valid,
        logprobs=_laid_out(
            mask, 0.0, np.float32, lambda: [row.sample.logprobs[:k] for row, k in zip(rows, kept, strict=True)]
        ),
        versions=_laid_out(
            mask, NO_VERSION, np.int32, lambda: [row.versions[:k] for row, k in zip(rows, kept, strict=True)]
        ),
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        group=np.array([row.place for row in rows], dtype=np.int32),
        filtered=np.array([row.group.filtered for row in rows], dtype=np.bool_),
        truncated=int(np.count_nonzero(full > length)),
    )


def _laid_out(
    where: NDArray[np.bool_], neutral: float, dtype: type[Any], parts: Callable[[], list[NDArray[Any]]]
) -> NDArray[Any]:
    """The parts, row after row, at the positions that `where` names; a mask is filled in the same order."""
    array = np.full(where.shape, neutral, dtype=dtype)
    if len(array):
        array[where] = np.concatenate(parts())
    return array


@dataclass(frozen=True, slots=True)
class _Row:
    """One sample, and the group it is of."""

    place: int
    group: Group
    sample: Sample

    def __post_init__(self) -> None:
        if not self.prompt_length:
            raise RollpoolError(
                f'group {self.group.id} has no prompt_ids, as endpoint="chat" returns text alone; enqueue with '
                'endpoint="generate" to train on it'
            )

    @property
    def prompt_length(self) -> int:
        return len(self.group.prompt_ids)

    @property
    def output_length(self) -> int:
        return len(self.sample.output_ids)

    @property
    def ids(self) -> NDArray[np.int32]:
        """[P + G]."""
        return np.concatenate([self.group.prompt_ids, self.sample.output_ids])

    @property
    def versions(self) -> NDArray[np.int32]:
        """[G]."""
        spans = np.array(self.sample.version_spans, dtype=np.int32).reshape(-1, 3)
        return np.repeat(spans[:, 0], spans[:, 2] - spans[:, 1])
