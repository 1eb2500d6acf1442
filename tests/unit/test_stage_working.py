import asyncio
import threading

import pytest
from waiting import until

from rollpool.worker.sources.working import Meter, Stop, Stopped, for_each, in_thread, on_loop


async def test_cancelling_stops_the_thread_before_it_returns() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(stop: Stop) -> None:
        begun.set()
        try:
            stop.sleep(60.0)
        finally:
            ended.set()

    call = asyncio.create_task(in_thread(work))
    await until(begun.is_set)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()


async def test_a_result_that_nobody_takes_is_undone() -> None:
    begun, undone = threading.Event(), list[str]()

    def work(stop: Stop) -> str:
        begun.set()
        with pytest.raises(Stopped):
            stop.sleep(60.0)
        return "made all the same"

    call = asyncio.create_task(in_thread(work, undo=undone.append))
    await until(begun.is_set)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: undone == ["made all the same"])


async def test_a_result_that_is_taken_is_not_undone() -> None:
    undone = list[str]()
    assert await in_thread(lambda _: "made", undo=undone.append) == "made"
    await asyncio.sleep(0)
    assert not undone


async def test_what_the_thread_raises_is_raised() -> None:
    def work(stop: Stop) -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        await in_thread(work)


async def test_progress_is_told_in_the_loop() -> None:
    told: list[tuple[int, int, bool]] = []
    here = threading.get_ident()
    tell = on_loop(lambda done, total: told.append((done, total, threading.get_ident() == here)))

    def work(stop: Stop) -> None:
        meter = Meter(10, tell, stop)
        meter.add(4)
        meter.add(6)

    await in_thread(work)
    await until(lambda: told == [(0, 10, True), (4, 10, True), (10, 10, True)])


def test_the_first_failure_ends_the_others_and_is_raised() -> None:
    failed = Stop()
    begun = threading.Event()

    def work(item: int) -> None:
        if item == 1:
            assert begun.wait(60)
            raise ValueError("the first")
        begun.set()
        failed.sleep(60.0)

    with pytest.raises(ValueError, match="the first"):
        for_each(range(5), work, at_once=2, failed=failed)


def test_a_meter_stops_with_the_work() -> None:
    stop = Stop()
    meter = Meter(10, lambda _done, _all: None, stop)
    stop.set()
    with pytest.raises(Stopped):
        meter.add(1)
