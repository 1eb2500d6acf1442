"""Which fault comes when, to whom and for how long: a pure function of the seed.

Invariant: the same seed and the same counts give the same faults in the same order; every kind comes once before any
comes twice, so that a short storm misses none.
"""

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

#: How often each kind comes in a deck of 25. What a pool must survive every day comes most.
DECK = {
    "worker_kill": 4,
    "engine_kill": 2,
    "scheduler_kill": 2,
    "trainer_kill": 3,
    "worker_stop": 2,
    "server_kill": 2,
    "cut": 2,
    "refuse": 1,
    "stall": 1,
    "lose_replies": 2,
    "policy": 2,
    "adapter": 1,
    "back": 1,
}

#: Seconds between two faults.
EVERY_S = (2.8, 4.6)

#: Seconds that a fault lasts, least and most: until what was killed is started again, or what was held up goes on. A
#: stopped worker is held for longer than its lease (see `_seconds`). Of going back: how long there is something to go
#: back from.
LASTS_S = {
    "worker_kill": (0.3, 7.0),
    "trainer_kill": (0.2, 3.0),
    "server_kill": (0.1, 1.5),
    "refuse": (0.5, 1.5),
    "stall": (0.5, 2.0),
    "lose_replies": (0.1, 0.6),
    "back": (0.3, 4.0),
}

#: A stopped worker sleeps for so many leases.
STOP_LEASES = (1.3, 2.0)


@dataclass(frozen=True)
class Fault:
    """One fault."""

    #: Seconds after the beginning.
    at: float
    kind: str
    #: Which worker or trainer, in [0, 1): the injector takes that share of those it can take.
    victim: float
    seconds: float
    #: Share of the connections that are cut.
    share: float


def faults(
    seed: int, *, lease_s: float, every_s: tuple[float, float] = EVERY_S, kinds: Collection[str] = tuple(DECK)
) -> Iterator[Fault]:
    """All faults of a seed that are of these kinds, without end."""
    rng = random.Random(f"faults-{seed}")
    at = 0.0
    for kind in _kinds(rng, {kind: count for kind, count in DECK.items() if kind in kinds}):
        at += rng.uniform(*every_s)
        yield Fault(
            at=at,
            kind=kind,
            victim=rng.random(),
            seconds=_seconds(kind, lease_s, rng),
            share=rng.choice((0.3, 0.6, 1.0)),
        )


def _kinds(rng: random.Random, counts: Mapping[str, int]) -> Iterator[str]:
    first = list(counts)
    rng.shuffle(first)
    yield from first
    while True:
        deck = [kind for kind, count in counts.items() for _ in range(count)]
        rng.shuffle(deck)
        yield from deck


def _seconds(kind: str, lease_s: float, rng: random.Random) -> float:
    least, most = LASTS_S.get(kind, (0.0, 0.0))
    if kind == "worker_stop":
        least, most = STOP_LEASES[0] * lease_s, STOP_LEASES[1] * lease_s
    return rng.uniform(least, most)
