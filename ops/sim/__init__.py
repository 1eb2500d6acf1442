"""Simulated engines, in the place of real ones under real workers; their tokens say which policy made them."""

from rollpool.ops.sim.model import make_sim_model, signature_of
from rollpool.ops.sim.settings import sim_engine
from rollpool.ops.sim.tokens import (
    FAIL,
    FORGET,
    HANG,
    KILL,
    REFUSE,
    VOCABULARY,
    logprobs_of,
    made_by,
    output_of,
)

__all__ = [
    "FAIL",
    "FORGET",
    "HANG",
    "KILL",
    "REFUSE",
    "VOCABULARY",
    "logprobs_of",
    "made_by",
    "make_sim_model",
    "output_of",
    "signature_of",
    "sim_engine",
]
