"""Faults in the middle of a policy change: real workers, a real server, simulated engines as real processes.

At the end of each test every job that was asked for meanwhile is settled once, each of its tokens is proved to be of
the policy that its span names, all hosts are on one policy, and the books are in order.
"""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from change_load import Book, again
from change_scene import POOL, RUN, Scene, cut_short, engine
from waiting import LONG, until_blocking

from rollpool.ops.sim.model import SimFault
from rollpool.producer import PolicyRejected, RolloutPool
from rollpool.schemas import Command, Keys, WorkerStatus
from rollpool.schemas.control_log import ack_of, command_fields

pytestmark = pytest.mark.timeout(280)

#: Hosts that restart for other weights, and hosts that change them while they serve.
RESTARTING, SWAPPING = [f"w-{number}" for number in range(4)], [f"s-{number}" for number in range(3)]

#: Hosts by how their engines come to adapters, the first to weights as well; and the runs that publish some.
ADAPTING: dict[str, dict[str, Any]] = {
    "a-runtime": {"lora": "runtime", "hot_swap": True, "swap_s": 0.5},
    "a-launch": {"lora": "launch"},
    "a-none": {},
}
RUNS = ("ra", "rb")

#: Seconds that a change of weights takes, while an engine serves on: time enough for a fault in its midst.
SWAP_S = 1.0

#: Makes a scene for this file's tests, which use it one after the other.
Open = Callable[[str, Callable[[Scene], None]], Scene]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """One scene at a time; a test that fails leaves none behind."""
    there: dict[str, Scene] = {}

    def close() -> None:
        for scene in there.values():
            scene.__exit__(None, None, None)
        there.clear()

    def open_scene(kind: str, fill: Callable[[Scene], None]) -> Scene:
        if kind not in there or there[kind].spoiled:
            close()  # one at a time: each has more processes than there are cores
            scene = there[kind] = Scene(tmp_path_factory.mktemp(kind)).__enter__()
            fill(scene)
        there[kind].spoiled = True  # until its test has come to its end
        return there[kind]

    yield open_scene
    close()


def first_policy(scene: Scene) -> None:
    scene.publish(scene.next_version(), *scene.model("v1"))
    scene.until_all_serve(1)
    scene.begin_load()


@pytest.fixture
def restarting(scenes: Open) -> Scene:
    """Four hosts under load."""

    def fill(scene: Scene) -> None:
        for name in RESTARTING:
            scene.add_host(name, engine())
        first_policy(scene)

    return scenes("restarting", fill)


@pytest.fixture
def adapting(scenes: Open) -> Scene:
    """A host of each kind: takes adapters while it serves, or at its launch, or merged; two runs ask for jobs."""

    def fill(scene: Scene) -> None:
        for name, kind in ADAPTING.items():
            scene.add_host(name, engine(**kind) | {"adapter_slots": 2})
        scene.publish(1, *scene.model("base-1"))
        scene.until_all_serve(1)
        for run in RUNS:
            scene.books[run] = Book([dict(scene.book.eras[-1])])
        scene.begin_load(*RUNS)

    return scenes("adapting", fill)


@pytest.fixture
def swapping(scenes: Open) -> Scene:
    """Three hosts whose engines change their weights while they serve, under load."""

    def fill(scene: Scene) -> None:
        for name in SWAPPING:
            scene.add_host(name, engine(hot_swap=True, swap_s=SWAP_S))
        first_policy(scene)

    return scenes("swapping", fill)


def done(scene: Scene) -> dict[str, int]:
    """The end of each test: everything is proved, and the scene is fit for the next one."""
    outcomes = scene.check()
    scene.spoiled = False
    return outcomes


# By restart


