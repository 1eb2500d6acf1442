"""What a host shows of itself while it goes about its work.

Invariant: what is told here is for people and for other hosts' decisions; nothing on this host is decided by it.
"""

from dataclasses import dataclass

from rollpool.schemas import WorkerState

_MIB = 1 << 20


@dataclass(slots=True)
class Shown:
    """The part of a heartbeat that is no count."""

    state: WorkerState = "starting"
    error: str = ""
    #: What is fetched or verified now, and how much of it is there.
    staging: str = ""
    #: Version of the checkpoint that the host starts or changes to; None: it stays where it is.
    heading: int | None = None
    #: Adapters that it will serve once its engine has started, as a heartbeat says them.
    adapters: str = ""

    def progress_of(self, version: int) -> "Progress":
        """To be told of bytes while a policy is staged."""
        return Progress(self, version)


@dataclass(slots=True)
class Progress:
    """Shows how much of one policy is there, as long as its context lasts."""

    shown: Shown
    version: int

    def __call__(self, there: int, of: int) -> None:
        """Bytes that are there, and bytes in all."""
        self.shown.staging = f"policy {self.version}: {there / _MIB:,.0f} of {of / _MIB:,.0f} MiB"

    def __enter__(self) -> "Progress":
        self.shown.staging = f"policy {self.version}"
        return self

    def __exit__(self, *_: object) -> None:
        self.shown.staging = ""
