from hypothesis import given
from hypothesis import strategies as st

from rollpool.worker.sources.budget import Entry, Room, evictions, no_room

SIZES = st.integers(0, 50)


@st.composite
def entries(draw: st.DrawFn, name: str) -> Entry:
    reserved = draw(SIZES)
    return Entry(
        name=name,
        reserved=reserved,
        on_disk=draw(st.integers(0, reserved)),
        used_at=draw(st.integers(0, 5)),
        kept=draw(st.booleans()),
    )


SHELVES = st.integers(0, 6).flatmap(lambda n: st.tuples(*(entries(f"e{i}") for i in range(n))))
ROOMS = st.builds(Room, budget=st.none() | st.integers(0, 150), free=st.integers(-10, 100))


def fits(stay: list[Entry], gone: list[Entry], need: Entry, room: Room) -> bool:
    """What the disk holds in the end, once everything that stays is whole."""
    if room.budget is not None and sum(entry.reserved for entry in stay) + need.reserved > room.budget:
        return False
    grows = sum(entry.reserved - entry.on_disk for entry in (*stay, need))
    return grows - sum(entry.on_disk for entry in gone) <= room.free


@given(SHELVES, entries("need"), ROOMS)
def test_what_is_next_fits_or_nothing_goes(shelf: tuple[Entry, ...], need: Entry, room: Room) -> None:
    gone = evictions(shelf, need, room)
    loose = [entry for entry in shelf if not entry.kept]
    kept = [entry for entry in shelf if entry.kept]
    if gone is None:
        assert not fits(kept, loose, need, room)
        return
    stay = [entry for entry in shelf if entry not in gone]
    assert not any(entry.kept for entry in gone)
    assert fits(stay, gone, need, room)


@given(SHELVES, entries("need"), ROOMS)
def test_the_least_recently_used_go_first_and_no_more_than_needed(
    shelf: tuple[Entry, ...], need: Entry, room: Room
) -> None:
    gone = evictions(shelf, need, room)
    if not gone:
        return
    spared = [entry for entry in shelf if not entry.kept and entry not in gone]
    assert max(entry.used_at for entry in gone) <= min((entry.used_at for entry in spared), default=5)
    fewer = gone[:-1]
    assert not fits([entry for entry in shelf if entry not in fewer], fewer, need, room)


def test_the_refusal_has_the_numbers() -> None:
    mib = 1 << 20
    kept = Entry(name="12-ab", reserved=5 * mib, on_disk=5 * mib, used_at=0, kept=True)
    need = Entry(name="13-cd", reserved=7 * mib, on_disk=0, used_at=0, kept=True)
    room = Room(budget=10 * mib, free=100 * mib)
    assert evictions([kept], need, room) is None
    message = str(no_room("policy 13", "/stage", [kept], need, room))
    for said in (
        "policy 13",
        "/stage",
        "needs 7.0 MiB",
        "10.0 MiB",
        "5.0 MiB are in use (12-ab)",
        "100.0 MiB",
        "stage_gib",
    ):
        assert said in message
