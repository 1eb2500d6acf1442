"""No task outlives the call that started it, whatever becomes of its cancellation."""

import asyncio

import pytest

from rollpool.worker import tasks
from rollpool.worker.tasks import cancelled, first_of, unless


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "CANCEL_AGAIN_S", 0.01)


async def loses_a_cancellation(times: int) -> str:
    """As a loop around redis-py does on Python before 3.12."""
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not times:
                raise
            times -= 1


async def test_a_task_that_loses_its_cancellation_is_cancelled_again() -> None:
    stubborn = [asyncio.create_task(loses_a_cancellation(times)) for times in range(3)]
    await asyncio.sleep(0)
    await cancelled(stubborn)
    assert all(task.cancelled() for task in stubborn)


async def test_what_ended_before_keeps_its_result() -> None:
    done = asyncio.create_task(asyncio.sleep(0, "result"))
    await done
    await cancelled([done])
    await cancelled([])
    assert done.result() == "result"


async def test_work_is_dropped_once_the_event_is_set() -> None:
    stop = asyncio.Event()
    assert await unless(stop, asyncio.sleep(0, "result")) == "result"
    asyncio.get_running_loop().call_soon(stop.set)
    assert await unless(stop, loses_a_cancellation(1)) is None


async def test_work_that_ends_by_an_error_raises_it() -> None:
    async def fails() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await unless(asyncio.Event(), fails())


async def test_nothing_is_left_running_when_the_caller_is_cancelled() -> None:
    before = asyncio.all_tasks()
    for call in (unless(asyncio.Event(), loses_a_cancellation(0)), first_of(loses_a_cancellation(0))):
        calling = asyncio.create_task(call)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
    assert asyncio.all_tasks() == before


async def test_the_first_of_several_ends_the_wait_and_so_does_time() -> None:
    await first_of(asyncio.sleep(0), loses_a_cancellation(0))
    await first_of(loses_a_cancellation(1), timeout=0.0)
