"""Say what a simulated engine's environment holds, as one line of JSON; in place of `worker/launch/probe.py`.

Run by path. Invariant: standard output is exactly one JSON object, of the same fields as the real probe's.
"""

import json
import os
import platform


def main() -> None:
    """Print the one line."""
    facts = {
        "sglang_jax": "0.0.0.dev0+sim",  # as `arguments.VERSION`; not imported, to start in a few milliseconds
        "jax": "simulated",
        "python": platform.python_version(),
        "platform": "cpu",
        "devices": 1,
        "msgpack_ok": True,
        "single_process": False,
        "lora": "SIM_LORA" in os.environ,  # as `settings.LORA_ENV`
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
