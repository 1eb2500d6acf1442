"""Shortens what a test would wait for in a worker; on the path of such workers alone.

Invariant: nothing but times is changed, and only of a worker that is asked to hurry.
"""

import os
import sys

if "rq.cli" in sys.orig_argv and (seconds := os.environ.get("CHANGE_TURN_LEASE_S")):
    from rollpool.worker.policy import turn

    turn.LEASE_S = float(seconds)
    turn.RENEW_EVERY_S = turn.LEASE_S / 4
    turn.NAMES_EVERY_S = 1.0
    turn.TRY_EVERY_S = 0.2
