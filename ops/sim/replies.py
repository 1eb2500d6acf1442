"""What a simulated engine reads and writes, as JSON; pure.

Invariant: a request that the real server refuses is refused, in its words; and a reply has its faults, log-probs that
come back repeated among them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rollpool.ops.sim.arguments import VERSION, Arguments
from rollpool.ops.sim.pieces import Made
from rollpool.ops.sim.tokens import LOGPROB_STEP, LOGPROB_STEPS

Json = dict[str, Any]

#: What the real server takes where a request does not say.
DEFAULT_NEW_TOKENS = 128

#: Every so many tokens the real server adds all log-probs so far to those it will send, once more.
REPEAT_EVERY = 50

#: Each log-prob there is, as it stands in a reply.
_LOGPROBS = [repr(-(place + 1) * LOGPROB_STEP) for place in range(LOGPROB_STEPS)]

#: Stands for the text of a completion, at the usual four bytes a token.
_TEXT = "word word word word "
_BYTES_PER_TOKEN = 4


class RefusedError(ValueError):
    """A request that is at fault itself: status 400."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """One request, understood."""

    rid: str
    #: int64 [P].
    prompt_ids: NDArray[np.int64]
    min_new_tokens: int
    max_new_tokens: int
    ignore_eos: bool
    logprobs: bool
    #: Name of an adapter.
    lora: str | None = None


def read_generate(body: Any, rid: str, context_length: int) -> Asked:
    """Understand the body of `/generate`.

    Args:
        body: as decoded.
        rid: for a request without one.
        context_length: prompt and completion together must be shorter.

    Raises:
        RefusedError: it cannot be done.
    """
    if not isinstance(body, dict):
        raise RefusedError("The body is no JSON object.")
    if body.get("stream"):
        raise RefusedError("The simulated engine does not stream.")
    if not isinstance(lora := body.get("lora_path"), str | None):
        raise RefusedError("The simulated engine takes one lora_path a request.")
    sampling = body.get("sampling_params") or {}
    if not isinstance(sampling, dict):
        raise RefusedError("sampling_params is no JSON object.")
    return _checked(
        Asked(
            rid=str(body.get("rid") or rid),
            prompt_ids=_prompt_ids(body),
            min_new_tokens=_count(sampling, "min_new_tokens", 0),
            max_new_tokens=_count(sampling, "max_new_tokens", DEFAULT_NEW_TOKENS),
            ignore_eos=bool(sampling.get("ignore_eos")),
            logprobs=bool(body.get("return_logprob")),
            lora=lora,
        ),
        context_length,
    )


def read_chat(body: Any, rid: str, context_length: int) -> Asked:
    """Understand the body of `/v1/chat/completions`; its prompt is the messages' bytes."""
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise RefusedError("messages is no list of objects.")
    return _checked(
        Asked(
            rid=str(body.get("rid") or rid),
            prompt_ids=_bytes_of("".join(f"{each.get('role')}: {each.get('content')}\n" for each in messages)),
            min_new_tokens=_count(body, "min_tokens", 0),
            max_new_tokens=_count(body, "max_completion_tokens", DEFAULT_NEW_TOKENS),
            ignore_eos=bool(body.get("ignore_eos")),
            logprobs=bool(body.get("logprobs")),
        ),
        context_length,
    )


def _prompt_ids(body: Json) -> NDArray[np.int64]:
    if isinstance(body.get("text"), str):
        return _bytes_of(body["text"])
    try:
        ids = np.array(body.get("input_ids"))
    except ValueError:  # lists of different lengths
        ids = np.empty((0, 0))
    if ids.ndim != 1 or not len(ids) or ids.dtype != np.int64:
        raise RefusedError("input_ids is no list of integers; the simulated engine takes one prompt a request.")
    return ids


def _bytes_of(text: str) -> NDArray[np.int64]:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def _count(fields: Json, name: str, default: int) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or value < 0:
        raise RefusedError(f"{name} must be a number of tokens, got {value!r}.")
    return value


def _checked(asked: Asked, context_length: int) -> Asked:
    prompt = len(asked.prompt_ids)
    if prompt >= context_length:
        raise RefusedError(
            f"The input ({prompt} tokens) is longer than the model's context length ({context_length} tokens)."
        )
    if prompt + asked.max_new_tokens >= context_length:
        raise RefusedError(
            f"Requested token count exceeds the model's maximum context length of {context_length} tokens. You "
            f"requested a total of {prompt + asked.max_new_tokens} tokens."
        )
    return asked


