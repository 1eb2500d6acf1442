"""Which of the routes that change an engine a server has; pure.

Invariant: what a server does not list, or says it cannot do, is never asked of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollpool.worker.engines.protocol import LoraSupport

#: The document in which FastAPI lists all routes; a server can be told to have none.
DOCUMENT = "/openapi.json"

SWAP = "/update_weights_from_disk"
LOAD_ADAPTER = "/load_lora_adapter"
UNLOAD_ADAPTER = "/unload_lora_adapter"
FLUSH_CACHE = "/flush_cache"

#: Of our own launch script and simulator alone: says why something is off.
ABOUT = "/rollpool_engine"

#: From the least to the most that an engine can do with adapters.
_SUPPORT: tuple[LoraSupport, ...] = ("none", "launch", "runtime")


@dataclass(frozen=True, slots=True)
class Surface:
    """What a server offers beside generating."""

    routes: frozenset[str] = frozenset()
    #: What it says at `ABOUT`; empty where it has no such route.
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def swaps(self) -> bool:
        """Whether its weights can be changed while it serves."""
        return not self.no_swap

    @property
    def no_swap(self) -> str:
        """Why they cannot; empty where they can."""
        if self.about.get("hot_swap") is False:
            return str(self.about.get("reason") or "it says so, without a reason")
        return "" if SWAP in self.routes else f"it has no route {SWAP}"

    @property
    def lora(self) -> LoraSupport:
        """How it comes to an adapter, provided that it was launched with LoRA."""
        routed: LoraSupport = "runtime" if {LOAD_ADAPTER, UNLOAD_ADAPTER} <= self.routes else "launch"
        said = self.about.get("lora")
        return min(routed, said, key=_SUPPORT.index) if said in _SUPPORT else routed


def routes_of(document: Any) -> frozenset[str]:
    """The paths that an OpenAPI document lists; none where it is no such document."""
    paths = document.get("paths") if isinstance(document, dict) else None
    return frozenset(paths) if isinstance(paths, dict) else frozenset()
