"""Steady load on a pool while its policies change, and the proof of what came of it.

Invariant: every job that was asked for is judged: it has one result, its outcome is one that its tag allows, and each
of its tokens is of the policy that its version span names, as no other can have made it.
"""

import itertools
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from rollpool.ops.sim import made_by_spans
from rollpool.producer import PolicyRejected, RolloutPool, SamplingParams
from rollpool.schemas import Keys, RollpoolError
from rollpool.schemas.result_entry import group_of
from rollpool.schemas.results import Group

#: Prompts a batch.
PROMPTS = 8

#: Tokens a sample: a second or two, so that every change meets samples in the middle.
TOKENS = 64

#: Seconds between looks at how many jobs are open.
LOOK_S = 0.1

#: Seconds that a call may take that has begun when it is to end.
CLOSE_S = 10.0

#: Kinds of tags, in turn: staleness, or exact.
TAGS: tuple[int | str | None, ...] = (None, 0, 1, "exact", None, 1)

#: Pieces of one span at most: a sample that one fault after the other moves has more than most.
MOST_PIECES = 12


@dataclass(frozen=True, slots=True)
class Asked:
    """One job."""

    tag: int
    max_staleness: int | None
    exact: bool
    n: int
    prompt: tuple[int, ...]
    #: How often the lineage had gone back when it was enqueued.
    era: int

    def allows(self, version: int) -> bool:
        """Whether its tag allows this version."""
        if self.exact:
            return version == self.tag
        return self.max_staleness is None or version >= self.tag - self.max_staleness


@dataclass
class Book:
    """Who each version is, and which were abandoned; by era, since after going back a version may be another."""

    #: Signature by version.
    eras: list[dict[int, int]] = field(default_factory=lambda: [{}])
    #: Versions that were abandoned at the end of each era.
    abandoned: list[frozenset[int]] = field(default_factory=list)

    def published(self, version: int, signature: int) -> None:
        """A version of the present era."""
        self.eras[-1][version] = signature

    def went_back(self, version: int) -> None:
        """A new era, with what was published up to `version`."""
        before = self.eras[-1]
        self.abandoned.append(frozenset(each for each in before if each > version))
        self.eras.append({each: signature for each, signature in before.items() if each <= version})

    @property
    def era(self) -> int:
        """The present one."""
        return len(self.eras) - 1

    def may_be_stale(self, asked: Asked) -> bool:
        """An exact job whose policy is served no more, or one that was tagged with what was abandoned since."""
        return asked.exact or any(asked.tag in gone for gone in self.abandoned[asked.era :])


