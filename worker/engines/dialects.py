"""The two lines of sglang-jax, and everything in which they differ; pure, no I/O.

Invariants: every request to a server of the main line asks for log-probs, of the same span, chats included,
because a server that runs requests with and without them together dies; and a parsed completion is whole, with
each token under one version where the engine tells versions, or a fault of the infrastructure is raised.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollpool.schemas.jobs import SamplingParams
from rollpool.schemas.results import VersionSpan
from rollpool.worker.engines.protocol import (
    Adapter,
    ChatRequest,
    Completion,
    EngineFacts,
    EngineLoad,
    EngineUnavailable,
    FinishReason,
    Line,
    LoraSupport,
    RequestRefused,
    SampleRequest,
)
from rollpool.worker.engines.settings import EngineSettings
from rollpool.worker.engines.surface import Surface

Json = dict[str, Any]

#: What the engine keeps back: `max_req_input_len` is the request's whole length less 5, and the last token of
#: that length is never generated (`max_new_tokens` is cut to `max_req_len - prompt - 1`, silently).
_TAIL_TOKENS = 4

#: Scalar-prefetch words that the TPU attention kernel shares among the pages of all running requests
#: (`FlashAttention.get_max_running_reqests`).
_FLASH_PAGES = 1024 * 1024 // 2 // 4

#: The most requests of a kernel without that limit.
_NATIVE_REQUESTS = 4096

#: Bounds of the pool of request slots, and the tokens that stand for one slot (`max_num_reqs`).
_POOL_MIN, _POOL_MAX, _POOL_FACTOR = 2048, 4096, 512


@dataclass(frozen=True, slots=True)
class Dialect(ABC):
    """How to speak with one line of sglang-jax."""

    line: Line
    #: True when the line knows adapters at all; whether an engine was launched with them is a fact of that
    #: engine.
    supports_lora: bool
    #: Whether a chat asks for log-probs, which nobody reads: the main line dies of a request without them
    #: beside one with them, and 0.0.1.post1 answers 500 to a chat with them.
    chat_logprobs: bool
    #: Whether the line takes `min_p` and pays no heed to it, as main does: at 0.1, nearly half of the tokens it
    #: sampled lay below the threshold.
    ignores_min_p: bool
    #: Whether the prefix cache can be flushed; 0.0.1.post1 has a route for it that answers 500 always.
    flushes: bool
    #: Whether the seed is a constant of the compiled sampler, so that another one compiles it anew for each batch size:
    #: main's `ModelRunner.initialize_jit` closes over the key.
    compiles_seed: bool

    def generate_body(self, request: SampleRequest) -> Json:
        """The body of `POST /generate`.

        Ids come from the log-probs, so text is asked for with nothing trimmed or skipped: then both agree.
        """
        self._check_sampling(request.sampling)
        body: Json = {
            "rid": request.rid,
            "input_ids": request.input_ids.tolist(),
            "sampling_params": {
                **_sampling(request.sampling),
                "max_new_tokens": request.sampling.max_new_tokens,
                "min_new_tokens": request.sampling.min_new_tokens,
                "skip_special_tokens": False,
                "no_stop_trim": True,
            },
            "return_logprob": True,
            # A single start for all requests of a server: mixed ones silently lose log-probs.
            "logprob_start_len": -1,
        }
        if request.lora_path is not None:
            self._check_lora(request.lora_path)
            body["lora_path"] = request.lora_path
        return body

    def _check_sampling(self, sampling: SamplingParams) -> None:
        """Refuse what the line would accept and ignore."""
        if self.ignores_min_p and sampling.min_p > 0.0:
            raise RequestRefused(
                f"sglang-jax {self.line} ignores min_p, so min_p={sampling.min_p} was not sent to it: "
                "use top_p or top_k"
            )

    def chat_body(self, request: ChatRequest, model: str) -> Json:
        """The body of `POST /v1/chat/completions`."""
        self._check_sampling(request.sampling)
        return {
            "rid": request.rid,
            "model": model,
            "messages": list(request.messages),
            **_sampling(request.sampling),
            "max_completion_tokens": request.sampling.max_new_tokens,
            "min_tokens": request.sampling.min_new_tokens,
            "logprobs": self.chat_logprobs,
        }

    def parse_generate(self, reply: Any, request: SampleRequest, *, aborted: bool = False) -> Completion:
        """A whole completion from the reply of `/generate`.

        Args:
            reply: the decoded body of a reply with status 200.
            request: what was asked.
            aborted: True when this request was aborted on purpose, so that less than a whole one is expected.

        Raises:
            RequestRefused: the engine aborted the request for a fault of its own.
            EngineUnavailable: the reply is an error, is incomplete, or ended in an abort nobody asked for.
        """
        meta = _meta(reply, request.rid)
        reason = _finish_reason(meta.get("finish_reason"), request.rid, aborted=aborted)
        count = meta.get("completion_tokens")
        rows = meta.get("output_token_logprobs") or []
        if not isinstance(count, int) or count < 0 or len(rows) < count:
            if not aborted:
                raise EngineUnavailable(
                    f"the engine's reply to {request.rid} holds {len(rows)} log-probs for {count} tokens; "
                    "run the request again, with log-probs asked for in every request of this engine"
                )
            count = 0
        # After 50 tokens the engine repeats earlier log-probs at the front: the true ones are the last.
        ids, logprobs = _columns(rows[len(rows) - count :], request.rid)
        return Completion(
            output_ids=ids,
            logprobs=logprobs,
            text=(reply.get("text") or "") if count else "",
            finish_reason=reason,
            prompt_tokens=meta.get("prompt_tokens") or len(request.input_ids),
            completion_tokens=count,
            cached_tokens=_count(meta.get("cached_tokens")),
            version_spans=_spans(meta.get("weight_versions"), count, request.rid),
        )

    def parse_chat(self, reply: Any, request: ChatRequest, *, aborted: bool = False) -> Completion:
        """The text of a chat; the engine gives token strings there, but no ids."""
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] or ""
            reason = choice["finish_reason"]
            usage = reply["usage"]
            prompt_tokens, completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        except (KeyError, IndexError, TypeError):
            raise EngineUnavailable(
                f"the engine's reply to chat {request.rid} is no completion: {_short(reply)}"
            ) from None
        return Completion(
            output_ids=np.empty(0, np.int32),
            logprobs=None,
            text=text,
            finish_reason=_finish_reason({"type": reason}, request.rid, aborted=aborted),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )

    def aborted_chat(self, status: int, payload: bytes) -> bool:
        """True for what the main line answers to a chat that is aborted in its queue: it misses the log-probs."""
        return self.chat_logprobs and status == 500 and b"output_token_logprobs" in payload

    def parse_facts(self, info: Json, surface: Surface, *, identity: str) -> EngineFacts:
        """What the engine can do, from `/get_server_info` and the routes it has."""
        try:
            lora, slots = self._adapters(info, surface)
            return EngineFacts(
                line=self.line,
                version=str(info["version"]),
                max_running_requests=self.max_running_requests(info),
                context_length=int(info["max_req_input_len"]) + _TAIL_TOKENS,
                max_prompt_tokens=int(info["max_req_input_len"]) - 1,
                lora=lora,
                adapter_slots=slots,
                swaps=surface.swaps,
                model_path=str(info["model_path"]),
                tp_size=int(info["tp_size"]),
                identity=identity,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EngineUnavailable(
                f"/get_server_info lacks what sglang-jax {self.line} tells of itself ({error!r}); "
                "rollpool knows main and 0.0.1.post1"
            ) from None

    def _adapters(self, info: Json, surface: Surface) -> tuple[LoraSupport, int]:
        """How an engine comes to adapters, and how many fit beside the weights without one, which take a slot too."""
        launched = info.get("enable_lora") or info.get("lora_paths")
        # A static one belongs to every request; none can be named.
        if not self.supports_lora or not launched or info.get("enable_static_lora"):
            return "none", 0
        slots = int(info["max_loras_per_batch"]) - 1
        return ("none", 0) if slots < 1 or surface.lora == "none" else (surface.lora, slots)

    def identity(self, info: Json) -> str:
        """What the server tells of which process and weights it is.

        Neither need differ between two processes: the HTTP engine adds what it can see from outside.
        """
        return f"{info.get('version')}|{info.get('model_path')}|{info.get('random_seed')}"

    def launch_args(
        self, settings: EngineSettings, *, model_path: str, port: int, seed: int, adapters: Sequence[Adapter] = ()
    ) -> list[str]:
        """Arguments of the stock server, common to both lines but for adapters.

        `--max-seq-len` alone limits nothing in either line (it sizes the prefix cache); `--context-length`
        does. The stock warm-up asks for no log-probs, and meeting a real request would kill the server: it
        is left out, and attaching does the warming.
        """
        args = ["--model-path", model_path, "--host", settings.host, "--port", str(port)]
        args += ["--device", settings.device, "--tp-size", str(settings.tp_size)]
        args += ["--random-seed", str(seed), "--skip-server-warmup"]
        # A line in the log for each request costs time, and the log would grow without bound.
        args += ["--log-level-http", "warning"]
        if settings.max_seq_len is not None:
            length = str(settings.max_seq_len)
            args += ["--max-seq-len", length, "--context-length", length]
        if settings.page_size is not None:
            args += ["--page-size", str(settings.page_size)]
        if settings.max_running_requests is not None:
            args += ["--max-running-requests", str(settings.max_running_requests)]
        if settings.api_key is not None:
            args += ["--api-key", settings.api_key.get_secret_value()]
        return [*args, *self._lora_args(settings, adapters), *settings.extra_args]

    def _lora_args(self, settings: EngineSettings, adapters: Sequence[Adapter]) -> list[str]:
        """All modules, since which ones later adapters have is not known; a slot more than adapters, for none."""
        if not self.supports_lora or not (settings.lora or adapters):
            return []
        args = ["--enable-lora", "--max-loras-per-batch", str(settings.adapter_slots + 1)]
        if settings.max_lora_rank is not None:
            args += ["--max-lora-rank", str(settings.max_lora_rank), "--lora-target-modules", "all"]
        if adapters:
            args += ["--lora-paths", *(f"{adapter.name}={adapter.path}" for adapter in adapters)]
        return args

    @abstractmethod
    def max_running_requests(self, info: Json) -> int:
        """The requests that really run at once; the server echoes only the argument it was given."""

    @abstractmethod
    def parse_load(self, info: Json) -> EngineLoad:
        """What the engine runs now, from `/get_server_info`."""

    @abstractmethod
    def warmed(self, info: Json) -> bool:
        """False while the server's own warm-up request, which asks for no log-probs, may still be to come."""

    @abstractmethod
    def progress_counter(self, info: Json) -> int | None:
        """A count that only rises while one process keeps its cache; None where the line has none."""

    def _check_lora(self, lora_path: str) -> None:
        if not self.supports_lora:
            raise RequestRefused(
                f"sglang-jax {self.line} silently ignores lora_path, so {lora_path!r} was not sent to it: "
                "run engines of the main line, or publish the policy as a checkpoint"
            )


