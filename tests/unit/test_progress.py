"""When an engine counts as standing still."""

from rollpool.worker.engines.progress import ProgressWatch
from rollpool.worker.engines.protocol import EngineLoad


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_idle_engine_is_never_stalled() -> None:
    clock = Clock()
    watch = ProgressWatch(clock, 300)
    clock.now += 10_000
    assert watch.stalled() is None
    watch.started()
    assert watch.stalled() is None


def test_without_progress_a_busy_engine_is_stalled_after_the_limit() -> None:
    clock = Clock()
    watch = ProgressWatch(clock, 300)
    watch.started()
    clock.now += 300
    assert watch.stalled() is None
    clock.now += 1
    assert "1 requests in flight" in (watch.stalled() or "")


def test_a_completion_is_progress_and_a_cancelled_request_is_none() -> None:
    clock = Clock()
    watch = ProgressWatch(clock, 300)
    for _ in range(3):
        watch.started()
    clock.now += 200
    watch.ended(completed=True)
    clock.now += 200
    assert watch.stalled() is None
    watch.ended(completed=False)
    clock.now += 101
    assert watch.stalled() is not None


def test_a_change_of_load_is_progress_and_a_repeated_one_is_none() -> None:
    clock = Clock()
    watch = ProgressWatch(clock, 300)
    watch.started()
    watch.observed(EngineLoad(running=1, steps=5))
    clock.now += 200
    watch.observed(EngineLoad(running=1, steps=6))
    clock.now += 200
    watch.observed(EngineLoad(running=1, steps=6))
    assert watch.stalled() is None
    clock.now += 101
    assert watch.stalled() is not None


def test_a_change_of_weights_has_a_limit_of_its_own() -> None:
    clock = Clock()
    watch = ProgressWatch(clock, 300, 1800)
    watch.started()
    clock.now += 200
    with watch.changing():
        clock.now += 1800
        assert watch.stalled() is None
        assert watch.still_for() == 0.0
        clock.now += 1
        assert "a change of its weights has not ended within 1801 s" in (watch.stalled() or "")
    clock.now += 300
    assert watch.stalled() is None
    clock.now += 1
    assert "no progress for 301 s" in (watch.stalled() or "")