def test_a_roll_out_by_restart_survives_kills_at_each_of_its_steps(restarting: Scene) -> None:
    scene = restarting
    fetches, loses_engine, *frozen = RESTARTING
    served, version = scene.version, scene.next_version()
    _, signature = scene.model(f"v{version}")
    scene.store.gate.clear()
    scene.publish(version, f"{scene.store.url}/v{version}", signature, check=False, min_serving=3)
    # While it is fetched.
    scene.until(lambda: all(scene.is_staging(name, version) for name in RESTARTING), "all fetch it")
    scene.kill_worker(fetches)
    scene.kill_engine(loses_engine)
    scene.kill_server()
    scene.restart(fetches)
    scene.until(lambda: scene.is_staging(fetches, version), f"{fetches} fetches it again")
    scene.until_all_serve(served, among=[loses_engine])  # meanwhile, anew
    for name in frozen:  # so that they are long in letting go of what they have
        scene.freeze_scheduler(name)
    scene.store.gate.set()
    # While one winds down, and the other waits for its turn.
    winds_down = scene.first(scene.is_changing, "one winds down", among=frozen)
    waits = next(name for name in frozen if name != winds_down)
    scene.until(lambda: scene.is_waiting(waits), f"{waits} waits for its turn")
    scene.kill_worker(winds_down)
    scene.kill_worker(waits)
    scene.restart(waits)
    # While an engine starts.
    scene.until(lambda: bool(scene.engine(waits)), f"{waits} starts an engine")
    scene.kill_worker(waits)
    scene.restart(waits)
    scene.until(lambda: winds_down not in scene.turns(), f"the turn of {winds_down} ends by itself")
    scene.restart(winds_down)
    # Right after it is there.
    scene.until(lambda: bool(scene.acks(version, "applied")), "one says that it serves it")
    applied = scene.acks(version, "applied")[-1].worker
    scene.kill_worker(applied)
    scene.restart(applied)
    scene.until_all_serve(version)
    assert not scene.acks(version, "failed")
    outcomes = done(scene)
    assert outcomes["ok"] > 10


def test_what_cannot_be_served_stops_at_the_first_host_and_the_next_policy_goes_through(restarting: Scene) -> None:
    scene = restarting
    served = scene.version
    engines = scene.engines()
    with scene.watched() as watch:
        # What is seen beforehand costs no engine.
        for name in ("missing", "cut", "outside"):
            version = scene.next_version()
            path, _ = scene.model(f"{name}-{version}")
            if name == "missing":
                (Path(path) / "model.safetensors").unlink()
            elif name == "cut":
                cut_short(Path(path) / "model.safetensors")
            else:
                path = str(scene.move_out(Path(path)))
            scene.publish_broken(version, path)
            scene.until(lambda version=version: len(scene.failed(version)) == 4, f"{name}: all refuse it")  # type: ignore[misc]
            assert all(error for error in scene.failed(version).values())
        assert scene.engines() == engines
        assert scene.all_serve(served)
        # What is seen by an engine costs one host its engine.
        faults: tuple[SimFault, ...] = ("start", "probe")
        for fault in faults:
            version = scene.next_version()
            path, _ = scene.model(f"{fault}-{version}", fault=fault)
            scene.publish_broken(version, path)
            engines = expect_one_try(scene, version, served, engines)
        # An engine that is killed as it starts says nothing of its policy: it is started once more.
        version = scene.next_version()
        scene.publish(version, *scene.model(f"v{version}"))
        victim = scene.first(lambda name: scene.starts_another_engine(name, engines), "one starts its engine on it")
        scene.kill_engine(victim)
        scene.until_all_serve(version)
        assert not scene.failed(version)
    assert watch.fewest >= 3, watch
    assert watch.most_turns == 1
    with scene.watched() as watch:
        version = scene.next_version()
        scene.publish(version, *scene.model(f"v{version}"), min_serving=2)
        scene.until_all_serve(version)
    assert watch.fewest >= 2, watch
    done(scene)


def expect_one_try(scene: Scene, version: int, served: int, engines: dict[str, int]) -> dict[str, int]:
    """One host tried it, and all serve what they served; the engines that there are."""
    scene.until(lambda: len(scene.failed(version)) == len(scene.names), f"policy {version} failed on all")
    failed = scene.failed(version)
    tried = [name for name, error in failed.items() if "not tried here" not in error]
    assert len(tried) == 1, failed
    scene.until_all_serve(served)
    now = scene.engines()
    assert {name for name in now if now[name] != engines[name]} == set(tried)
    return now


