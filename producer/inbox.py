"""What has arrived of one batch; pure, no I/O.

Invariant: each group is handed out at most once, whatever is read twice, and every job is in exactly one count of the
report; what counts as consumed is a prefix of the order of arrival, so one number says it.
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
        #: Id of the last entry read from the results stream, and the bytes of the results up to there.
        self.cursor = BEGIN
        self.read_bytes = 0
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
        self._first_k: int | None = None
        #: Lengths of prompt and outputs of each group that is kept.
        self._kept: dict[int, tuple[int, list[int]]] = {}
        self._surplus_prompts: list[int] = []

    def add(self, entry: str, group: Group, size: int = 0) -> None:
        """Take in one entry of the results stream, of `size` bytes."""
        self.cursor = entry
        self.read_bytes += size
        if group.index in self._read:
            return
        self._read.add(group.index)
        self.outcomes[group.outcome] += 1
        if group.outcome != "ok":
            self._drop(group)
            return
        self._kept[group.index] = len(group.prompt_ids), [len(sample.output_ids) for sample in group.samples]
        if group.index not in self._before:
            self._order.append(group.index)
            self._groups[group.index] = group
            self._drop_surplus()

    def rewind(self) -> None:
        """Read the stream from its beginning again: the server may have another one by now."""
        self.cursor, self.read_bytes = BEGIN, 0

    def keep_first(self, count: int) -> None:
        """Hand out no more than `count` groups in all; what else is or comes here is surplus."""
        self._first_k = count
        self._drop_surplus()

    def reached(self, count: int) -> bool:
        """True when the next group is the last of the first `count`, or all these went, and there may be more."""
        return self.handed + self.ready >= count and not (self.all_read and len(self._order) <= self._places(count))

    def _places(self, count: int) -> int:
        """Groups of `_order` that are among the first `count`; what was handed out stays handed out."""
        return max(self.given, count - len(self._before))

    def _drop_surplus(self) -> None:
        if self._first_k is None:
            return
        places = self._places(self._first_k)
        for index in self._order[places:]:
            del self._groups[index]
            prompt, _ = self._kept.pop(index)
            self._surplus_prompts.append(prompt)
        del self._order[places:]

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
    def handed(self) -> int:
        """Groups handed out, here and before a resume."""
        return len(self._before) + self.given

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

    def not_kept(self) -> Ranges:
        """Indexes of which no group is kept here."""
        return as_ranges([index for index in range(self.size) if index not in self._kept])

    def report(self) -> BatchReport:
        """Counts and lengths of what was read."""
        dropped = [*(len(group.prompt_ids) for group in self.dropped), *self._surplus_prompts]
        return BatchReport(
            batch=self.batch,
            enqueued=self.size,
            ok=len(self._kept),
            surplus=len(self._surplus_prompts),
            failed=self.outcomes["failed"],
            stale=self.outcomes["stale"],
            expired=self.outcomes["expired"],
            cancelled=self.outcomes["cancelled"],
            open=self.size - self.settled,
            kept_outputs=Lengths.of([length for _, outputs in self._kept.values() for length in outputs]),
            kept_prompts=Lengths.of([prompt for prompt, _ in self._kept.values()]),
            dropped_prompts=Lengths.of([length for length in dropped if length]),
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
