"""The Lua scripts, each beside its typed caller: the only code that changes the state of a job.

Invariant: a script looks before it writes, and writes all or nothing; so every caller may be repeated, late, or
killed at any point.
"""

from rollpool.schemas.scripts.base import Script
from rollpool.schemas.scripts.commit import commit, mark_read
from rollpool.schemas.scripts.enqueue import Enqueued, enqueue
from rollpool.schemas.scripts.entries import Entry, Record
from rollpool.schemas.scripts.finish import expire, expire_async, finish, sweep
from rollpool.schemas.scripts.give_back import READY, GiveBack, Place, delayed, exact, give_back, parked, passed
from rollpool.schemas.scripts.leases import reclaim, renew, renew_async
from rollpool.schemas.scripts.publish import Answered, publish
from rollpool.schemas.scripts.pull import Pulled, RunOffer, pull
from rollpool.schemas.scripts.rollback import Pending, pending_of, roll_back, settled_pending
from rollpool.schemas.scripts.settle import PART, Settled, Settlement, settle
from rollpool.schemas.scripts.turn import Turn, release_turn, renew_turn, take_turn

__all__ = [
    "PART",
    "READY",
    "Answered",
    "Enqueued",
    "Entry",
    "GiveBack",
    "Pending",
    "Place",
    "Pulled",
    "Record",
    "RunOffer",
    "Script",
    "Settled",
    "Settlement",
    "Turn",
    "commit",
    "delayed",
    "enqueue",
    "exact",
    "expire",
    "expire_async",
    "finish",
    "give_back",
    "mark_read",
    "parked",
    "passed",
    "pending_of",
    "publish",
    "pull",
    "reclaim",
    "release_turn",
    "renew",
    "renew_async",
    "renew_turn",
    "roll_back",
    "settle",
    "settled_pending",
    "sweep",
    "take_turn",
]
