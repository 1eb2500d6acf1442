"""Which host made the last turn of each conversation; pure, no I/O.

Invariant: what is remembered is a wish and no more: a key that was forgotten, or whose host is gone, costs a warm cache
and nothing else. It is bounded, and no part of a batch's content: a batch is the same wherever it wishes to run.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from rollpool.schemas.errors import InvalidPrompt
from rollpool.schemas.jobs import NAME_PATTERN

#: Keys remembered, those used last: a run has fewer conversations at once than the open jobs it may have by default,
#: 100,000, and what is not touched among so many others is out of the engines' caches too. Some 10 MB.
MOST_KEYS = 65_536

#: What a user may pass: one key for all prompts, or one a prompt (None: this one has no wish).
Affinity = str | Sequence[str | None] | None


class Homes:
    """The worker that made the last group of each key."""

    def __init__(self, most: int = MOST_KEYS) -> None:
        self._most = most
        self._workers: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._workers)

    def remember(self, key: str, worker: str) -> None:
        """A group of this key was made by this worker; the server's own settlements have none."""
        if not re.fullmatch(NAME_PATTERN, worker):
            return
        self._workers[key] = worker
        self._workers.move_to_end(key)
        if len(self._workers) > self._most:
            self._workers.popitem(last=False)

    def of(self, key: str) -> str | None:
        """The worker to wish for; None: not known."""
        return self._workers.get(key)


def checked_affinity(affinity: Affinity, size: int) -> list[str | None]:
    """One key or None a prompt; empty where no prompt has one. Raises InvalidPrompt."""
    if affinity is None:
        return []
    if isinstance(affinity, str):
        affinity = [affinity] * size
    if isinstance(affinity, bytes | Mapping) or not isinstance(affinity, Iterable):
        raise InvalidPrompt(
            f"affinity: expected one key, or a list with one key or None a prompt, not {type(affinity).__name__}"
        )
    keys = list(affinity)
    if len(keys) != size:
        raise InvalidPrompt(f"affinity: {len(keys)} keys for {size} prompts; give one key for all, or one for each")
    for index, key in enumerate(keys):
        if key is not None and (not isinstance(key, str) or not key):
            raise InvalidPrompt(f"affinity[{index}]: expected a non-empty string, or None, got {key!r:.80}")
    return keys if any(keys) else []
