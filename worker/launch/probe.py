"""Say what an engine's environment holds and what devices it sees, as one line of JSON.

Run by path with the engine's own Python. The process opens the TPU to count devices, and frees it by ending.

Invariant: standard output is exactly one JSON object, whatever the libraries print; the exit status is 0 if
it describes an environment that can serve, else 1 with the reason under "error".
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import sys
from typing import Any


def _msgpack_ok() -> bool:
    """Tell whether strings come back as strings and bytes as bytes.

    The engine's dependencies bring both `msgpack` and the old `msgpack-python`, which install the same
    module; where the old one landed last, strings come back as bytes. Installed metadata does not show it.
    """
    import msgpack

    unpacked = msgpack.unpackb(msgpack.packb({"text": b"bytes"}, use_bin_type=True))
    return bool(unpacked == {"text": b"bytes"})


def _server_fields() -> set[str]:
    from sgl_jax.srt.server_args import ServerArgs

    return {field.name for field in dataclasses.fields(ServerArgs)}


def probe() -> dict[str, Any]:
    """Collect the facts; any error is the caller's to report."""
    import jax

    devices = jax.devices()  # First: where the TPU is taken this is what fails, and it says by whom.
    fields = _server_fields()
    return {
        "sglang_jax": importlib.metadata.version("sglang-jax"),
        "jax": importlib.metadata.version("jax"),
        "python": platform.python_version(),
        "platform": devices[0].platform,
        "devices": len(devices),
        "msgpack_ok": _msgpack_ok(),
        "single_process": "enable_single_process" in fields,
        "lora": "lora_paths" in fields,
    }


def main() -> int:
    """Print the one line.

    Returns:
        The exit status.
    """
    with contextlib.redirect_stdout(sys.stderr):
        try:
            facts, status = probe(), 0
        except Exception as error:
            facts, status = {"error": f"{type(error).__name__}: {error}"}, 1
    print(json.dumps(facts), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
