"""What is sent to have an engine's weights changed, and what its answer stands for; pure.

Invariant: a change counts as made only where the server says so.
"""

import json
from typing import Any

from rollpool.worker.engines.dialects import error_message
from rollpool.worker.engines.protocol import EngineUnavailable, WeightsRefused

#: Statuses of a change that was not made; after any other, nobody knows.
_NOT_MADE = frozenset({400, 413, 422})


def swap_body(checkpoint: str, version: int) -> dict[str, Any]:
    """The body of `SWAP`: what runs goes on, and nothing cached under the old weights is used again."""
    return {
        "model_path": checkpoint,
        "weight_version": str(version),
        "flush_cache": True,
        "abort_all_requests": False,
        "staging": "auto",
    }


def confirm_change(status: int, payload: bytes, what: str, *, restart_may_help: bool) -> dict[str, Any]:
    """The reply of a change that was made.

    Args:
        status: of the reply.
        payload: its body.
        what: was asked for, in words.
        restart_may_help: of a refusal that does not say so itself.

    Raises:
        WeightsRefused: the server says that it was not made.
        EngineUnavailable: what it says tells nothing of the change.
    """
    reply = _object(payload)
    if status in _NOT_MADE or (status == 200 and reply.get("success") is False):
        said = reply.get("restart_may_help")
        raise WeightsRefused(
            f"the engine did not {what}: {error_message(payload)}",
            restart_may_help=said if isinstance(said, bool) else restart_may_help,
        )
    if status != 200:
        raise EngineUnavailable(f"asked to {what}, the engine answered {status}: {error_message(payload)}")
    return reply


def _object(payload: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(payload)
    except ValueError:  # `FLUSH_CACHE` answers in words
        return {}
    return reply if isinstance(reply, dict) else {}