class Load(threading.Thread):
    """A trainer that asks for jobs of all kinds, as long as it is not told to stop.

    Args:
        url: of the server.
        pool: the pool's name.
        run: its own.
        book: of the policies that its jobs run on.
        most_open: jobs up to which another batch is enqueued.
        seed: of its prompts.
    """

    def __init__(self, url: str, pool: str, run: str, book: Book, *, most_open: int, seed: int = 0) -> None:
        super().__init__(name=f"load-{run}", daemon=True)
        self._pool = RolloutPool(url, pool=pool, run=run)
        self.keys, self.run_name, self.book = Keys(pool), run, book
        self._client: Redis = Redis.from_url(url, socket_timeout=5.0)
        self._most_open = most_open
        self._rng = random.Random(seed)
        self._ended = threading.Event()
        self._paused = threading.Event()
        #: The version that jobs are tagged with.
        self.tag = 0
        self.asked: dict[tuple[str, int], Asked] = {}
        self.broken: BaseException | None = None
        #: What kept it from asking, for people.
        self.troubles: list[str] = []

    def run(self) -> None:
        """The thread."""
        try:
            for number in itertools.count():
                while not self._ended.is_set() and (self._paused.is_set() or self._open() >= self._most_open):
                    self._ended.wait(LOOK_S)
                if self._ended.is_set():
                    return
                self._enqueue(f"load-{number}", TAGS[number % len(TAGS)])
        except BaseException as error:  # whoever checks what came of it is to hear of it
            self.broken = error

    def ask(self, batch: str, tag: int, kind: int | str | None, *, n: int = 1, count: int = PROMPTS) -> None:
        """Enqueue one batch, as often as it takes."""
        prompts = [[self._rng.randrange(100, 100_000) for _ in range(4)] for _ in range(count)]
        staleness, exact = kind if isinstance(kind, int) else None, kind == "exact"
        for index, prompt in enumerate(prompts):
            self.asked[batch, index] = Asked(tag, staleness, exact, n, tuple(prompt), self.book.era)
        sampling = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)

        def send() -> None:
            try:
                self._pool.enqueue_prompts(
                    prompts,
                    policy_version=tag,
                    n=n,
                    sampling=sampling,
                    max_staleness=staleness,
                    exact=exact,
                    batch_id=batch,
                )
            except RollpoolError as error:
                self.troubles.append(f"{batch}: {type(error).__name__}: {error}")
                raise

        again(send)

    def pause(self) -> None:
        """Ask for nothing more for now."""
        self._paused.set()

    def resume(self) -> None:
        """Ask again."""
        self._paused.clear()

    def close(self) -> None:
        """Ask for nothing more, and let go of the server."""
        self._ended.set()
        self.join(CLOSE_S)
        self._pool.close()
        self._client.close()

    def _enqueue(self, batch: str, kind: int | str | None) -> None:
        self.ask(batch, self.tag, kind, n=self._rng.choice((1, 2, 3)))

    def _open(self) -> int:
        try:
            return int(self._client.hget(self.keys.run(self.run_name), "open") or 0)
        except RedisError:  # the server is away
            return self._most_open

    def unsettled(self) -> list[str]:
        """Jobs without an outcome, by the server's book."""
        open_jobs = []
        for batch in sorted({batch for batch, _ in self.asked}):
            fields: Any = self._client.hgetall(self.keys.batch(self.run_name, batch))
            wanted = {index for name, index in self.asked if name == batch}
            settled = {int(name) for name, state in fields.items() if name.isdigit() and state != b"open"}
            open_jobs += [f"{batch}/{index}" for index in sorted(wanted - settled)]
        return open_jobs

    def groups(self) -> dict[tuple[str, int], list[Group]]:
        """All results of each job."""
        found: dict[tuple[str, int], list[Group]] = defaultdict(list)
        for batch in {batch for batch, _ in self.asked}:
            entries: Any = self._client.xrange(self.keys.results(self.run_name, batch))
            for _, fields in entries:
                group = group_of(self.run_name, batch, fields)
                found[batch, group.index].append(group)
        return found

    def judged(self) -> Counter[str]:
        """Prove everything that was asked for so far, once it is settled; jobs by outcome.

        Raises:
            AssertionError: names what is wrong.
        """
        outcomes: Counter[str] = Counter()
        groups = self.groups()
        assert set(groups) <= set(self.asked), "results that nobody asked for"
        for (batch, index), asked in self.asked.items():
            results = groups.get((batch, index), [])
            name = f"{self.run_name}:{batch}/{index}"
            assert len(results) == 1, f"{name}: {len(results)} results"
            self._judge(name, asked, results[0])
            outcomes[results[0].outcome] += 1
        return outcomes

    def _judge(self, name: str, asked: Asked, group: Group) -> None:
        if group.outcome == "stale":
            assert self.book.may_be_stale(asked), f"{name}: stale, and its tag {asked} does not say so: {group.error}"
            return
        assert group.outcome == "ok", f"{name}: {group.outcome}: {group.error}"
        assert tuple(group.prompt_ids.tolist()) == asked.prompt, f"{name}: it is of another prompt"
        assert len(group.samples) == asked.n, f"{name}: {len(group.samples)} samples of {asked.n}"
        for sample in group.samples:
            assert len(sample.output_ids) == TOKENS, f"{name}: {len(sample.output_ids)} tokens"
            for version in sample.versions:
                assert asked.allows(version), f"{name}: made by {version}, which {asked} forbids"
        # A host that waits for its turn to go back serves what was abandoned until then.
        eras = self.book.eras[max(0, asked.era - 1) :]
        problems = [problem(era, asked.prompt, group) for era in eras]
        assert not all(problems), f"{name}, {asked}: {problems}; settled by {group.worker}"


def problem(signatures: Mapping[int, int], prompt: Sequence[int], group: Group) -> str:
    """What shows that these policies did not make a group; empty where they did."""
    for number, sample in enumerate(group.samples):
        spans = [tuple(span) for span in sample.version_spans]
        if not made_by_spans(
            signatures, prompt, sample.output_ids, spans, logprobs=sample.logprobs, most_pieces=MOST_PIECES
        ):
            return f"sample {number} is not of {spans} where they are {dict(signatures)}"
    return ""


def again(call: Callable[[], object], seconds: float = 60.0) -> None:
    """Repeat until it works, since the server may be away; what is rejected is not repeated."""
    end = time.monotonic() + seconds
    while True:
        try:
            call()
        except PolicyRejected:
            raise
        except (RollpoolError, RedisError):
            assert time.monotonic() < end, "the server did not come back"
            time.sleep(0.2)
        else:
            return
