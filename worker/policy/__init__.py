"""Following the control log, and taking turns at changing the policy of a host."""

from rollpool.worker.policy.acks import acknowledge, failures_of
from rollpool.worker.policy.follow import PolicyFollower, Target
from rollpool.worker.policy.turn import ChangeTurn

__all__ = ["ChangeTurn", "PolicyFollower", "Target", "acknowledge", "failures_of"]
