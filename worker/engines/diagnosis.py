"""Why an engine died, in words that say what to do; pure.

Invariant: what is recognised is added to the engine's own last lines, never put in their place.
"""

import re
import signal
from dataclasses import dataclass

#: Lines of the log that an error quotes: a Python traceback's last frames and its message.
QUOTED_LINES = 15


@dataclass(frozen=True, slots=True)
class _Sign:
    pattern: re.Pattern[str]
    advice: str


def _sign(pattern: str, advice: str) -> _Sign:
    return _Sign(re.compile(pattern, re.IGNORECASE), advice)


#: What dying engines say, most telling first.
_SIGNS = (
    _sign(
        r"TPU is already in use by process(?: with pid)? (?P<pid>\d+)",
        "process {pid} holds this host's TPU, and a TPU serves one process: end it (`ps -fp {pid}`), "
        "and run one worker on each TPU VM",
    ),
    _sign(
        r"TPU is already in use|libtpu_lockfile|Device or resource busy",
        "another process holds this host's TPU: end it (`sudo lsof -w /dev/accel* /dev/vfio/*` names it; "
        "with none left, remove /tmp/libtpu_lockfile), and run one worker on each TPU VM",
    ),
    _sign(
        r"address already in use",
        "another process listens on the engine's port: set engine.port=0 to have a free one picked",
    ),
    _sign(
        r"RESOURCE_EXHAUSTED|Not enough memory|out of memory|Cannot allocate memory",
        "the model and its cache do not fit: lower engine.max_seq_len or engine.max_running_requests, give "
        "--mem-fraction-static in engine.extra_args, or use more devices",
    ),
    _sign(
        r"device \S+ is not consistent with 'JAX_PLATFORMS'",
        "JAX_PLATFORMS in the environment names another device: set it in engine.env to engine.device",
    ),
    _sign(
        r"ici_parallelism|only \d+ devices?|mesh_shape|cannot reshape array|number of devices",
        "engine.tp_size does not match the devices of this host: a v4-8 is 4 chips, which JAX usually shows "
        "as 4 devices; set engine.tp_size to what `jax.devices()` counts there",
    ),
    _sign(
        r"No module named 'sgl_jax'",
        "engine.python names an environment without sglang-jax: set it to the interpreter that has it",
    ),
    _sign(
        r"unrecognized arguments: (?P<flags>.+)",
        "this line of sglang-jax does not know {flags}: take them out of engine.extra_args",
    ),
)


def advice(log_tail: str) -> str | None:
    """What to do about a death that ends in these lines; None when nothing in them is known."""
    for sign in _SIGNS:
        if match := sign.pattern.search(log_tail):
            return sign.advice.format(**match.groupdict())
    return None


def describe_exit(returncode: int) -> str:
    """An exit status in words."""
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    # The server kills itself so after an error of its scheduler, which its log then tells.
    hint = " (by itself after an error, or by the kernel when memory runs out)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def last_lines(log: bytes, count: int = QUOTED_LINES) -> str:
    """The last lines that hold anything."""
    lines = [line for line in log.decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def death_note(what: str, log_tail: str, log_path: str) -> str:
    """The message of an engine's death: what happened, what to do, and its last words."""
    known = advice(log_tail)
    todo = f": {known}" if known else ""
    quoted = f"\n--- last lines of {log_path} ---\n{log_tail}" if log_tail else f" (its log {log_path} is empty)"
    return f"{what}{todo}{quoted}"
