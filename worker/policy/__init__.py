"""Which policy a host serves: following the control log, choosing, answering, and taking turns at changing."""

from rollpool.worker.policy.choice import PolicyChoice
from rollpool.worker.policy.follow import PolicyFollower, Target
from rollpool.worker.policy.turn import ChangeTurn

__all__ = ["ChangeTurn", "PolicyChoice", "PolicyFollower", "Target"]