def go_back_and_publish_anew(scene: Scene, *, least: int, on_the_way: Callable[[], None] = lambda: None) -> int:
    """Abandon a version that one host serves and the others do not, and publish its number anew, from elsewhere.

    Returns:
        The fewest hosts that served at once meanwhile.
    """
    before, generation = scene.version, scene.generation
    abandoned = scene.next_version()
    with scene.watched() as watch:
        scene.publish(abandoned, *scene.model(f"abandoned-{abandoned}"), min_serving=len(scene.names) - 1)
        scene.until(lambda: bool(scene.acks(abandoned, "applied")), "one host serves it")
        assert not scene.all_serve(abandoned, generation)
        scene.loads[RUN].ask(f"only-{abandoned}", abandoned, 0, count=24)
        scene.go_back(before)
        scene.until_all_serve(before, generation + 1)
        outcomes = scene.outcomes_of(RUN, f"only-{abandoned}")
        assert set(outcomes) <= {"ok", "stale"}
        assert "stale" in outcomes
        scene.publish(abandoned, *scene.model(f"anew-{abandoned}"), min_serving=least)
        on_the_way()
        scene.until_all_serve(abandoned, generation + 1)
    done(scene)
    return watch.fewest


def test_going_back_in_the_middle_of_a_roll_out_by_restart_frees_the_version_that_is_abandoned(
    restarting: Scene,
) -> None:
    scene = restarting

    def join() -> None:
        scene.first(scene.is_changing, "one host changes")
        scene.add_host("w-late", engine())

    assert go_back_and_publish_anew(scene, least=2, on_the_way=join) >= 2


def test_a_host_that_joins_after_fifty_commands_obeys_the_last_ones_alone(swapping: Scene) -> None:
    scene = swapping
    keys = Keys("fifty")
    path, _ = scene.model("fifty")

    def send(**fields: Any) -> None:
        scene.client.xadd(keys.control, dict(command_fields(Command(**fields))))  # type: ignore[arg-type]

    with RolloutPool(scene.server.url, pool="fifty", run=RUN) as pool:
        for version in range(1, 47):
            gone = str(scene.models / f"gone-{version}")
            pool.publish_policy(version, checkpoint=path if version == 46 else gone, check=False)
        send(kind="pause")
        send(kind="concurrency", concurrency=1)
        send(kind="concurrency", concurrency=3)
        send(kind="resume")
        with scene.lone_host("fifty", "late", engine(start_s=0.1)):
            pool.wait_for_policy(46, timeout=LONG)
            found: Any = scene.client.hgetall(keys.worker("late"))
            status = WorkerStatus.from_fields(found)
            assert (status.policy, status.state, status.target) == (46, "serving", 3)
            until_blocking(lambda: scene.client.xlen(keys.acks) == 6, "it answers what is in force")
            entries: Any = scene.client.xrange(keys.acks)
    answers = sorted((ack.kind, ack.version, ack.state) for _, fields in entries if (ack := ack_of(fields)))
    expected: list[tuple[str, int | None, str]] = [
        (kind, version, state)
        for kind, version in (("concurrency", None), ("policy", 46), ("resume", None))
        for state in ("applied", "received")
    ]
    assert answers == expected
    scene.spoiled = False


# By swap


def test_a_roll_out_by_swap_survives_kills_in_the_middle_of_it(swapping: Scene) -> None:
    scene = swapping
    version = scene.next_version()
    scene.publish(version, *scene.model(f"v{version}"))
    worker = scene.first(lambda name: scene.swaps_to(name, version), "one changes its weights")
    scene.kill_worker(worker)
    scene.restart(worker)
    others = [name for name in SWAPPING if name != worker]
    loses_engine = scene.first(lambda name: scene.swaps_to(name, version), "another one changes", among=others)
    scene.kill_engine(loses_engine)
    [last] = [name for name in others if name != loses_engine]
    scene.first(lambda name: scene.swaps_to(name, version), "the last one changes", among=[last])
    scene.kill_server()
    scene.until_all_serve(version)
    assert not scene.acks(version, "failed")
    version = scene.next_version()
    scene.publish(version, *scene.model(f"v{version}"))
    scene.until(lambda: bool(scene.acks(version, "applied")), "one says that it serves it")
    applied = scene.acks(version, "applied")[0].worker
    scene.kill_worker(applied)
    scene.restart(applied)
    scene.until_all_serve(version)
    done(scene)


