"""Child processes that do not outlive the process that started them.

Invariant: on Linux with util-linux' `setpriv` the kernel kills what `spawn` started as soon as this process has ended,
however it ended; and a Ctrl-C in the terminal reaches this process alone, which then ends its children in order.
"""

import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from typing import BinaryIO


def spawn(command: Sequence[str], log: BinaryIO, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, from a thread that lives as long as it.

    The kernel takes the thread that forked, not its process, for the owner whose end is watched.

    Args:
        command: What to run.
        log: Takes what it writes: a file, since nobody reads a pipe, and a full one would stop it.
        env: Its environment; None: ours.
    """
    started = Future[subprocess.Popen[bytes]]()
    guarded = [*dies_with_us(), *command]

    def own() -> None:
        try:
            process = subprocess.Popen(
                guarded, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
        except BaseException as error:
            started.set_exception(error)
        else:
            started.set_result(process)
            process.wait()

    threading.Thread(target=own, name="rollpool-child", daemon=True).start()
    return started.result()


@cache
def dies_with_us() -> tuple[str, ...]:
    """A command that asks the kernel to kill what it runs when the thread that forked it ends; nothing where none can.

    It is exec'd before the child; doing the same in a `preexec_fn` could deadlock in a process with threads.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return ()
    guard = (setpriv, "--pdeathsig", "KILL")
    # Busybox has a setpriv too, without this option.
    works = subprocess.run([*guard, "true"], capture_output=True, check=False).returncode == 0
    return guard if works else ()
