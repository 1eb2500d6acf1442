"""One life of one worker: what tells it from the next worker of the same name.

Invariant: a process counts as ended only when that is proved, on this machine.
"""

import re
import socket
from dataclasses import dataclass

import psutil

#: Seconds by which the start of one process, told by two others, may differ: it is counted from the machine's own
#: start, which Linux tells to the second.
START_JITTER_S = 2

_CONSUMER = re.compile(r"(?P<worker>.+):(?P<host>[^:]*)@(?P<pid>\d{1,9})-(?P<started>\d{1,12})", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Incarnation:
    """One life of one worker: what tells it from the next worker of the same name."""

    worker: str
    host: str
    pid: int
    #: When the process started, in whole seconds since the epoch: process ids are used again.
    started: int

    @classmethod
    def current(cls, worker: str) -> "Incarnation":
        """This process."""
        process = psutil.Process()
        return cls(worker, socket.gethostname(), process.pid, int(process.create_time()))

    @classmethod
    def parse(cls, consumer: str) -> "Incarnation | None":
        """Read a consumer's name; None when it is not one of ours."""
        found = _CONSUMER.fullmatch(consumer)
        if found is None:
            return None
        return cls(found["worker"], found["host"], int(found["pid"]), int(found["started"]))

    @property
    def consumer(self) -> str:
        """Its name in the consumer group."""
        return f"{self.worker}:{self.host}@{self.pid}-{self.started}"

    def ended(self) -> bool:
        """True only when it ran on this host and its process is provably gone."""
        if self.host != socket.gethostname():
            return False
        return process_ended(self.pid, alive_at=self.started)


def process_ended(pid: int, *, alive_at: float) -> bool:
    """True only when the process of this machine that had this id at that time, in seconds since the epoch, is gone."""
    try:
        process = psutil.Process(pid)
        if process.create_time() > alive_at + START_JITTER_S:
            return True  # another one, with its id
        return process.status() == psutil.STATUS_ZOMBIE  # killed, and its parent has not looked
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
