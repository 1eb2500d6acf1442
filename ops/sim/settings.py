"""The `engine` settings of hosts whose engines are simulated.

Invariant: a worker with these settings starts a simulated engine by the very path by which it starts a real one.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


def sim_engine(
    *,
    max_running_requests: int = 16,
    step_ms: float = 20.0,
    median_tokens: float = 64,
    sigma: float = 0.6,
    start_s: float = 0.2,
    extra_args: Sequence[str] = (),
) -> dict[str, Any]:
    """The `engine` settings of a host, for `LocalHosts` or a worker's file.

    Args:
        max_running_requests: requests that one engine runs at once.
        step_ms: milliseconds of a decode step; each running request gets one token in it.
        median_tokens: half of the completions are shorter, unless their requests cut them or ignore the end.
        sigma: deviation of the logarithm of their length.
        start_s: seconds that an engine takes to load its model.
        extra_args: further flags, as `ops/sim/arguments.py` lists them.
    """
    shape = {"step-ms": step_ms, "median-tokens": median_tokens, "sigma": sigma, "start-s": start_s}
    return {
        "python": sys.executable,
        "launcher": str(_HERE / "launch.py"),
        "probe": str(_HERE / "probe.py"),
        "device": "cpu",
        "tp_size": 1,
        "max_running_requests": max_running_requests,
        "jit_cache_dir": str(Path(tempfile.gettempdir()) / "rollpool-sim"),  # nothing is compiled; it must exist
        # numpy would start a thread for each core, which nobody needs here.
        "env": {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        "extra_args": [*(word for name, value in shape.items() for word in (f"--sim-{name}", str(value))), *extra_args],
    }
