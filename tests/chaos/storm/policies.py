"""The policies of one pool: who each version is, and how one is published, gone back from, or put on another.

Invariant: no version is used twice, so who made a token can be told by its version alone; and what is published or
abandoned is written down before the server is asked, so that a reply that is lost leaves nothing unknown.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollpool.ops.sim import adapted, make_sim_adapter, make_sim_model
from rollpool.producer import RolloutPool
from storm import journal

#: The run that publishes checkpoints.
PUBLISHER = "publisher"

#: Signatures of checkpoints and of adapters, by version over these.
_CHECKPOINTS, _ADAPTERS = 1000, 5000

#: Calls until it works.
Again = Callable[[Callable[[], object]], None]


@dataclass
class Known:
    """What was written down of all pools."""

    #: Who made what is of this version, by pool and version; nothing of real checkpoints.
    signatures: dict[str, dict[int, int]] = field(default_factory=dict)
    #: Whose jobs alone may run on a version, by pool and version: an adapter's run.
    owners: dict[tuple[str, int], str] = field(default_factory=dict)
    #: Versions that their lineage went back from.
    abandoned: set[tuple[str, int]] = field(default_factory=set)


class Policies:
    """The policies of one pool, published one after the other.

    Args:
        directory: of the storm.
        pool: the pool's name.
        checkpoints: by version, from 1 on; a version that an adapter has leaves one out.
        simulated: whether they are `make_sim_model`'s, with a signature for each version.
    """

    def __init__(self, directory: Path, pool: str, checkpoints: list[Path], *, simulated: bool = True) -> None:
        self._pool = pool
        self._checkpoints = checkpoints
        self._adapters = directory / "models" / pool
        self._journal = journal.Journal(directory / f"policies-{pool}.jsonl")
        self._simulated = simulated
        #: Versions of checkpoints that were not abandoned.
        self._live: list[int] = []
        self._last = 0

    @property
    def left(self) -> int:
        """Versions that can be published yet."""
        return len(self._checkpoints) - self._last

    def publish(self, url: str, again: Again, **options: Any) -> int:
        """Publish the next checkpoint; its version."""
        version = self._next()
        path = str(self._checkpoints[version - 1])
        self._note(version, _CHECKPOINTS + version)
        self._live.append(version)
        with RolloutPool(url, pool=self._pool, run=PUBLISHER) as trainer:
            again(lambda: trainer.publish_policy(version, checkpoint=path, **options))
        return version

    def publish_adapter(self, url: str, run: str, again: Again) -> int:
        """Publish an adapter of a run on the current checkpoint; its version."""
        version, base = self._next(), self._live[-1]
        path = make_sim_adapter(self._adapters / f"lora-{version}", _ADAPTERS + version)
        self._note(version, adapted(_CHECKPOINTS + base, _ADAPTERS + version), run)
        with RolloutPool(url, pool=self._pool, run=run) as trainer:
            again(lambda: trainer.publish_policy(version, lora_path=str(path), base=str(self._checkpoints[base - 1])))
        return version

    def go_back(self, url: str, again: Again) -> int:
        """Abandon the last checkpoint; the version that is current then."""
        abandoned = self._live.pop()
        self._journal.add("abandoned", pool=self._pool, version=abandoned)
        with RolloutPool(url, pool=self._pool, run=PUBLISHER) as trainer:
            again(lambda: trainer.rollback_policy(self._live[-1]))
        return self._live[-1]

    def _next(self) -> int:
        self._last += 1
        return self._last

    def _note(self, version: int, signature: int, run: str | None = None) -> None:
        facts: dict[str, Any] = {"signature": signature} if self._simulated else {}
        self._journal.add("published", pool=self._pool, version=version, run=run, **facts)


def read(directory: Path) -> Known:
    """What was written down in a storm's directory."""
    known = Known()
    for path in sorted(directory.glob("policies-*.jsonl")):
        for fact in journal.read(path):
            pool, version = fact["pool"], fact["version"]
            if fact["fact"] == "abandoned":
                known.abandoned.add((pool, version))
                continue
            if "signature" in fact:
                known.signatures.setdefault(pool, {})[version] = fact["signature"]
            if fact["run"] is not None:
                known.owners[pool, version] = fact["run"]
    return known


def make_policies(directory: Path, pool: str, count: int) -> list[Path]:
    """Checkpoints of simulated policies, in order of their versions."""
    paths = [directory / "models" / pool / str(version) for version in range(1, count + 1)]
    for version, path in enumerate(paths, start=1):
        make_sim_model(path, signature=_CHECKPOINTS + version)
        add_tokenizer(path)
    return paths


def add_tokenizer(path: Path) -> None:
    """A checkpoint has to have a tokenizer; one that knows no words will do, since prompts are ids."""
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
