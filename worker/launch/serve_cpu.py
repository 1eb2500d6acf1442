"""Serve with sglang-jax 0.0.1.post1 on CPU: mend what keeps that release from answering rightly, then serve.

Run by path with the engine's own Python; the arguments are those of `python -m sgl_jax.launch_server`. Any
other release is served as it is.

The patches are applied at module top level because the scheduler is a spawned process: it does not inherit
this one's memory, it imports this file again (under the name `__mp_main__`).

Invariant: a patch is applied only to the very code that it was written for; if that code is not there, the
engine does not start.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

# The folder of a script run by path is on `sys.path`, but not in the spawned child that imports it again.
_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

if TYPE_CHECKING:
    from rollpool.worker.launch.serve import main
else:
    from serve import main

MENDED_VERSION = "0.0.1.post1"
# Bounds how late an idle scheduler sees its second, rarely used socket; requests are seen at once.
IDLE_WAIT_MS = 20


def _refuse(what: str, why: str) -> RuntimeError:
    version = importlib.metadata.version("sglang-jax")
    return RuntimeError(
        f"cannot mend {what} of sglang-jax {version}: {why}. These patches are for the {MENDED_VERSION} of "
        "PyPI; install that, unchanged, or serve another release without this script."
    )


def _rewrite(module: ModuleType, owner: object, name: str, old: str, new: str) -> None:
    """Compile the function `owner.name` again with one piece of its source replaced.

    A rewrite and not a wrapper: the faults are single expressions in the middle of long functions, and the
    rest of each function stays the release's own.
    """
    what = f"{module.__name__}.{name}"
    function = getattr(owner, name, None)
    if isinstance(function, MethodType):
        function = function.__func__  # A class method: its source brings the decorator along.
    if not isinstance(function, FunctionType):
        raise _refuse(what, "there is no such function")
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError as error:
        raise _refuse(what, "its source cannot be read") from error
    if source.count(old) != 1:
        raise _refuse(what, f"its source has {old!r} {source.count(old)} times, not once")
    # Into a namespace of its own, whose globals are the module's: nothing else of the module is touched.
    made: dict[str, Any] = {}
    code = compile(source.replace(old, new), f"{inspect.getsourcefile(function)} (mended)", "exec")
    exec(code, module.__dict__, made)
    setattr(owner, name, made[name])


def mend_model_interface() -> None:
    """Fault 1, `models/qwen3.py`: `Qwen3ForCausalLM.__call__` returns logits; its caller wants hidden states.

    The runner takes `(hidden_states, layers_k, layers_v)` and applies the logits processor itself, outside
    the compiled part. As released, the first request dies on every backend.
    """
    from sgl_jax.srt.models import qwen3

    source = inspect.getsource(qwen3.Qwen3ForCausalLM.__call__)
    if "self.logits_processor(hidden_states, self.lm_head, forward_batch)" not in source:
        raise _refuse("qwen3.Qwen3ForCausalLM.__call__", "it does not call the logits processor the old way")

    def call(self: Any, input_ids: Any, positions: Any, forward_batch: Any) -> Any:
        return self.transformer(input_ids, positions, forward_batch)

    qwen3.Qwen3ForCausalLM.__call__ = call


def mend_kv_write() -> None:
    """Fault 2, `mem_cache/memory_pool.py`: the KV cache is always written by a Pallas kernel for TPUs.

    That is so even with `--attention-backend native`, and the kernel does not run on CPU. Here the write is
    a scatter. Padding tokens have location -1, which indexing would take for the last slot: they are sent
    past the end, where a scatter in mode "drop" leaves them out.
    """
    import jax.numpy as jnp
    from sgl_jax.srt.mem_cache import memory_pool

    expected = ["k", "v", "loc", "k_cache", "v_cache", "page_size", "kv_partition_axis"]
    function = getattr(memory_pool, "update_kv_cache_vectorized", None)
    if function is None or list(inspect.signature(function).parameters) != expected:
        raise _refuse("memory_pool.update_kv_cache_vectorized", f"its parameters are not {expected}")

    def scatter(
        k: Any,
        v: Any,
        loc: Any,
        k_cache: Any,
        v_cache: Any,
        page_size: int,
        kv_partition_axis: str = "tensor",
    ) -> Any:
        where = jnp.where(loc < 0, k_cache.shape[0], loc)
        return k_cache.at[where].set(k, mode="drop"), v_cache.at[where].set(v, mode="drop")

    memory_pool.update_kv_cache_vectorized = scatter


def mend_sampling() -> None:
    """Fault 3, `layers/sampler.py`: `random.categorical` wants log-probabilities and is given probabilities.

    As released every token is nearly as likely as any other, whatever temperature, top-p and top-k say.
    """
    from sgl_jax.srt.layers import sampler

    _rewrite(
        sampler,
        sampler,
        "top_k_top_p_min_p_sampling_from_probs_jax",
        "random.categorical(rng, probs_sort)",
        "random.categorical(rng, jnp.log(probs_sort))",
    )


def mend_rotary_style() -> None:
    """Fault 4, `models/qwen3.py`: rotary pairs are neighbours (GPT-J); Qwen3 pairs the two halves (NeoX)."""
    from sgl_jax.srt.models import qwen3

    _rewrite(qwen3, qwen3.QWen3Attention, "__init__", "is_neox_style=False", "is_neox_style=True")


def mend_decode_position() -> None:
    """Fault 5, `managers/schedule_batch.py`: a decoded token gets the position after its own.

    By then `seq_lens` already counts the token that is fed in, so its position, from zero, is one less.
    """
    from sgl_jax.srt.managers import schedule_batch

    _rewrite(
        schedule_batch,
        schedule_batch.ScheduleBatch,
        "get_model_worker_batch",
        "batch_positions = seq_lens_cpu ",
        "batch_positions = seq_lens_cpu - 1 ",
    )


def mend_prefill_rows() -> None:
    """Fault 6, `managers/tp_worker.py`: prefilled together, all requests but the first get another's logits.

    The logits of a prefill have one row for each request, but are indexed by where each request's tokens
    start in the batch; past the last row the index is clamped to it. So the first token of each request, and
    its log-prob, is drawn for the last request's prompt. Decoding is right: there the starts are 0, 1, 2 …
    """
    from sgl_jax.srt.managers import tp_worker

    _rewrite(
        tp_worker,
        tp_worker.ModelWorker,
        "forward_batch_generation",
        "idx = model_worker_batch.extend_start_loc[: model_worker_batch.real_bs]",
        "idx = np.arange(model_worker_batch.real_bs)",
    )


def mend_top_p() -> None:
    """Fault 7, `sampling/sampling_batch_info.py`: the values of top-k are sent in place of those of top-p.

    As released top-p has no effect.
    """
    from sgl_jax.srt.sampling import sampling_batch_info

    _rewrite(
        sampling_batch_info,
        sampling_batch_info.SamplingBatchInfo,
        "from_schedule_batch",
        "top_ps_device = device_array(batch.mesh, top_ks)",
        "top_ps_device = device_array(batch.mesh, top_ps)",
    )


def mend_head_precision() -> None:
    """Beyond the faults, `models/qwen3.py`: the output head computes in bfloat16 even with `--dtype float32`.

    The head is made without a dtype and falls back to bfloat16, whose steps at a logit of 8 are 0.06 nats:
    near ties then break at random against any float32 oracle. Here it computes in the model's dtype.
    """
    from sgl_jax.srt.models import qwen3

    _rewrite(
        qwen3,
        qwen3.Qwen3ForCausalLM,
        "__init__",
        "config.hf_config.vocab_size, config.hidden_size, rngs=rngs\n",
        "config.hf_config.vocab_size, config.hidden_size, dtype=self.dtype, rngs=rngs\n",
    )


def mend_idle_spin() -> None:
    """Beyond the faults, `managers/scheduler.py`: with nothing to do the scheduler spins on one whole core.

    `--sleep-on-idle` is accepted and read nowhere. A TPU host has cores to spare; the machine that emulates
    eight devices has not. Here an idle turn waits for the next request, which ends the wait at once.
    """
    from sgl_jax.srt.managers import scheduler

    idle = "self.new_token_ratio = self.init_new_token_ratio\n"
    wait = f"{idle}{' ' * 12}self.recv_from_tokenizer.poll({IDLE_WAIT_MS})\n"
    _rewrite(scheduler, scheduler.Scheduler, "event_loop_normal", idle, wait)


PATCHES: tuple[Callable[[], None], ...] = (
    mend_model_interface,
    mend_kv_write,
    mend_sampling,
    mend_rotary_style,
    mend_decode_position,
    mend_prefill_rows,
    mend_top_p,
    mend_head_precision,
    mend_idle_spin,
)


def mend() -> None:
    """Apply every patch if the installed release is the one that they are for."""
    # The distribution's version: the package's own `__version__` says 0.0.1 for this release.
    if importlib.metadata.version("sglang-jax") != MENDED_VERSION:
        return
    for patch in PATCHES:
        patch()


mend()

if __name__ == "__main__":
    main()
