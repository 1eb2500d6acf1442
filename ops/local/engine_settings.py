"""What makes each engine line serve the tiny model on CPU: its environment variables and its flags.

Figures in the comments were measured with the tiny model on two shared cores at tp=8, 16 requests at once
of 32 tokens each unless they say otherwise.

Invariant: both lines compute in float32, in one shape for prefill and one for decoding, and answer with what
the numpy oracle computes; only speed depends on the values chosen here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

EngineLine = Literal["0.0.1.post1", "main"]

# Tokens of the KV pool for each slot. The native attention reads the whole pool at every step, so the pool's
# size is the step's cost: one request alone made 32 tokens/s with 1024 tokens and 20 with 2048. A batch that
# outgrows its pool is retracted and computed again; that too was seen to agree with the oracle.
_POOL_TOKENS_PER_SLOT = 64
# One padding for all prefills: a second shape is a second compilation. At 256 short prompts paid for nothing.
_PREFILL_TOKENS = 128


def cpu_engine_env(tp_size: int = 8, cache_dir: Path | None = None) -> dict[str, str]:
    """Compose the environment variables, to be laid over the process's own.

    Args:
        tp_size: How many devices to emulate; the engine wants as many as its tensor parallelism.
        cache_dir: Where compiled programs are kept between starts; a folder for each engine line. None: no
            cache, and each start compiles.

    Returns:
        Names and values.
    """
    env = {
        "JAX_PLATFORMS": "cpu",
        # Single-threaded Eigen: eight emulated devices already are more threads than there are cores. 345 and
        # 368 tokens/s in two rounds with it, 224 and 209 without, at about the same CPU time.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={tp_size} --xla_cpu_multi_thread_eigen=false",
        "HF_HUB_OFFLINE": "1",  # The model is a local folder: no look-up may hold up a start.
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cache_dir is not None:
        env |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache_dir),
            # By default only programs that took a second to compile are kept; these are many small ones.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return env


def cpu_engine_args(
    line: EngineLine,
    *,
    context_length: int = 256,
    max_running_requests: int = 16,
    max_total_tokens: int | None = None,
) -> list[str]:
    """List the flags beside `--model-path`, `--host`, `--port`, `--tp-size` and `--device`.

    Args:
        line: Which release the flags are for; serve either with `launch/serve_cpu.py`.
        context_length: Longest prompt and answer together.
        max_running_requests: Slots: requests decoded at once. Also the one batch size compiled for.
        max_total_tokens: Size of the KV pool. None: 64 tokens a slot, and at least one whole context.

    Returns:
        Arguments in command-line form.
    """
    pool = max_total_tokens or max(_POOL_TOKENS_PER_SLOT * max_running_requests, context_length + 1)
    common = {
        "--attention-backend": "native",  # The other one is a Pallas kernel for TPUs.
        "--dtype": "float32",
        "--mem-fraction-static": "0.1",  # Of the host's memory, for a pool bounded by tokens anyway.
        "--page-size": "1",
        "--context-length": str(context_length),
        "--chunked-prefill-size": str(_PREFILL_TOKENS),
        "--max-prefill-tokens": str(_PREFILL_TOKENS),
        "--max-running-requests": str(max_running_requests),
        "--max-total-tokens": str(pool),
    }
    args = [part for flag in common.items() for part in flag]
    # The server warms itself up by a request without log-probs, sent after `/health` answers 200. On main a
    # first request of ours with log-probs beside it kills the server. Whoever launches it sends its own.
    args.append("--skip-server-warmup")
    prefill, slots = str(_PREFILL_TOKENS), str(max_running_requests)
    if line == "main":
        # With overlap, equal greedy prompts of one batch were seen to give different tokens on CPU.
        args.append("--disable-overlap-schedule")
        return [*args, "--precompile-token-paddings", prefill, "--precompile-bs-paddings", slots]
    # Compiled at the first request instead of before it: the same work, but only what is used.
    args += ["--disable-jax-precompile", "--max-seq-len", str(context_length)]
    return [
        *args,
        "--jax-precompile-prefill-token-paddings",
        prefill,
        "--jax-precompile-decode-bs-paddings",
        slots,
    ]


def cpu_in_process(*, context_length: int = 256, max_running_requests: int = 16) -> dict[str, Any]:
    """The `engine` of `local_pool` that serves the tiny model on CPU, by the main line; figures as above.

    Args:
        context_length: Longest prompt and answer together.
        max_running_requests: Requests decoded at once.
    """
    return {
        "max_running_requests": max_running_requests,
        "max_seq_len": context_length,
        "prefill_tokens": _PREFILL_TOKENS,
        "engine_args": {
            "attention_backend": "native",
            "dtype": "float32",
            "mem_fraction_static": 0.1,
            "max_total_tokens": max(_POOL_TOKENS_PER_SLOT * max_running_requests, context_length + 1),
            "disable_overlap_schedule": True,
        },
    }
