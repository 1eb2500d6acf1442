"""Which staged sources make room for the next.

Invariant: what is kept is never chosen; after those chosen are gone the next fits, and where no choice would do,
nothing is chosen. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rollpool.schemas import PolicyRejected

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One source in the directory, whole or in the making."""

    name: str
    #: Bytes it takes when it is whole.
    reserved: int
    #: Bytes it takes now.
    on_disk: int
    #: Seconds of the clock that names when it was used last.
    used_at: float
    #: In use, here or by another process.
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What there is to share."""

    #: Bytes that all entries may take together; None: what the disk has.
    budget: int | None
    #: Bytes of the disk that nothing takes, less what must stay free.
    free: int


def evictions(entries: Sequence[Entry], need: Entry, room: Room) -> list[Entry] | None:
    """The entries to remove, those used least recently first, so that `need` fits; None when none would do.

    Args:
        entries: what is there, without `need`.
        need: what is to come, or goes on where it was interrupted.
        room: what there is to share.
    """
    chosen: list[Entry] = []
    rest = sorted(entries, key=lambda entry: (entry.used_at, entry.name))
    for candidate in (*(entry for entry in rest if not entry.kept), None):
        if _fits([entry for entry in rest if entry not in chosen], chosen, need, room):
            return chosen
        if candidate is not None:
            chosen.append(candidate)
    return None


def _fits(stay: Sequence[Entry], go: Sequence[Entry], need: Entry, room: Room) -> bool:
    """Within the budget, and on the disk with what those that stay have still to write."""
    if room.budget is not None and need.reserved + sum(entry.reserved for entry in stay) > room.budget:
        return False
    to_write = sum(max(0, entry.reserved - entry.on_disk) for entry in (*stay, need))
    return to_write <= room.free + sum(entry.on_disk for entry in go)


def no_room(what: str, directory: str, entries: Sequence[Entry], need: Entry, room: Room) -> PolicyRejected:
    """Why nothing would do, in numbers."""
    kept = [entry for entry in entries if entry.kept]
    held = sum(entry.reserved for entry in kept)
    budget = "" if room.budget is None else f"of {_mib(room.budget)} that it may have "
    used_by = f" ({', '.join(entry.name for entry in kept)})" if kept else ""
    free = _mib(max(0, room.free))
    return PolicyRejected(
        f"{what} does not fit into {directory}: it needs {_mib(need.reserved)}; "
        f"{budget}{_mib(held)} are in use{used_by}, and {free} of its disk are free; "
        "raise stage_gib, free the disk, or set stage_dir to another"
    )


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB"
