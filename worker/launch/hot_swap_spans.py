"""Which version of the weights made which tokens of a request; pure.

Kept in the scheduler, which alone knows what was computed before a change and what after it, and sent along with the
tokens: no message can overtake another.

Invariant: the spans of a request lie end to end over its tokens, none is empty, and neighbours differ in version.
"""

from collections.abc import Hashable, Iterable, Sequence

#: One span: version, first token, one past the last.
Span = tuple[str, int, int]


class VersionMarks:
    """The version that serves, and where requests that saw others changed over.

    Args:
        version: The version that serves at first.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        # By request: versions that served before, each with the number of tokens there were when it ended.
        self._marks: dict[Hashable, list[tuple[str, int]]] = {}

    def change(self, version: str, unfinished: Iterable[tuple[Hashable, int]]) -> None:
        """Let another version serve from now on.

        Args:
            version: The new one.
            unfinished: Every request that will go on, with the number of tokens it has. All others are forgotten:
                they ended without an output, as one that is aborted in the queue does.
        """
        before = self._marks
        self._marks = {rid: [*before.get(rid, ()), (self.version, tokens)] for rid, tokens in unfinished if tokens}
        self.version = version

    def spans(self, rid: Hashable, tokens: int) -> list[Span]:
        """The spans over the first `tokens` tokens of a request."""
        spans: list[Span] = []
        start = 0
        for version, end in [*self._marks.get(rid, ()), (self.version, tokens)]:
            end = min(end, tokens)  # An output that a stop string ends early is shorter than what was sampled.
            if end <= start:
                continue
            if spans and spans[-1][0] == version:
                spans[-1] = (version, spans[-1][1], end)
            else:
                spans.append((version, start, end))
            start = end
        return spans

    def of_outputs(
        self, rids: Sequence[Hashable], tokens: Sequence[int], finished: Sequence[object | None]
    ) -> list[list[Span]]:
        """The spans of each of several outputs; requests with a finish reason are forgotten after it."""
        spans = [self.spans(rid, count) for rid, count in zip(rids, tokens, strict=False)]
        for rid, reason in zip(rids, finished, strict=False):
            if reason is not None:
                self._marks.pop(rid, None)
        return spans
