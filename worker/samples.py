"""Samples that were made in pieces: how one goes on where another host, or the same one under another policy, left it.

Invariant: tokens that were made are kept with their log-probs and the version that made them, or thrown away whole; a
sample that goes on has no more tokens in all than were asked for. Pure.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollpool.schemas import PromptJob, Sample, SamplingParams, VersionSpan
from rollpool.worker.engines.protocol import Completion

_NO_IDS = np.empty(0, dtype=np.int32)
_NO_LOGPROBS = np.empty(0, dtype=np.float32)


def is_piece(sample: Sample) -> bool:
    """True for the beginning of a sample: it was ended for the host's reasons, not by its sampling."""
    return sample.finish_reason == "abort"


def can_go_on(job: PromptJob) -> bool:
    """True when a sample of this job may be continued by a new request.

    An engine counts penalties over the tokens of its own request, and looks for stop texts in them alone; an exact
    job's tokens all come from one policy; a chat has no tokens to go on from.
    """
    sampling = job.sampling
    penalised = sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
    return job.endpoint == "generate" and not job.exact and not penalised and not sampling.stop


@dataclass(frozen=True, slots=True)
class Ask:
    """What the engine is asked for, to make or to finish a sample."""

    #: [P + K] int32: the prompt, and the tokens that are there.
    input_ids: NDArray[np.int32]
    sampling: SamplingParams
    #: The beginning that is kept; None: there is none.
    piece: Sample | None


def ask_for(prompt_ids: NDArray[np.int32], sampling: SamplingParams, piece: Sample | None, most_prompt: int) -> Ask:
    """Ask for what is missing of a sample.

    Args:
        prompt_ids: [P] int32.
        sampling: of the whole sample.
        piece: its beginning, if there is one.
        most_prompt: tokens that the engine takes as a prompt; what is over is made again.
    """
    room = min(most_prompt - len(prompt_ids), sampling.max_new_tokens - 1)
    piece = _cut(piece, room) if piece is not None else None
    if piece is None:
        return Ask(prompt_ids, sampling, None)
    made = len(piece.output_ids)
    rest = sampling.model_copy(
        update={
            "max_new_tokens": sampling.max_new_tokens - made,
            "min_new_tokens": max(0, sampling.min_new_tokens - made),
        }
    )
    return Ask(np.concatenate([prompt_ids, piece.output_ids]), rest, piece)


def sample_of(
    completion: Completion, version: int, piece: Sample | None, decode: Callable[[NDArray[np.int32]], str]
) -> Sample:
    """The sample, or a longer beginning of it, that a completion makes of a beginning.

    Args:
        completion: of the request that `ask_for` made.
        version: that made it, where the engine does not say.
        piece: as in the request.
        decode: text of token ids; the text of two pieces is not that of the whole where a character spans both.
    """
    ids = _NO_IDS if completion.logprobs is None else completion.output_ids
    logprobs = _NO_LOGPROBS if completion.logprobs is None else completion.logprobs
    spans: Sequence[VersionSpan] = completion.version_spans or (VersionSpan(version, 0, len(ids)),)
    text = completion.text
    if piece is not None:
        made = len(piece.output_ids)
        ids, logprobs = np.concatenate([piece.output_ids, ids]), np.concatenate([piece.logprobs, logprobs])
        spans = [
            *piece.version_spans,
            *(VersionSpan(span.version, span.start + made, span.end + made) for span in spans),
        ]
        text = decode(ids)
    # The engine and its dialect vouch for lengths and types.
    return Sample.model_construct(
        output_ids=ids,
        logprobs=logprobs,
        text=text,
        finish_reason=completion.finish_reason,
        version_spans=_joined(spans),
        cached_tokens=completion.cached_tokens if piece is None else piece.cached_tokens,
    )


def _cut(piece: Sample, most: int) -> Sample | None:
    """At most so many tokens of it; None where that is none."""
    most = min(most, len(piece.output_ids))
    if most <= 0:
        return None
    spans = [VersionSpan(span.version, span.start, min(span.end, most)) for span in piece.version_spans]
    return piece.model_copy(
        update={
            "output_ids": piece.output_ids[:most],
            "logprobs": piece.logprobs[:most],
            "version_spans": _joined(spans),
        }
    )


def _joined(spans: Iterable[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Neighbours of one version as one; none without tokens, unless there is no other."""
    joined: list[VersionSpan] = []
    for span in spans:
        if joined and (joined[-1].version == span.version or joined[-1].start == joined[-1].end):
            last = joined.pop()
            span = VersionSpan(span.version, last.start, max(last.end, span.end))
        if span.end > span.start or not joined:
            joined.append(span)
    return tuple(joined)
