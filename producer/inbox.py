"""What has arrived of one batch; pure, no I/O.

Invariant: each group is handed out at most once, whatever is read twice; what counts as consumed is a prefix of the
order of arrival, so one number says it.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from rollpool.producer.report import BatchReport, Lengths
from rollpool.schemas.results import Group

_LOG = logging.getLogger("rollpool.producer")

#: Half-open ranges `[start, end]` of indexes: a batch consumed whole is one pair, however large.
Ranges = list[list[int]]

#: Before the first entry of a stream.
BEGIN = "0-0"


class Inbox:
    """The groups of one batch, from the results stream to the user."""

    def __init__(self, batch: str, size: int, consumed: Iterable[int] = ()) -> None:
        """`consumed`: indexes that an earlier process handed out; they are not handed out again."""
        self.batch = batch
        self.size = size
        #: Id of the last entry read from the results stream.
        self.cursor = BEGIN
        #: Groups handed out, of those in `_order`. A consumer sets it before it yields, with no call in between, so
        #: that a Ctrl-C falls before or after and never between the two.
        self.given = 0
        self.dropped: list[Group] = []
        self.outcomes: Counter[str] = Counter()
        self._before = frozenset(consumed)
        self._read: set[int] = set()
        self._order: list[int] = []
        self._groups: dict[int, Group] = {}
        self._released = 0
        self._kept_outputs: list[int] = []
        self._kept_prompts: list[int] = []

    def add(self, entry: str, group: Group) -> None:
        """Take in one entry of the results stream."""
        self.cursor = entry
        if group.index in self._read:
            return
        self._read.add(group.index)
        self.outcomes[group.outcome] += 1
        if group.outcome != "ok":
            self._drop(group)
            return
        self._kept_outputs += [len(sample.output_ids) for sample in group.samples]
        self._kept_prompts.append(len(group.prompt_ids))
        if group.index not in self._before:
            self._order.append(group.index)
            self._groups[group.index] = group

    def _drop(self, group: Group) -> None:
        if self.outcomes[group.outcome] == 1:
            _LOG.warning(
                "batch %s: prompt %d was dropped as %s (%s); further ones of this kind are in batch.dropped",
                self.batch,
                group.index,
                group.outcome,
                group.error or "no error given",
            )
        self.dropped.append(group)

    @property
    def ready(self) -> bool:
        """True when a group waits to be handed out."""
        return self.given < len(self._order)

    @property
    def settled(self) -> int:
        """Jobs whose outcome was read."""
        return len(self._read)

    @property
    def all_read(self) -> bool:
        """True when the outcome of every job was read."""
        return self.settled == self.size

    @property
    def complete(self) -> bool:
        """True when every job was settled and every group handed out: the batch can be committed."""
        return self.all_read and not self.ready

    def head(self) -> Group:
        """The next group to hand out; the caller then raises `given`."""
        for index in self._order[self._released : self.given]:
            del self._groups[index]
        self._released = self.given
        return self._groups[self._order[self.given]]

    def consumed(self) -> Ranges:
        """Indexes handed out, here and before a resume."""
        return as_ranges(sorted(self._before.union(self._order[: self.given])))

    def report(self) -> BatchReport:
        """Counts and lengths of what was read."""
        return BatchReport(
            batch=self.batch,
            enqueued=self.size,
            ok=self.outcomes["ok"],
            failed=self.outcomes["failed"],
            stale=self.outcomes["stale"],
            expired=self.outcomes["expired"],
            cancelled=self.outcomes["cancelled"],
            open=self.size - self.settled,
            kept_outputs=Lengths.of(self._kept_outputs),
            kept_prompts=Lengths.of(self._kept_prompts),
            dropped_prompts=Lengths.of([len(group.prompt_ids) for group in self.dropped if len(group.prompt_ids)]),
        )


def as_ranges(indexes: Sequence[int]) -> Ranges:
    """Sorted indexes as half-open ranges: `[0, 1, 2, 5]` is `[[0, 3], [5, 6]]`."""
    ranges: Ranges = []
    for index in indexes:
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] = index + 1
        else:
            ranges.append([index, index + 1])
    return ranges


def from_ranges(ranges: Iterable[Sequence[int]]) -> set[int]:
    """The inverse of `as_ranges`."""
    return {index for start, end in ranges for index in range(start, end)}
