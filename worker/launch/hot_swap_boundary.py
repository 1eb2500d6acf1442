"""Stopping a scheduler between two batches, with everything that runs put back in its queue, and the caches flushed.

Invariant: whatever happens in here, no request is lost and none is in two places; those that ran keep the tokens they
have, hold no cache of keys and values, and come before those that had not begun.
"""

from collections.abc import Iterator
from typing import Any


def stop(scheduler: Any) -> list[Any]:
    """Retract all running requests, and flush the caches.

    The scheduler's own pause loses a prefill that has just run, and its flush refuses while anybody waits: so the one
    is merged before, and the others are set aside meanwhile.

    Returns:
        The requests that were running.

    Raises:
        RuntimeError: The caches cannot be flushed.
    """
    from sgl_jax.srt.managers.io_struct import PauseGenerationReqInput

    waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
    grammar, scheduler.grammar_queue = scheduler.grammar_queue, []
    pending, scheduler.pending_dp_reqs = scheduler.pending_dp_reqs, []
    counters = (scheduler.num_generated_tokens, scheduler.forward_ct_decode)
    paused = scheduler._engine_paused
    running: list[Any] = []
    try:
        _settle_last_batch(scheduler)
        scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
        running, scheduler.waiting_queue = scheduler.waiting_queue, []
        flushed, why, _ = scheduler.flush_cache()
        if not flushed:
            raise RuntimeError(why)
    finally:
        scheduler._engine_paused = paused
        scheduler.waiting_queue = [*running, *scheduler.waiting_queue, *waiting]
        scheduler.grammar_queue, scheduler.pending_dp_reqs = grammar, pending
        # Whoever watches for progress sees these; a flush sets them to zero.
        scheduler.num_generated_tokens, scheduler.forward_ct_decode = counters
    return running


def _settle_last_batch(scheduler: Any) -> None:
    """Finish the batch that ran last, and merge it into the running one, as the scheduler itself does next."""
    scheduler._sync_chunked_req_owners()
    if scheduler.enable_overlap and scheduler.last_batch:
        scheduler.process_batch_result(*scheduler.result_queue.popleft())
    chunked = scheduler._prepare_chunked_reqs_to_exclude()
    scheduler._process_pending_chunked_aborts()
    last = scheduler.last_batch
    if last and last.forward_mode.is_extend():
        last.filter_batch(chunked_req_to_exclude=chunked)
        if not last.is_empty() and not last.is_prefill_only:
            if scheduler.running_batch.is_empty():
                scheduler.running_batch = last
            else:
                scheduler.running_batch.merge_batch(last)
    scheduler.last_batch = scheduler.cur_batch = None


def unfinished(scheduler: Any) -> Iterator[Any]:
    """Every request the scheduler holds that will still make tokens; some more than once."""
    yield from scheduler.waiting_queue
    yield from scheduler.grammar_queue
    yield from (each for each in scheduler.chunked_reqs if each is not None)
    for batch in (scheduler.running_batch, scheduler.cur_batch, scheduler.last_batch):
        if batch is not None:
            for part in batch.reqs_info:
                yield from (each for each in part.reqs or () if not each.finished())


def rids_of(request: Any) -> list[Any]:
    """A request's ids: one, or more for what is answered several times."""
    return list(request.rid) if isinstance(request.rid, list) else [request.rid]


def probe(scheduler: Any) -> bool:
    """Run one decoding step of the smallest compiled shape, and tell whether its logits are finite.

    Call it while the caches are flushed: it writes keys and values as any batch does.
    """
    import jax
    import numpy as np
    from sgl_jax.srt.model_executor.forward_batch_info import ForwardMode

    worker = scheduler.tp_worker.worker
    shapes = worker.compilation_manager
    size = shapes.bs_buckets[0]
    batch = shapes._make_dummy_batch(
        size,
        size,
        ForwardMode.DECODE,
        shapes.cache_loc_buckets[0],
        dp_size=shapes.dp_size,
        per_dp_bs_size=size // shapes.dp_size,
    )
    if scheduler.server_args.enable_lora:
        worker.prepare_lora_batch(batch)
    output, _, _ = worker.forward_batch_generation(batch, skip_sample=True)
    return bool(np.isfinite(np.asarray(jax.device_get(output.next_token_logits))).all())
