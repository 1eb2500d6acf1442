"""The `engine` settings of hosts whose engines are simulated.

Invariant: a worker with these settings starts a simulated engine by the very path by which it starts a real one.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rollpool.ops.sim.adapter import RANK
from rollpool.ops.sim.arguments import LoraKind

_HERE = Path(__file__).parent

#: Tells the probe, which is given no arguments, that there are adapters.
LORA_ENV = "SIM_LORA"


def sim_engine(
    *,
    max_running_requests: int = 16,
    step_ms: float = 20.0,
    median_tokens: float = 64,
    sigma: float = 0.6,
    start_s: float = 0.2,
    hot_swap: bool = False,
    lora: LoraKind = "none",
    swap_s: float = 0.1,
    stall_s: float = 0.02,
    extra_args: Sequence[str] = (),
) -> dict[str, Any]:
    """The `engine` settings of a host, for `LocalHosts` or a worker's file.

    Args:
        max_running_requests: requests that one engine runs at once.
        step_ms: milliseconds of a decode step; each running request gets one token in it.
        median_tokens: half of the completions are shorter, unless their requests cut them or ignore the end.
        sigma: deviation of the logarithm of their length.
        start_s: seconds that an engine takes to load its model.
        hot_swap: whether an engine takes other weights while it serves.
        lora: how it comes to adapters: never, at its launch alone, or while it serves. `adapter_slots` beside these
            settings says to how many.
        swap_s: seconds that it takes to load other weights, while it serves on.
        stall_s: seconds for which it decodes nothing while it changes to them.
        extra_args: further flags, as `ops/sim/arguments.py` lists them.
    """
    shape = {"step-ms": step_ms, "median-tokens": median_tokens, "sigma": sigma, "start-s": start_s}
    shape |= {"swap-s": swap_s, "stall-s": stall_s}
    flags = [word for name, value in shape.items() for word in (f"--sim-{name}", str(value))]
    # As for a real one: without a rank, a worker launches no engine with adapters.
    ranks = {} if lora == "none" else {"max_lora_rank": RANK}
    return {
        "python": sys.executable,
        "launcher": str(_HERE / "launch.py"),
        "probe": str(_HERE / "probe.py"),
        "device": "cpu",
        "tp_size": 1,
        "max_running_requests": max_running_requests,
        "jit_cache_dir": str(Path(tempfile.gettempdir()) / "rollpool-sim"),  # nothing is compiled; it must exist
        # numpy would start a thread for each core, which nobody needs here.
        "env": {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **({} if lora == "none" else {LORA_ENV: lora})},
        "extra_args": [*flags, *(["--sim-hot-swap"] if hot_swap else []), "--sim-lora", lora, *extra_args],
        **ranks,
    }
