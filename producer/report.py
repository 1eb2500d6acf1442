"""What became of a batch, in numbers.

Invariant: every job of the batch is in exactly one of the counts, so that nothing is dropped without being seen.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict


class Lengths(BaseModel):
    """A distribution of lengths in tokens; all zero when there are none."""

    model_config = ConfigDict(frozen=True)

    count: int = 0
    mean: float = 0.0
    median: float = 0.0
    max: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        """Summarise `lengths`, in tokens."""
        if not lengths:
            return cls()
        return cls(count=len(lengths), mean=float(np.mean(lengths)), median=float(np.median(lengths)), max=max(lengths))


class BatchReport(BaseModel):
    """One batch as far as it was read: what was kept, what was dropped and why, and how the two differ.

    Dropped prompts that are longer than kept ones mean that the training data leans to short prompts.
    """

    model_config = ConfigDict(frozen=True)

    batch: str
    #: Groups, one a prompt, however they were split; the sum of the seven below.
    enqueued: int
    #: Kept: handed out, or about to be.
    ok: int
    #: Finished well, and not needed: beyond the `first_k` that `collect` was asked for.
    surplus: int
    failed: int
    stale: int
    expired: int
    cancelled: int
    #: Not settled, or not read yet.
    open: int
    #: Generated tokens of each kept sample; with `min_samples` a group may have fewer samples than were asked for.
    kept_outputs: Lengths
    #: Prompt tokens of each kept group.
    kept_prompts: Lengths
    #: Prompt tokens of each dropped group that reached an engine; the others were never tokenized.
    dropped_prompts: Lengths

    @property
    def dropped(self) -> int:
        """Groups that are settled and not kept."""
        return self.surplus + self.failed + self.stale + self.expired + self.cancelled
