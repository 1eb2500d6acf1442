"""One trainer of the storm, as a process: `python -m storm.trainer SETTINGS.json`.

It does what docs/howto-trainer.md asks of a trainer: names its batches by step, writes its checkpoint and the pool's
state in one file before it commits, and after a kill goes on from the last such file. What it "trains" is the list of
groups since the checkpoint before.

Invariant: it may be killed at any moment. What it was handed is in its journal; what it trained is what the chain of
checkpoints from the last file back to the first one holds, and nothing else.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rollpool.producer import Batch, Group, RolloutPool, SamplingParams
from rollpool.schemas import PoolTimeout, RollpoolError
from storm import journal
from storm.work import Asked, digest, sim_batch, text_batch

#: Batches not committed at most: one that waits for the last try of a poisoned prompt must not hold up the others.
AHEAD_BATCHES = 12

#: Seconds of one call of `collect`.
COLLECT_S = 2.0

#: Seconds before a call that failed is repeated.
AGAIN_S = 0.3

#: Seconds that a commit waits at most until the tap has seen every result of the batch: a commit drops them.
TAP_S = 15.0

#: Groups between two checkpoints, least and most.
SAVE_EVERY = (10, 60)


class Trainer:
    """The trainer, from this start to its end.

    Args:
        settings: what the storm wrote for it: `url`, `pool`, `run`, `directory`, `seed`, `kind` (`sim` or `text`),
            `orders` (first tokens of poison) and `last_poison` (the last step that has any), `size` (prompts a batch),
            `ahead` (open jobs up to which another batch is enqueued) and `pause_s` (seconds after each).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._directory = Path(settings["directory"])
        self._run = str(settings["run"])
        self._state_file = self._directory / f"state-{self._run}.json"
        self._path = self._directory / f"trainer-{self._run}.jsonl"
        self._intents: dict[str, Asked] = {}
        #: Batches that have to be enqueued, the first time or again.
        self._unsure: list[str] = []
        self._committed: set[str] = set()
        self._remember()
        self._journal = journal.Journal(self._path)
        self._rng = random.Random(os.getpid())
        self._saves = 0
        self._parent: str | None = None
        self._trained: list[tuple[str, int]] = []
        self._cancelled: set[str] = set()
        self._pool = self._open()

    def _remember(self) -> None:
        """What its journal says: the batches it meant to enqueue, and those that were committed."""
        for fact in journal.read(self._path):
            if fact["fact"] == "intent":
                self._intents[fact["batch"]] = self._asked(fact["step"], fact["tag"])
            elif fact["fact"] == "committed":
                self._committed.add(fact["batch"])

    def _asked(self, step: int, version: int) -> Asked:
        settings = self._settings
        if settings["kind"] == "text":
            return text_batch(settings["seed"], self._run, step, version, settings["size"])
        orders, last_poison = settings["orders"], settings["last_poison"]
        return sim_batch(settings["seed"], self._run, step, version, settings["size"], orders, last_poison)

    def _open(self) -> RolloutPool:
        url, pool = self._settings["url"], self._settings["pool"]
        self._journal.add("started", pid=os.getpid())
        if not self._state_file.is_file():
            # Nothing was ever saved: whatever was enqueued is enqueued again under the same names, and comes whole.
            self._unsure = list(self._intents)
            return RolloutPool(url, pool=pool, run=self._run)
        state = json.loads(self._state_file.read_text())
        self._parent = state["save"]
        while True:
            try:
                resumed = RolloutPool.resume(state["pool"], url, pool=pool)
            except RollpoolError as error:
                self._failed("resume", error)
            else:
                over = self._committed | {name for name, batch in state["pool"]["batches"].items() if batch["complete"]}
                # The rest is on the server, or was not acknowledged, or the server lost it.
                self._unsure = [name for name in self._intents if name not in over and name not in resumed.batches]
                return resumed

    def run(self) -> None:
        """Work until told to stop and nothing is left."""
        while True:
            try:
                self._top_up()
                if not self._pool.batches and not self._unsure and self._told_to_stop():
                    break
                self._collect()
                self._save()
                self._commit()
            except PoolTimeout:
                continue
            except RollpoolError as error:
                self._failed("work", error)
                # Whatever it was: under its name a batch may be enqueued again, and must be where the server lost it.
                self._unsure = list(dict.fromkeys([*self._unsure, *self._pool.batches]))
        self._journal.add("finished")
        self._journal.sync()
        self._pool.close()

    def _told_to_stop(self) -> bool:
        return (self._directory / "stop").exists()

    def _failed(self, what: str, error: RollpoolError) -> None:
        self._journal.add("error", what=what, error=f"{type(error).__name__}: {error}"[:300])
        time.sleep(AGAIN_S)

    # Enqueueing.

    def _top_up(self) -> None:
        for name in list(self._unsure):
            self._enqueue(name)
        while self._room() and not self._told_to_stop():
            current = self._pool.current_policy()
            if current is None:
                raise RollpoolError("no policy was published yet")
            step = len(self._intents)
            asked = self._asked(step, current.version)
            self._intents[asked.batch] = asked
            self._unsure.append(asked.batch)
            self._journal.add("intent", step=step, pool=self._settings["pool"], run=self._run, **asked.facts())
            self._journal.sync()
            self._enqueue(asked.batch)
            time.sleep(self._settings["pause_s"])

    def _room(self) -> bool:
        batches, ahead = self._pool.batches.values(), self._settings["ahead"]
        return len(batches) < AHEAD_BATCHES and sum(batch.report().open for batch in batches) < ahead

    def _enqueue(self, name: str) -> None:
        """Enqueue a batch, the first time or again: under its name nothing happens twice."""
        asked = self._intents[name]
        self._pool.enqueue_prompts(
            asked.prompts,
            policy_version=asked.policy_version,
            n=asked.n,
            sampling=SamplingParams(max_new_tokens=asked.max_new_tokens, ignore_eos=self._settings["kind"] == "text"),
            max_staleness=asked.max_staleness,
            exact=asked.exact,
            lane=asked.lane,
            batch_id=name,
            split=asked.split,
            min_samples=asked.min_samples,
            deadline=asked.deadline,
            timeout=5.0,
        )
        # Synced: from here on the checker holds the pool to it.
        self._journal.add("enqueued", batch=name, at=time.time())
        self._journal.sync()
        self._unsure.remove(name)

    # Collecting.

    def _collect(self) -> None:
        """Take groups until it is time for a checkpoint, one batch's or any batch's in turn."""
        batches = list(self._pool.batches.values())
        if not batches:
            return
        most = self._rng.randint(*SAVE_EVERY)
        batch = batches[0]
        asked = self._intents[batch.id]
        if asked.first_k is None and self._rng.random() < 0.8:
            groups = self._pool.groups(n=most, timeout=COLLECT_S)
        else:
            groups = batch.collect(timeout=COLLECT_S, first_k=asked.first_k)
        with contextlib.suppress(PoolTimeout):
            for group in itertools.islice(groups, most):
                self._train(group)
                self._cut_short(group.batch)
        for each in batches:
            self._cut_short(each.id)

    def _train(self, group: Group) -> None:
        self._trained.append((group.batch, group.index))
        self._journal.add(
            "got",
            batch=group.batch,
            index=group.index,
            versions=sorted({version for sample in group.samples for version in sample.versions}),
            digest=digest([sample.output_ids for sample in group.samples]),
            prompt=digest([group.prompt_ids]),
            samples=len(group.samples),
        )

    def _cut_short(self, name: str) -> None:
        """Cancel the rest of a batch whose trainer has enough."""
        asked = self._intents[name]
        if asked.cancel_after is None or name in self._cancelled:
            return
        batch = self._pool.batches.get(name)
        if batch is not None and batch.report().ok >= asked.cancel_after:
            self._journal.add("cancelled", batch=name, count=batch.cancel())
            self._cancelled.add(name)

    # Checkpoints.

    def _save(self) -> None:
        """Write the checkpoint: from the moment the file is replaced this is what was trained."""
        state = self._pool.state_dict()
        self._saves += 1
        name = f"{os.getpid()}-{time.time_ns()}-{self._saves}"
        self._journal.add("saved", save=name, parent=self._parent, trained=self._trained)
        self._journal.sync()
        journal.replace(self._state_file, {"save": name, "pool": state})
        self._parent, self._trained = name, []

    def _commit(self) -> None:
        complete = {name for name, facts in self._pool.state_dict()["batches"].items() if facts["complete"]}
        for name, batch in self._pool.batches.items():
            if name not in complete:
                continue
            dropped = {group.index: [group.outcome, (group.error or "")[:200]] for group in batch.dropped}
            self._journal.add("ended", batch=name, dropped=dropped)
            self._wait_for_tap(name)
            self._finish(batch)

    def _wait_for_tap(self, name: str) -> None:
        mark = self._directory / "tapped" / f"{self._settings['pool']}.{self._run}.{name}"
        until = time.monotonic() + TAP_S
        while not mark.exists():
            if time.monotonic() > until:
                self._journal.add("untapped", batch=name)
                return
            time.sleep(0.02)

    def _finish(self, batch: Batch) -> None:
        batch.commit()
        self._journal.add("committed", batch=batch.id)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Read the settings; work."""
    signal.signal(signal.SIGTERM, _leave)
    settings = json.loads(Path(sys.argv[1]).read_text())
    Trainer(settings).run()


if __name__ == "__main__":
    main()
