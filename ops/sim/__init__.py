"""Simulated engines, in the place of real ones under real workers; their tokens say which policy made them."""

from rollpool.ops.sim.adapter import adapter_signature_of, make_sim_adapter
from rollpool.ops.sim.model import make_sim_model, signature_of
from rollpool.ops.sim.proof import MOST_PIECES, made_by_spans
from rollpool.ops.sim.settings import sim_engine
from rollpool.ops.sim.tokens import (
    FAIL,
    FORGET,
    HANG,
    KILL,
    REFUSE,
    VOCABULARY,
    adapted,
    logprobs_of,
    made_by,
    output_of,
)

__all__ = [
    "FAIL",
    "FORGET",
    "HANG",
    "KILL",
    "MOST_PIECES",
    "REFUSE",
    "VOCABULARY",
    "adapted",
    "adapter_signature_of",
    "logprobs_of",
    "made_by",
    "made_by_spans",
    "make_sim_adapter",
    "make_sim_model",
    "output_of",
    "signature_of",
    "sim_engine",
]
