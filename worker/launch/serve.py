"""Start the sglang-jax server, and see that it never outlives the worker that started it.

Run by path with the engine's own Python; the arguments are those of `python -m sgl_jax.launch_server`. The main line is
given routes by which its weights change while it serves, where it is as they expect it; else it is served as it is.

Invariant: once the write end of the lifeline pipe is closed, by whatever ended its holder, no process of
the engine's process group is left.
"""

import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

# The folder of a script run by path is on `sys.path` by default only.
_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

if TYPE_CHECKING:
    from rollpool.worker.launch import hot_swap
else:
    import hot_swap

LIFELINE_ENV = "ROLLPOOL_LIFELINE_FD"


def _end_group_on_eof(fd: int) -> None:
    """Block until the lifeline's other end is closed, then kill the whole process group, this process included."""
    while True:
        try:
            if os.read(fd, 1):
                continue  # Whoever holds the other end may write: only its end counts.
        except InterruptedError:
            continue
        except OSError as error:
            print(f"rollpool: the lifeline cannot be read ({error}); ending", file=sys.stderr, flush=True)
        break
    os.killpg(os.getpgrp(), signal.SIGKILL)


def watch_lifeline() -> bool:
    """Watch the pipe named by `ROLLPOOL_LIFELINE_FD`, if there is one.

    Call it only in the engine's main process: the children that it spawns belong to its process group and
    end with it, and must not hold the pipe.

    Returns:
        Whether a watch was started.

    Raises:
        SystemExit: The variable is not the number of an open descriptor, or this process does not lead its
            process group, so that killing the group could hit a process that is not the engine's.
    """
    value = os.environ.pop(LIFELINE_ENV, None)  # Popped: a child must not take it for its own.
    if value is None:
        return False
    try:
        fd = int(value)
        os.set_inheritable(fd, False)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{LIFELINE_ENV}={value!r} is not an open file descriptor: {error}") from error
    if os.getpgrp() != os.getpid():
        raise SystemExit(f"{LIFELINE_ENV} needs the engine to lead its own process group (start_new_session)")
    # A thread, not SIGIO or a poll in the server's event loop: it works while the main thread is in XLA.
    threading.Thread(target=_end_group_on_eof, args=(fd,), name="rollpool-lifeline", daemon=True).start()
    return True


def main() -> None:
    """Watch the lifeline, then become `python -m sgl_jax.launch_server` with this process's arguments."""
    watch_lifeline()
    hot_swap.install()
    # run_module and not an import of its parts: the launch module's own code differs between releases, and
    # this is what `python -m` runs. `alter_sys` stays off: `sys.modules["__main__"]` must remain the script,
    # because the spawned scheduler imports that script again.
    runpy.run_module("sgl_jax.launch_server", run_name="__main__")


if __name__ == "__main__":
    main()
