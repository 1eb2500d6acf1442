import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import until_blocking

from rollpool.schemas import EngineUnavailable, PolicyRejected
from rollpool.worker.sources.shelf import MARKER, Shelf
from rollpool.worker.sources.working import Stop, Stopped

GIB = 1 << 30


def writes(size: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "file").write_bytes(bytes(size))

    return write


class Ticking:
    """A clock that is later each time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "staged", 100, clock=Ticking(), disk=lambda _: (GIB, GIB))


def put(shelf: Shelf, name: str, size: int = 40) -> Path:
    path = shelf.obtain(name, size, f"policy {name}", writes(size), Stop())
    shelf.unpin(name)
    return path


def test_a_whole_one_is_not_made_again(shelf: Shelf) -> None:
    path = put(shelf, "a")
    made: list[Path] = []
    assert shelf.obtain("a", 40, "a", made.append, Stop()) == path
    assert not made


def test_one_that_was_changed_is_made_anew(shelf: Shelf) -> None:
    path = put(shelf, "a")
    (path / "file").write_bytes(b"short")
    shelf.keep([])
    assert (put(shelf, "a") / "file").stat().st_size == 40


def test_one_that_was_changed_while_a_call_has_it_is_refused(shelf: Shelf) -> None:
    path = shelf.obtain("a", 40, "a", writes(40), Stop())
    (path / "file").write_bytes(b"short")
    with pytest.raises(EngineUnavailable, match="changed while it is in use"):
        shelf.obtain("a", 40, "a", writes(40), Stop())


def test_what_was_used_least_recently_makes_room(shelf: Shelf) -> None:
    a, b = put(shelf, "a"), put(shelf, "b")
    put(shelf, "a")  # used again
    shelf.keep([])
    c = put(shelf, "c")
    assert (a.exists(), b.exists(), c.exists()) == (True, False, True)


def test_what_is_kept_stays(shelf: Shelf) -> None:
    a, b = put(shelf, "a"), put(shelf, "b")
    shelf.keep([str(a), str(b), "/elsewhere/c"])
    with pytest.raises(PolicyRejected, match=r"policy c does not fit .* in use \(a, b\)"):
        put(shelf, "c")
    shelf.keep([str(b)])
    put(shelf, "c")
    assert (a.exists(), b.exists()) == (False, True)


def test_what_was_just_staged_stays_until_keep_says_otherwise(shelf: Shelf) -> None:
    put(shelf, "a", 60)
    with pytest.raises(PolicyRejected):
        put(shelf, "b", 60)
    shelf.keep([])
    put(shelf, "b", 60)


def test_what_a_call_has_in_hand_stays_whatever_keep_says(shelf: Shelf) -> None:
    path = shelf.obtain("a", 60, "a", writes(60), Stop())
    shelf.keep([])
    with pytest.raises(PolicyRejected):
        put(shelf, "b", 60)
    shelf.unpin("a")
    shelf.keep([])
    put(shelf, "b", 60)
    assert not path.exists()


def test_what_another_process_keeps_stays(shelf: Shelf) -> None:
    path = put(shelf, "a", 60)
    keeper = (
        "import sys; from pathlib import Path; from rollpool.worker.sources.shelf import Shelf\n"
        "path = Path(sys.argv[1]); Shelf(path.parent, 0).keep([str(path)]); print('kept', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", keeper, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "kept\n"
        shelf.keep([])
        with pytest.raises(PolicyRejected, match="does not fit"):
            put(shelf, "b", 60)
        process.kill()
        process.wait()
        put(shelf, "b", 60)
        assert not path.exists()


def test_a_restart_finds_what_is_whole_and_no_more(shelf: Shelf, tmp_path: Path) -> None:
    whole = put(shelf, "a", 30)

    def dies(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.obtain("b", 30, "b", dies, Stop(), resumable=True)
    again = Shelf(tmp_path / "staged", 100, disk=lambda _: (GIB, GIB))
    made: list[list[str]] = []

    def goes_on(folder: Path) -> None:
        made.append(sorted(path.name for path in folder.iterdir()))

    assert again.obtain("a", 30, "a", goes_on, Stop()) == whole
    again.obtain("b", 30, "b", goes_on, Stop())
    assert made == [[MARKER, "half"]]


def test_a_rejected_one_leaves_nothing(shelf: Shelf) -> None:
    def rejects(folder: Path) -> None:
        (folder / "file").write_bytes(b"x")
        raise PolicyRejected("broken")

    with pytest.raises(PolicyRejected, match="broken"):
        shelf.obtain("a", 10, "a", rejects, Stop())
    assert [path.name for path in shelf.directory.iterdir()] == [".lock"]


def test_what_cannot_go_on_later_is_removed_at_once(shelf: Shelf) -> None:
    def dies(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.obtain("a", 10, "a", dies, Stop())
    assert [path.name for path in shelf.directory.iterdir()] == [".lock"]


def test_what_others_put_there_is_not_removed(shelf: Shelf) -> None:
    (shelf.directory / "theirs").mkdir(parents=True)
    (shelf.directory / "theirs" / "file").write_bytes(bytes(90))
    put(shelf, "a", 60)
    shelf.keep([])
    put(shelf, "b", 60)
    assert {path.name for path in shelf.directory.iterdir()} == {".lock", "theirs", "b"}


def test_what_is_half_there_makes_room_too(shelf: Shelf) -> None:
    def dies(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shelf.obtain("a", 60, "a", dies, Stop(), resumable=True)
    assert (shelf.directory / "a.partial").exists()
    put(shelf, "b", 60)
    assert not (shelf.directory / "a.partial").exists()


def test_what_a_crash_left_on_its_way_out_is_removed(shelf: Shelf) -> None:
    put(shelf, "a")
    (shelf.directory / "a").rename(shelf.directory / "a.rollpool-doomed")
    put(shelf, "b")
    assert not (shelf.directory / "a.rollpool-doomed").exists()


def test_a_source_in_the_making_has_its_room_reserved(shelf: Shelf) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        begun.set()
        assert may_end.wait(60)

    thread = threading.Thread(target=shelf.obtain, args=("a", 60, "a", slow, Stop()))
    thread.start()
    try:
        assert begun.wait(60)
        with pytest.raises(PolicyRejected, match="does not fit"):
            put(shelf, "b", 60)
    finally:
        may_end.set()
        thread.join()


def test_two_at_once_make_one(shelf: Shelf) -> None:
    begun, may_end, made = threading.Event(), threading.Event(), []

    def slow(folder: Path) -> None:
        made.append(folder)
        begun.set()
        assert may_end.wait(60)

    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(shelf.obtain("a", 60, "a", slow, Stop()))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    may_end.set()
    for thread in threads:
        thread.join()
    assert found == [shelf.directory / "a"] * 2
    assert len(made) == 1


def test_waiting_for_another_ends_when_told(shelf: Shelf) -> None:
    begun, may_end, stop = threading.Event(), threading.Event(), Stop()
    ended: list[str] = []

    def slow(folder: Path) -> None:
        begun.set()
        assert may_end.wait(60)

    def second() -> None:
        try:
            shelf.obtain("a", 60, "a", slow, stop)
        except Stopped:
            ended.append("stopped")

    first = threading.Thread(target=shelf.obtain, args=("a", 60, "a", slow, Stop()))
    first.start()
    assert begun.wait(60)
    other = threading.Thread(target=second)
    other.start()
    stop.set()
    until_blocking(lambda: ended, "it stopped")
    may_end.set()
    first.join()
    other.join()


def test_without_a_budget_a_tenth_of_the_disk_stays_free(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "staged", 0, disk=lambda _: (1000, 150))
    put(shelf, "a", 50)
    with pytest.raises(PolicyRejected, match="does not fit"):
        put(shelf, "b", 51)


def test_the_disk_counts_where_the_budget_is_larger(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "staged", 10_000, disk=lambda _: (1000, 50))
    put(shelf, "a", 50)
    with pytest.raises(PolicyRejected, match="does not fit"):
        put(shelf, "b", 51)


def test_a_directory_that_takes_no_writes_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shelf = Shelf(tmp_path / "file" / "staged", 0)
    with pytest.raises(EngineUnavailable, match="stage_dir"):
        put(shelf, "a", 1)


def test_a_marker_that_is_no_marker_counts_as_none(shelf: Shelf) -> None:
    for text in ("", "[]", json.dumps({"files": {"../outside": 1}})):
        path = put(shelf, "a")
        (path / MARKER).write_text(text)
        shelf.keep([])
        put(shelf, "a")
        assert json.loads((path / MARKER).read_text())["files"] == {"file": 40}


def test_last_use_outlives_the_process(shelf: Shelf) -> None:
    path = put(shelf, "a")
    assert (path / MARKER).stat().st_mtime > 1000
    assert (path / MARKER).stat().st_mtime < 2000
