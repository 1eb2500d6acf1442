"""What one storm is, from the environment.

Invariant: all choices but these follow from the seed.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from storm.faults import DECK, EVERY_S

#: Seconds of faults, jobs and faults at least. The last two are what a storm must have had to mean anything.
SECONDS, JOBS, FAULTS = 440.0, 10_000, 100

#: Of the time of faults: how much longer a storm on a slow machine may go on until it has its jobs.
LONGER = 1.5

#: Seconds until everything must be settled once the faults are over.
SETTLE_S = 180.0

#: Seconds of the leg at `appendfsync everysec`.
EVERYSEC_S = 60.0

BREAKS = ("settle", "lose", "policy")


@dataclass(frozen=True)
class Options:
    """The knobs."""

    seed: int
    seconds: float = SECONDS
    jobs: int = JOBS
    faults: int = FAULTS
    settle_s: float = SETTLE_S
    everysec_s: float = EVERYSEC_S
    workers: int = 6
    trainers: int = 3
    #: None: when the real engine is installed already.
    real: bool | None = None
    #: What of the workers is broken on purpose; None: nothing.
    broken: str | None = None
    #: Seconds between two faults.
    every_s: tuple[float, float] = EVERY_S
    #: Kinds of faults.
    kinds: tuple[str, ...] = tuple(DECK)
    #: Whether some prompts are poison.
    poison: bool = True
    #: Where journals and logs are kept; None: they are dropped when all went well.
    directory: str | None = None


def from_environment(environ: Mapping[str, str] = os.environ) -> Options:
    """Read `CHAOS_…`.

    Raises:
        SystemExit: a value is not what it has to be.
    """
    known = {
        "SECONDS",
        "SEED",
        "JOBS",
        "FAULTS",
        "SETTLE_SECONDS",
        "EVERYSEC_SECONDS",
        "WORKERS",
        "TRAINERS",
        "REAL",
        "BREAK",
        "DIR",
        "EVERY",
        "KINDS",
        "POISON",
    }
    for name in environ:
        if name.startswith("CHAOS_") and name.removeprefix("CHAOS_") not in known:
            raise SystemExit(f"{name}: there is no such knob; there are {', '.join(sorted(known))}")
    seconds = _number(environ, "SECONDS", SECONDS)
    broken = environ.get("CHAOS_BREAK") or None
    if broken not in (None, *BREAKS):
        raise SystemExit(f"CHAOS_BREAK={broken}: expected one of {', '.join(BREAKS)}")
    real = environ.get("CHAOS_REAL")
    return Options(
        seed=int(_number(environ, "SEED", time.time_ns() // 1000 % 1_000_000)),
        seconds=seconds,
        # A shorter storm has fewer; said outright, they stand.
        jobs=int(_number(environ, "JOBS", JOBS * min(1.0, seconds / SECONDS))),
        faults=int(_number(environ, "FAULTS", FAULTS * min(1.0, seconds / SECONDS))),
        settle_s=_number(environ, "SETTLE_SECONDS", SETTLE_S),
        everysec_s=_number(environ, "EVERYSEC_SECONDS", EVERYSEC_S),
        workers=int(_number(environ, "WORKERS", 6)),
        trainers=int(_number(environ, "TRAINERS", 3)),
        real=None if real is None else real not in ("", "0"),
        broken=broken,
        every_s=_pair(environ.get("CHAOS_EVERY")) or EVERY_S,
        kinds=_kinds(environ.get("CHAOS_KINDS")),
        poison=environ.get("CHAOS_POISON") not in ("", "0"),
        directory=environ.get("CHAOS_DIR") or None,
    )


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    try:
        return float(environ.get(f"CHAOS_{name}") or default)
    except ValueError:
        raise SystemExit(f"CHAOS_{name}={environ[f'CHAOS_{name}']}: expected a number") from None


def _pair(text: str | None) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        least, most = (float(part) for part in text.split("-"))
    except ValueError:
        raise SystemExit(f"CHAOS_EVERY={text}: expected seconds between faults, least and most, as 3-5") from None
    return least, most


def _kinds(text: str | None) -> tuple[str, ...]:
    kinds = tuple(text.split(",")) if text else tuple(DECK)
    if unknown := set(kinds) - set(DECK):
        raise SystemExit(f"CHAOS_KINDS: there are no {', '.join(sorted(unknown))}; there are {', '.join(DECK)}")
    return kinds
