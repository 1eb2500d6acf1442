"""The processes of one group, and their end.

Invariant: `end_group` returns only when nothing of the group runs.
"""

import asyncio
import contextlib
import os
import signal

import psutil

from rollpool.worker.engines.protocol import EngineUnavailable

#: Seconds between two looks at a group that is ending.
_POLL_S = 0.05

#: Seconds after which a killed process counts as stuck in the kernel, where no signal reaches it.
_STUCK_S = 60.0


def alive(process: psutil.Process) -> bool:
    """True while it runs; a zombie waits for whoever reaps it, and holds nothing."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def members(pgid: int) -> list[int]:
    """The processes of a group that run."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(pid) == pgid and alive(psutil.Process(pid)):
                found.append(pid)
    return found


async def end_group(pgid: int) -> None:
    """SIGKILL a group until none of it runs, the children of a dead leader included.

    Raises:
        EngineUnavailable: a process does not end even so.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _STUCK_S
    while left := await asyncio.to_thread(members, pgid):
        if loop.time() > deadline:
            raise EngineUnavailable(
                f"process {left[0]} does not end by SIGKILL, so it hangs in the kernel, most likely in the TPU's "
                "driver: restart this host"
            )
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(_POLL_S)
