"""The Lua scripts, each beside its typed caller: the only code that changes the state of a job.

Invariant: a script looks before it writes, and writes all or nothing; so every caller may be repeated, late, or
killed at any point.
"""

from rollpool.schemas.scripts.base import Script
from rollpool.schemas.scripts.commit import commit
from rollpool.schemas.scripts.enqueue import Enqueued, enqueue
from rollpool.schemas.scripts.entries import Entry
from rollpool.schemas.scripts.give_back import GiveBack, give_back
from rollpool.schemas.scripts.leases import reclaim, renew
from rollpool.schemas.scripts.publish import publish
from rollpool.schemas.scripts.pull import pull
from rollpool.schemas.scripts.settle import Settled, Settlement, settle

__all__ = [
    "Enqueued",
    "Entry",
    "GiveBack",
    "Script",
    "Settled",
    "Settlement",
    "commit",
    "enqueue",
    "give_back",
    "publish",
    "pull",
    "reclaim",
    "renew",
    "settle",
]