class Main(Dialect):
    """The main line, installed from source."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(
            line="main", supports_lora=True, chat_logprobs=True, ignores_min_p=True, flushes=True, compiles_seed=True
        )

    def max_running_requests(self, info: Json) -> int:
        """The least of argument, pool and what the attention kernel allows, as `tp_worker.py` takes it.

        The pool is told by the internal state. The kernel's limit is worked out from the backend that was
        asked for; a hybrid model's own limit of 1024 is not told, so a linear-attention model can run fewer
        than this says.
        """
        pool = int(_state(info).get("req_to_token_pool_total") or _POOL_MAX)
        return max(1, min(_server_limit(info), pool, self._attention_limit(info)))

    def _attention_limit(self, info: Json) -> int:
        if info.get("attention_backend") == "native":
            return _NATIVE_REQUESTS
        context = int(info.get("context_length") or int(info["max_req_input_len"]) + 6)
        return _FLASH_PAGES // math.ceil(context / int(info.get("page_size") or 1))

    def parse_load(self, info: Json) -> EngineLoad:
        """Counts of the scheduler at its last turn.

        The prefix cache fills all memory that nobody uses, and gives it back on demand: so
        `available_kv_tokens` is near 0 on an engine that has served for a while, idle or not, and the cache
        counts as free too. That says a little too much, by the prompts of running requests, which are in
        the cache and in use.
        """
        state = _state(info)
        available = state.get("available_kv_tokens")
        return EngineLoad(
            running=state.get("running_batch_size"),
            waiting=state.get("waiting_queue_size"),
            free_kv_tokens=None if available is None else available + state.get("tree_cache_size", 0),
            throughput=state.get("last_gen_throughput"),
            steps=self.progress_counter(info),
        )

    def warmed(self, info: Json) -> bool:
        """The stock warm-up decodes; it is over once something was decoded and nothing runs."""
        state = _state(info)
        return bool(info.get("skip_server_warmup")) or (
            bool(state.get("forward_ct_decode")) and not state.get("running_batch_size")
        )

    def progress_counter(self, info: Json) -> int | None:
        """Decode steps; set back to 0 by a new process and by a flush of the prefix cache."""
        count = _state(info).get("forward_ct_decode")
        return count if isinstance(count, int) else None


class Post1(Dialect):
    """0.0.1.post1, the newest release on PyPI."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(
            line="0.0.1.post1",
            supports_lora=False,
            chat_logprobs=False,
            ignores_min_p=False,
            flushes=False,
            compiles_seed=False,
        )

    def max_running_requests(self, info: Json) -> int:
        """The least of argument and pool; the pool is worked out as `model_runner.py` does.

        That line takes the pool from the tokens it profiled, before `--max-total-tokens` cuts them: with
        that flag this can come out smaller than the truth, but never under 2048.
        """
        tokens = int(info["max_total_num_tokens"])
        context = int(info.get("context_length") or int(info["max_req_input_len"]) + 6)
        pool = min(max(tokens * _POOL_FACTOR // context, _POOL_MIN), _POOL_MAX) + 1
        return max(1, min(_server_limit(info), pool))

    def parse_load(self, info: Json) -> EngineLoad:
        """That line tells its throughput alone, and only of the last measuring window."""
        return EngineLoad(throughput=_state(info).get("last_gen_throughput"))

    def warmed(self, info: Json) -> bool:
        """That line answers this question only once it has generated."""
        return bool(info)

    def progress_counter(self, info: Json) -> int | None:
        """There is none."""
        return None


_MAIN, _POST1 = Main(), Post1()


def pick_dialect(version: str) -> Dialect:
    """The dialect of a version, as the package or `/get_server_info` tells it.

    The release names itself 0.0.1 when it runs; a build of main without tags names itself 0.0.0.dev….
    """
    release = version.strip().lower()
    return _POST1 if release == "0.0.1" or release.startswith("0.0.1.post") else _MAIN


def check_fits(facts: EngineFacts, request: SampleRequest) -> None:
    """Refuse what the engine must never see.

    A prompt that passes the server's first check but not its scheduler's is aborted there with log-probs
    switched off, in the midst of requests that have them; and a completion over the limit is cut short
    without a word.

    Raises:
        RequestRefused: prompt, or prompt and completion, are too long; or the engine has no adapters.
    """
    prompt, new = len(request.input_ids), request.sampling.max_new_tokens
    if prompt == 0:
        raise RequestRefused("the prompt holds no tokens")
    if prompt > facts.max_prompt_tokens:
        raise RequestRefused(
            f"the prompt of {prompt} tokens is over the engine's {facts.max_prompt_tokens}; "
            "shorten it, or launch engines with a larger max_seq_len"
        )
    if prompt + new > facts.context_length:
        raise RequestRefused(
            f"the prompt of {prompt} tokens and max_new_tokens={new} together are over the engine's "
            f"{facts.context_length}; shorten either, or launch engines with a larger max_seq_len"
        )
    if request.lora_path is not None and facts.lora == "none":
        raise RequestRefused(
            f"the engine was launched without LoRA and would silently ignore {request.lora_path!r}, so it "
            "was not sent; set engine.max_lora_rank for engines of the main line, or publish a checkpoint"
        )


def error_message(body: bytes) -> str:
    """What an error body says, whichever of the server's shapes it has."""
    try:
        reply = json.loads(body)
    except ValueError:
        return body[:500].decode(errors="replace").strip() or "(no message)"
    if isinstance(reply, dict):
        error = reply.get("error", reply)
        message = error.get("message", error) if isinstance(error, dict) else error
        return str(message)[:2000]
    return _short(reply)


def _sampling(sampling: SamplingParams) -> Json:
    """What both endpoints name alike; sent in full, so that no default of a server or model stands in."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        "ignore_eos": sampling.ignore_eos,
    }


def _state(info: Json) -> Json:
    states = info.get("internal_states") or [{}]
    return states[0] if isinstance(states[0], dict) else {}


def _server_limit(info: Json) -> int:
    asked = info.get("max_running_requests")
    return int(asked) if asked is not None else int(info["max_total_num_tokens"]) // 2


def _meta(reply: Any, rid: str) -> Json:
    if not isinstance(reply, dict) or not isinstance(reply.get("meta_info"), dict) or "error" in reply:
        raise EngineUnavailable(f"the engine's reply to {rid} is no completion: {_short(reply)}")
    meta: Json = reply["meta_info"]
    # A reply under another id belongs to another request: the engine mixed them up.
    if meta.get("id", rid) != rid:
        raise EngineUnavailable(f"the engine answered {rid} with the reply of {meta['id']}")
    return meta


def _finish_reason(reason: Any, rid: str, *, aborted: bool) -> FinishReason:
    kind = reason.get("type") if isinstance(reason, dict) else reason
    if kind == "stop" or kind == "length":
        return "stop" if kind == "stop" else "length"
    if kind == "abort":
        if isinstance(reason, dict) and reason.get("status_code") == 400:
            raise RequestRefused(f"the engine refused {rid}: {reason.get('message')}")
        if aborted:
            return "abort"
        raise EngineUnavailable(
            f"the engine aborted {rid}, which nobody asked for ({_short(reason)}); run the request again"
        )
    raise EngineUnavailable(f"the engine ended {rid} with {_short(reason)}, not with stop, length or abort")


def _columns(rows: list[Any], rid: str) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and log-probs of `[[logprob, id, text], …]`; each finite, or the engine is at fault."""
    try:
        ids = np.array([row[1] for row in rows], dtype=np.int32)
        logprobs = np.array([row[0] for row in rows], dtype=np.float32)
    except (TypeError, ValueError, IndexError, OverflowError):
        raise EngineUnavailable(f"the engine's log-probs of {rid} are no [logprob, id] pairs: {_short(rows)}") from None
    if not np.isfinite(logprobs).all():
        where = int(np.flatnonzero(~np.isfinite(logprobs))[0])
        raise EngineUnavailable(
            f"the engine's log-prob of token {where} of {rid} is {rows[where][0]}, not a finite number"
        )
    return ids, logprobs


def _count(told: Any) -> int | None:
    """A number that is for people alone: what is none is not told."""
    return told if type(told) is int and told >= 0 else None


def _spans(told: Any, count: int, rid: str) -> tuple[VersionSpan, ...]:
    """Which version made which of `count` tokens; none told where the engine cannot change its weights."""
    if told is None:
        return ()
    try:
        spans = [VersionSpan(int(each["version"]), int(each["start"]), int(each["end"])) for each in told]
    except (TypeError, ValueError, KeyError):
        raise _unattributed(rid, told, count) from None
    starts = [0, *(span.end for span in spans)]
    # What was sampled after the last token that counts has its version too.
    if starts.pop() < count or any(
        span.start != start or span.end < start or span.version < 0 for span, start in zip(spans, starts, strict=True)
    ):
        raise _unattributed(rid, told, count)
    return tuple(span._replace(end=min(span.end, count)) for span in spans if span.start < min(span.end, count))


def _unattributed(rid: str, told: Any, count: int) -> EngineUnavailable:
    return EngineUnavailable(
        f"the engine's versions of {rid} do not cover its {count} tokens ({_short(told)}), so nobody can say which "
        "weights made them; run the request again"
    )


def _short(value: Any) -> str:
    return f"{value!r:.200}"