def text_of(tokens: int) -> str:
    """What stands for the text of so many tokens."""
    length = tokens * _BYTES_PER_TOKEN
    return (_TEXT * (length // len(_TEXT) + 1))[:length]


def finish_reason(output_ids: Sequence[int], kind: Literal["stop", "length", "abort"]) -> Json:
    """Why a completion ended, in the real server's form."""
    if kind == "stop":
        return {"type": "stop", "matched": output_ids[-1]}
    if kind == "length":
        return {"type": "length", "length": len(output_ids)}
    return {"type": "abort", "message": "Aborted by AbortReq."}


def generated(asked: Asked, made: Made, reason: Json, latency_s: float, versions: list[Json] | None = None) -> bytes:
    """The reply of `/generate`; the long lists are put together as text, which costs the least.

    Args:
        asked: the request.
        made: its tokens.
        reason: why there are no more.
        latency_s: how long it took.
        versions: of the weights that made them; None: of an engine that does not tell.
    """
    ids = made.ids.tolist()
    meta = {
        "id": asked.rid,
        "finish_reason": reason,
        "prompt_tokens": len(asked.prompt_ids),
        "completion_tokens": len(ids),
        "cached_tokens": 0,
        "e2e_latency": round(latency_s, 4),
    }
    written = json.dumps(_versioned(meta, versions))[:-1]
    if asked.logprobs:
        written += f',"output_token_logprobs":[{",".join(_rows(ids, made.places.tolist()))}]'
    return f'{{"text":"{text_of(len(ids))}","output_ids":{ids},"meta_info":{written}}}}}'.encode()


def _rows(ids: list[int], places: list[int]) -> list[str]:
    """`[logprob, id, null]` of each token, earlier ones once more in front, as the real server sends them."""
    rows = [f"[{_LOGPROBS[place]},{token},null]" for token, place in zip(ids, places, strict=True)]
    repeated = [row for so_far in range(REPEAT_EVERY, len(rows), REPEAT_EVERY) for row in rows[:so_far]]
    return repeated + rows


def _versioned(meta: Json, versions: list[Json] | None) -> Json:
    return meta if versions is None else {**meta, "weight_versions": versions}


def aborted_in_queue(rid: str, versions: list[Json] | None = None) -> Json:
    """The reply to a request that was aborted before it began: it has no log-probs, not even an empty list."""
    reason = {"type": "abort", "message": "Abort before prefill"}
    meta = {"id": rid, "finish_reason": reason, "prompt_tokens": 0, "completion_tokens": 0}
    return {"text": "", "meta_info": _versioned(meta, versions)}


def chatted(asked: Asked, tokens: int, kind: str, model: str) -> Json:
    """The reply of `/v1/chat/completions`."""
    prompt = len(asked.prompt_ids)
    return {
        "id": asked.rid,
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text_of(tokens)}, "finish_reason": kind}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens},
    }


def server_info(arguments: Arguments, context_length: int, state: Json, rids: dict[int, str]) -> Json:
    """The reply of `/get_server_info`.

    Args:
        arguments: how the server was started.
        context_length: what that came to.
        state: as the scheduler tells it.
        rids: of the scheduler's requests.
    """
    running, waiting = ([rids.get(key, "") for key in state[name]] for name in ("running", "waiting"))
    internal = {
        "engine_paused": state["paused"],
        "running_batch_size": len(running),
        "waiting_queue_size": len(waiting),
        "running_batch_rids": running,
        "waiting_queue_rids": waiting,
        "req_to_token_pool_total": max(2048, arguments.max_running_requests) + 1,
        "req_to_token_pool_used": len(running),
        "available_kv_tokens": max(0, arguments.max_total_tokens - state["kv_tokens"]),
        "tree_cache_size": 0,
        "forward_ct_decode": state["steps"],
        "num_generated_tokens": state["tokens"],
    }
    return {
        **arguments.server_args(),
        "context_length": context_length,
        "version": VERSION,
        "max_total_num_tokens": arguments.max_total_tokens,
        # The real one keeps so much back: one token of the context, and five of the request.
        "max_req_input_len": min(context_length, arguments.max_total_tokens) - 6,
        "internal_states": [internal],
    }
