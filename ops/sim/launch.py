"""Start a simulated engine in the place of a real one; `engine.launcher` of the hosts that have it.

Run by path; the arguments are those of sglang-jax, as a worker passes them, and `--sim-…` flags.

Invariant: as for the real launch script, nothing of the engine is left once its worker has ended.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def watch_lifeline() -> None:
    """Watch it as the real launch script does, whose module is loaded by path: its package takes a second to import."""
    script = Path(__file__).parents[2] / "worker" / "launch" / "serve.py"
    spec = spec_from_file_location("rollpool_serve", script)
    assert spec is not None, script
    assert spec.loader is not None, script
    serve = module_from_spec(spec)
    spec.loader.exec_module(serve)
    serve.watch_lifeline()


def main() -> None:
    """Watch the lifeline, then serve."""
    watch_lifeline()  # first: what follows takes a while
    from rollpool.ops.sim.server import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
