"""What the HTTP process and the scheduler say to each other about weights and adapters.

The classes are pickled by name, so this module is imported by that name on both sides.

Invariant: each message is one of these, and each order has exactly one `Reply` with its number.
"""

from dataclasses import dataclass
from typing import Any, Literal

#: Names the version of the weights that the engine is launched on.
VERSION_ENV = "ROLLPOOL_WEIGHT_VERSION"

#: By this name the spans of each request travel on the scheduler's and the detokenizer's outputs.
SPANS = "rollpool_spans"

#: Where new weights are held before they serve: all of them beside the old on the devices; one tensor at a time, while
#: nothing else runs; or the first of the two that fits.
Staging = Literal["auto", "device", "leaf"]


class Refused(Exception):  # noqa: N818 - it is an answer, not a failure
    """Weights or an adapter are not taken, and what served before serves on.

    Attributes:
        restart_may_help: True where the files are not known to be broken: they do not fit this running engine.
    """

    def __init__(self, message: str, *, restart_may_help: bool = False) -> None:
        super().__init__(message)
        self.restart_may_help = restart_may_help


@dataclass
class UpdateWeights:
    """Serve the weights of a directory from now on."""

    number: int
    model_path: str
    weight_version: str
    staging: Staging


@dataclass
class LoadAdapter:
    """Have an adapter ready under an id that no other ever had."""

    number: int
    lora_id: str
    lora_name: str
    lora_path: str


@dataclass
class UnloadAdapter:
    """Free an adapter's slot, unless a request uses it."""

    number: int
    lora_id: str
    lora_name: str


@dataclass
class Reply:
    """How an order ended.

    Attributes:
        number: The order's own.
        requests: How many requests a change of weights stopped; they went on by themselves.
        stall_seconds: For how long nothing was generated because of it.
    """

    number: int
    success: bool
    message: str
    requests: int = 0
    stall_seconds: float = 0.0
    restart_may_help: bool = False


@dataclass
class EngineFacts:
    """What a running engine can do, as its scheduler found.

    Attributes:
        reason: Why it cannot do more; empty where it can.
    """

    hot_swap: bool
    lora: Literal["none", "launch", "runtime"]
    adapter_slots: int
    reason: str = ""


def facts_of(server_args: Any, reason: str) -> EngineFacts:
    """What an engine can do that is served as it is.

    Args:
        server_args: It was launched with.
        reason: Why it is.
    """
    lora = bool(server_args.enable_lora and not server_args.enable_static_lora)
    slots = server_args.max_loras_per_batch - 1 if lora else 0
    return EngineFacts(hot_swap=False, lora="launch" if lora else "none", adapter_slots=slots, reason=reason)
