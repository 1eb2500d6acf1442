"""Engines: the protocol the pull loop sees, and the sglang-jax server behind it.

Import the module that holds what you need; this file hands on only the protocol's names, so that importing it
costs neither the HTTP client nor psutil.
"""

from rollpool.worker.engines.protocol import (
    Adapter,
    ChatRequest,
    Completion,
    Engine,
    EngineFacts,
    EngineLoad,
    EngineUnavailable,
    LoraSupport,
    RequestRefused,
    SampleRequest,
    WeightsRefused,
    new_rid,
)

__all__ = [
    "Adapter",
    "ChatRequest",
    "Completion",
    "Engine",
    "EngineFacts",
    "EngineLoad",
    "EngineUnavailable",
    "LoraSupport",
    "RequestRefused",
    "SampleRequest",
    "WeightsRefused",
    "new_rid",
]