def test_weights_that_a_running_engine_refuses_stop_at_the_first_host_or_are_started_anew(swapping: Scene) -> None:
    scene = swapping
    served, engines = scene.version, scene.engines()
    with scene.watched() as watch:
        faults: tuple[SimFault, ...] = ("swap", "probe")
        for fault in faults:
            version = scene.next_version()
            scene.publish_broken(version, scene.model(f"{fault}-{version}", fault=fault)[0])
            scene.until(lambda version=version: len(scene.failed(version)) == 3, "it failed on all")  # type: ignore[misc]
            assert sum("not tried here" not in error for error in scene.failed(version).values()) == 1
        assert scene.engines() == engines
        assert scene.all_serve(served)
    assert watch.fewest == 3, watch
    with scene.watched() as watch:
        version = scene.next_version()
        scene.publish_broken(version, scene.model(f"start-{version}", fault="start")[0])
        engines = expect_one_try(scene, version, served, engines)
        version = scene.next_version()
        scene.wider()
        scene.publish(version, *scene.model(f"wide-{version}"))
        scene.until_all_serve(version)
        assert all(engines[name] != now for name, now in scene.engines().items())
    assert watch.fewest >= 2, watch
    done(scene)


def test_going_back_in_the_middle_of_a_roll_out_by_swap_frees_the_version_that_is_abandoned(swapping: Scene) -> None:
    assert go_back_and_publish_anew(swapping, least=1) == len(SWAPPING)


def test_two_trainers_that_publish_at_once_leave_one_policy(swapping: Scene) -> None:
    scene = swapping
    runs, versions = ("one", "two"), range(scene.next_version(), scene.next_version() + 5)
    sources = {(run, version): scene.model(f"{run}-{version}") for run in runs for version in versions}
    won: dict[int, list[str]] = {version: [] for version in versions}
    refused: dict[int, list[str]] = {version: [] for version in versions}
    at_once = threading.Barrier(len(runs))
    scene.client.delete(scene.keys.publisher)  # whoever had its turn has ended

    def publish(run: str) -> None:
        with RolloutPool(scene.server.url, pool=POOL, run=run) as pool:
            for version in versions:
                at_once.wait(LONG)
                try:
                    again(partial(pool.publish_policy, version, checkpoint=sources[run, version][0]))
                except PolicyRejected as error:
                    refused[version].append(str(error))
                else:
                    won[version].append(run)

    threads = [threading.Thread(target=publish, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(winners) for winners in won.values()] == [1] * len(versions), won
    assert all("one run at a time" in error for errors in refused.values() for error in errors)
    for version, (winner,) in won.items():
        scene.book.published(version, sources[winner, version][1])
    scene.until_all_serve(versions[-1], scene.generation)
    scene.client.delete(scene.keys.publisher)
    done(scene)


# Adapters


def test_adapters_of_two_runs_on_hosts_of_all_kinds_make_the_tokens_that_are_said_to_be_theirs(adapting: Scene) -> None:
    scene = adapting
    all_hosts, beside = list(ADAPTING), ["a-runtime", "a-launch"]
    for run in RUNS:
        scene.publish_adapter(run, 2, f"{run}-2")
    scene.until_adapters("ra:2 rb:2", beside)
    scene.first(lambda name: scene.adapters(name) in ("ra:2", "rb:2"), "one is merged", ["a-none"])
    # While one host starts its engine on the next one, and just after another loaded it.
    scene.publish_adapter("ra", 3, "ra-3")
    scene.first(scene.is_changing, "a host restarts for it", ["a-launch"])
    scene.kill_worker("a-launch")
    scene.restart("a-launch")
    scene.first(lambda name: "3" in scene.adapters(name), "a host has loaded it", ["a-runtime"])
    scene.kill_engine("a-runtime")
    scene.until_adapters("ra:3 rb:2", beside)
    scene.until_adapters("ra:3", ["a-none"])
    # One that is not whole costs no run anything.
    scene.publish_broken_adapter("rb", 3, "rb-3")
    scene.until(lambda: set(scene.failed(3)) == set(all_hosts), "it failed on all")
    scene.publish_adapter("rb", 4, "rb-4")
    scene.until_adapters("ra:3 rb:4", beside)
    scene.until_adapters("rb:4", ["a-none"])
    outcomes = scene.check()
    assert outcomes["ok"] > 10
    made = scene.versions_made()
    assert made["ra"] >= {2, 3}
    assert made["rb"] >= {2, 4}
    # Another base ends them all; then they are published on that.
    scene.publish_base(5, "base-5")
    scene.until_all_serve(5)
    scene.until_adapters("", all_hosts)
    scene.publish_adapter("ra", 6, "ra-6")
    scene.until_adapters("ra:6", all_hosts)
    done(scene)
    assert scene.versions_made()["ra"] >= {5, 6}
