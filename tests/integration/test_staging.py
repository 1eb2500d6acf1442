"""Sources are fetched from a real server on loopback, which breaks, stalls and lies as the tests ask."""

import asyncio
import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from redis.backoff import ConstantBackoff
from small_checkpoints import LORA_A, LORA_B, WEIGHT, make_adapter, make_base, random
from waiting import until

from rollpool.schemas import EngineUnavailable, Policy, PolicyRejected, SourceFile
from rollpool.worker.engines.protocol import OnProgress
from rollpool.worker.sources import Sources, Stage
from rollpool.worker.sources.checking import WrongFile
from rollpool.worker.sources.fetching import Patience
from rollpool.worker.sources.merge import MergePlan, carry_out
from rollpool.worker.sources.shelf import MARKER

#: Pieces the server sends at a time.
PIECE = 1 << 16


def nothing(_done: int, _all: int) -> None:
    """Progress that nobody wants."""


class Store:
    """An HTTP server over a directory, with faults by the file's name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked: Counter[str] = Counter()
        #: How often the connection still breaks in the middle of a file.
        self.breaks: Counter[str] = Counter()
        #: Files that stop in the middle until the event is set.
        self.stalls: dict[str, asyncio.Event] = {}
        #: Files that answer with this status.
        self.status: dict[str, int] = {}
        #: Files that never end.
        self.endless: set[str] = set()
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.asked[name] += request.method == "GET"
        if name in self.status:
            return web.Response(status=self.status[name])
        file = self.directory / name
        if not file.is_file():
            return web.Response(status=404)
        content = file.read_bytes()
        if name in self.endless:
            response = web.StreamResponse()
            await response.prepare(request)
            while True:  # until the client hangs up
                await response.write(bytes(PIECE))
        headers = {"Content-Length": str(len(content)), "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        half = len(content) // 2
        await response.write(content[:half])
        if self.breaks[name]:
            self.breaks[name] -= 1
            assert request.transport is not None
            request.transport.abort()
            return response
        if name in self.stalls:
            await self.stalls[name].wait()
        await response.write(content[half:])
        return response

    def publish(self, path: str = "13", *, digests: bool = True, version: int = 13, generation: int = 0) -> Policy:
        """The policy of a directory, with its files as they are now."""
        root = self.directory / path
        files = [file for file in sorted(root.rglob("*")) if file.is_file()]
        return Policy(
            version=version,
            generation=generation,
            run="r",
            checkpoint=f"{self.url}/{path}",
            files=tuple(described(file, root, digests) for file in files),
        )


def described(file: Path, root: Path, digests: bool = True) -> SourceFile:
    content = file.read_bytes()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}" if digests else ""
    return SourceFile(str(file.relative_to(root)), len(content), digest)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(tmp_path / "store")
    app = web.Application()
    app.router.add_get("/{name:.+}", store.answer)
    # A handler that waits for an event ends with its connection.
    async with TestServer(app, handler_cancellation=True) as server:
        store.url = str(server.make_url("")).rstrip("/")
        make_base(store.directory / "13", {WEIGHT: random(400, 300)}, {"model.norm.weight": random(30, 30)})
        yield store


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    patience = Patience(attempts=3, backoff=ConstantBackoff(0.0), stall_s=5.0)
    return Stage(tmp_path / "staged", roots=(), budget_bytes=10_000_000, patience=patience)


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != MARKER
    }


def exists(path: str) -> bool:
    return Path(path).is_dir()


def left_in(stage: Stage) -> set[str]:
    """Names in the stage's directory, less the lock's."""
    directory = stage.shelf.directory
    return {path.name for path in directory.iterdir()} - {".lock"} if directory.exists() else set()


async def test_a_remote_source_is_fetched_whole(store: Store, stage: Stage) -> None:
    told: list[tuple[int, int]] = []
    policy = store.publish()
    path = await stage.fetch(policy, lambda *now: told.append(now))
    assert contents(Path(path)) == contents(store.directory / "13")
    size = sum(file.size for file in policy.files)
    await until(lambda: told[-1] == (size, size))
    assert told == sorted(told)
    assert Path(path).parent == stage.shelf.directory
    assert Path(path).name.startswith("13-")


async def test_a_restarted_host_fetches_nothing_again(store: Store, stage: Stage, tmp_path: Path) -> None:
    path = await stage.fetch(store.publish(), nothing)
    asked = Counter(store.asked)
    again = Stage(tmp_path / "staged", roots=(), budget_bytes=10_000_000)
    assert await again.fetch(store.publish(), nothing) == path
    assert store.asked == asked


async def test_a_broken_connection_is_tried_again(store: Store, stage: Stage) -> None:
    store.breaks["13/model-00001-of-00002.safetensors"] = 2
    path = await stage.fetch(store.publish(), nothing)
    assert contents(Path(path)) == contents(store.directory / "13")
    assert store.asked["13/model-00001-of-00002.safetensors"] == 3


async def test_a_source_that_always_breaks_may_work_later(store: Store, stage: Stage) -> None:
    """And then only what was missing is fetched."""
    broken = "13/model-00001-of-00002.safetensors"
    store.breaks[broken] = 99
    with pytest.raises(EngineUnavailable, match=r"cannot fetch model-00001.* from http.*3 times"):
        await stage.fetch(store.publish(), nothing)
    store.breaks.clear()
    (partial,) = (stage.shelf.directory / name for name in left_in(stage))
    there = contents(partial).keys()
    assert not any(name.endswith(".part") for name in there)
    asked = Counter(store.asked)
    path = await stage.fetch(store.publish(), nothing)
    assert contents(Path(path)) == contents(store.directory / "13")
    fetched_again = (store.asked - asked).keys()
    assert broken in fetched_again
    assert fetched_again == {f"13/{name}" for name in contents(store.directory / "13").keys() - there}


async def test_a_server_that_is_gone_may_come_back(store: Store, stage: Stage) -> None:
    policy = store.publish().model_copy(update={"checkpoint": "http://127.0.0.1:1/13"})
    with pytest.raises(EngineUnavailable, match="see that this host reaches it"):
        await stage.fetch(policy, nothing)


async def test_a_transfer_that_stands_still_is_begun_again(store: Store, tmp_path: Path) -> None:
    stalled = "13/model-00001-of-00002.safetensors"
    store.stalls[stalled] = asyncio.Event()
    stage = Stage(tmp_path / "s", roots=(), patience=Patience(attempts=2, backoff=ConstantBackoff(0.0), stall_s=0.5))
    with pytest.raises(EngineUnavailable, match="nothing came"):
        await stage.fetch(store.publish(), nothing)
    assert store.asked[stalled] == 2


@pytest.mark.parametrize("change", ["other bytes", "fewer", "more"])
async def test_a_file_that_was_changed_is_refused_by_name(store: Store, stage: Stage, change: str) -> None:
    policy = store.publish()
    file = store.directory / "13" / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes({"other bytes": content, "fewer": content[:-1], "more": content * 2}[change])
    with pytest.raises(PolicyRejected, match=r"model-00001-of-00002.safetensors at http.* is not what was published"):
        await stage.fetch(policy, nothing)
    assert not left_in(stage)
    assert store.asked["13/model-00001-of-00002.safetensors"] == 2


async def test_a_file_that_grew_without_end_does_not_fill_the_disk(store: Store, stage: Stage) -> None:
    policy = store.publish()
    store.endless.add("13/config.json")
    with pytest.raises(PolicyRejected, match=r"config.json at http.* more than the \d+ bytes that were published"):
        await stage.fetch(policy, nothing)
    assert not left_in(stage)


@pytest.mark.parametrize("kind", ["md5", "etag"])
async def test_digests_that_only_the_store_knew_are_compared(store: Store, stage: Stage, kind: str) -> None:
    made = {"md5": hashlib.md5, "etag": hashlib.sha1}[kind]  # the server's own tag is a sha1
    policy = store.publish()
    root = store.directory / "13"
    files = [
        file._replace(digest=f"{kind}:{made((root / file.name).read_bytes()).hexdigest()}") for file in policy.files
    ]
    policy = policy.model_copy(update={"files": tuple(files)})
    config = root / "config.json"
    was = config.read_bytes()
    config.write_bytes(was[:-1] + b" ")
    with pytest.raises(PolicyRejected, match=rf"config.json at http.* {kind}"):
        await stage.fetch(policy, nothing)
    config.write_bytes(was)
    assert contents(Path(await stage.fetch(policy, nothing))) == contents(root)


async def test_a_file_that_is_missing_is_refused_by_name(store: Store, stage: Stage) -> None:
    policy = store.publish()
    (store.directory / "13" / "config.json").unlink()
    with pytest.raises(PolicyRejected, match=r"13 is not whole: config.json"):
        await stage.fetch(policy, nothing)
    assert not left_in(stage)


async def test_a_source_this_host_may_not_read_is_named(store: Store, stage: Stage) -> None:
    store.status["13/config.json"] = 403
    with pytest.raises(EngineUnavailable, match=r"may not read config.json at http"):
        await stage.fetch(store.publish(), nothing)
    assert store.asked["13/config.json"] == 1


async def test_a_name_that_leads_out_of_its_source_is_refused(store: Store, stage: Stage, tmp_path: Path) -> None:
    (store.directory / "outside").write_text("x")
    for name in ("../outside", "/etc/passwd", "a/../../outside", ".rollpool.json"):
        policy = store.publish().model_copy(update={"files": (SourceFile(name, 1),)})
        with pytest.raises(PolicyRejected, match="not one within its source"):
            await stage.fetch(policy, nothing)
    assert not left_in(stage)


async def test_sources_outside_the_roots_are_refused(store: Store, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "staged", roots=(str(tmp_path / "allowed"), f"{store.url}/allowed"))
    local = Policy(version=1, run="r", checkpoint=str(make_base(tmp_path / "elsewhere")))
    for policy in (store.publish(), local):
        with pytest.raises(PolicyRejected):
            await stage.fetch(policy, nothing)
    assert not store.asked
    make_base(store.directory / "allowed" / "1")
    inside = make_base(tmp_path / "allowed" / "1")
    assert await stage.fetch(local.model_copy(update={"checkpoint": str(inside)}), nothing) == str(inside)
    assert exists(await stage.fetch(store.publish("allowed/1"), nothing))


async def test_two_at_once_fetch_once(store: Store, stage: Stage, tmp_path: Path) -> None:
    """Two calls of one host, and another host on the same machine."""
    other = Stage(tmp_path / "staged", roots=(), budget_bytes=10_000_000)
    stalled = "13/model-00001-of-00002.safetensors"
    store.stalls[stalled] = asyncio.Event()
    calls = [asyncio.create_task(each.fetch(store.publish(), nothing)) for each in (stage, stage, other)]
    await until(lambda: store.asked[stalled])
    store.stalls[stalled].set()
    paths = await asyncio.gather(*calls)
    assert len(set(paths)) == 1
    assert set(store.asked.values()) == {1}


async def test_cancelling_ends_soon_and_leaves_nothing_half_done(store: Store, stage: Stage) -> None:
    stalled = "13/model-00001-of-00002.safetensors"
    store.stalls[stalled] = asyncio.Event()
    call = asyncio.create_task(stage.fetch(store.publish(), nothing))
    await until(lambda: store.asked[stalled])
    call.cancel()
    async with asyncio.timeout(4.0):  # the server says nothing; only the cancelling can end it
        with pytest.raises(asyncio.CancelledError):
            await call
    assert not any(path.name.endswith(".part") for path in stage.shelf.directory.rglob("*"))
    assert all(name.endswith(".partial") for name in left_in(stage))
    store.stalls[stalled].set()
    path = await stage.fetch(store.publish(), nothing)
    assert contents(Path(path)) == contents(store.directory / "13")


async def test_a_process_that_is_killed_leaves_nothing_that_passes_as_whole(store: Store, stage: Stage) -> None:
    """And what it had fetched whole is not fetched again."""
    policy = store.publish()
    stalled = "13/model-00001-of-00002.safetensors"
    store.stalls[stalled] = asyncio.Event()
    script = (
        "import asyncio, sys; from pathlib import Path; from rollpool.schemas import Policy\n"
        "from rollpool.worker.sources import Stage\n"
        "stage = Stage(Path(sys.argv[1]), roots=())\n"
        "policy = Policy.model_validate_json(sys.argv[2], strict=False)\n"
        "asyncio.run(stage.fetch(policy, lambda done, all: None))\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(stage.shelf.directory), policy.model_dump_json()
    )
    others = {f"13/{file.name}" for file in policy.files} - {stalled}
    (partial,) = await there(lambda: list(stage.shelf.directory.glob("*.partial")))
    await until(lambda: store.asked[stalled] and {f"13/{name}" for name in contents(partial)} > others)
    process.kill()
    await process.wait()
    assert left_in(stage) == {partial.name}
    store.stalls[stalled].set()
    path = await stage.fetch(policy, nothing)
    assert contents(Path(path)) == contents(store.directory / "13")
    assert {name for name, times in store.asked.items() if times > 1} == {stalled}


async def there(look: Callable[[], list[Path]]) -> list[Path]:
    await until(look)
    return look()


async def test_the_loop_is_free_meanwhile(store: Store, stage: Stage) -> None:
    """The server answers in this very loop."""
    stalled = "13/model-00001-of-00002.safetensors"
    store.stalls[stalled] = asyncio.Event()
    call = asyncio.create_task(stage.fetch(store.publish(), nothing))
    await until(lambda: store.asked[stalled])
    for _ in range(100):
        await asyncio.sleep(0)
    store.stalls[stalled].set()
    await call


async def test_what_is_not_kept_makes_room(store: Store, tmp_path: Path) -> None:
    for version in ("14", "15"):
        make_base(store.directory / version, {WEIGHT: random(400, 300, int(version))})
    size = sum(file.size for file in store.publish("14").files)
    stage = Stage(tmp_path / "staged", roots=(), budget_bytes=2 * size)
    first = await stage.fetch(store.publish("14"), nothing)
    stage.keep([first])
    make_base(store.directory / "16", {WEIGHT: random(900, 300)})
    with pytest.raises(PolicyRejected, match=r"policy 13 from http.* does not fit .* are in use \(14-"):
        await stage.fetch(store.publish("16"), nothing)
    second = await stage.fetch(store.publish("15"), nothing)
    make_base(store.directory / "17", {WEIGHT: random(400, 300, 17)})
    stage.keep([second])
    third = await stage.fetch(store.publish("17"), nothing)
    assert [exists(path) for path in (first, second, third)] == [False, True, True]


async def test_a_source_published_anew_without_digests_is_another(store: Store, stage: Stage) -> None:
    """Same place, same sizes: only the policy tells them apart."""
    first = await stage.fetch(store.publish(digests=False), nothing)
    file = store.directory / "13" / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    second = await stage.fetch(store.publish(digests=False, generation=1), nothing)
    assert first != second
    assert contents(Path(second)) == contents(store.directory / "13")


async def test_a_remote_source_of_which_nothing_was_published_is_looked_at(store: Store, stage: Stage) -> None:
    bare = store.publish().model_copy(update={"files": (), "checkpoint": f"memory://{store.directory.name}/13"})
    memory = fsspec.filesystem("memory")
    for name, content in contents(store.directory / "13").items():
        memory.pipe(f"/{store.directory.name}/13/{name}", content)
    path = await stage.fetch(bare, nothing)
    assert contents(Path(path)) == contents(store.directory / "13")


async def test_a_local_source_is_verified_where_it_is(store: Store, stage: Stage) -> None:
    told: list[tuple[int, int]] = []
    local = store.publish().model_copy(update={"checkpoint": str(store.directory / "13")})
    assert await stage.fetch(local, lambda *now: told.append(now)) == str(store.directory / "13")
    await until(lambda: told[-1] == (told[-1][1], sum(file.size for file in local.files)))
    assert not left_in(stage)
    file = store.directory / "13" / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(PolicyRejected, match=r"model-00001-of-00002\.safetensors in .* its sha256"):
        await stage.fetch(local, nothing)
    file.unlink()
    with pytest.raises(PolicyRejected, match=r"not whole: model-00001-of-00002\.safetensors"):
        await stage.fetch(local, nothing)


async def test_where_only_sizes_were_published_they_count(store: Store, stage: Stage) -> None:
    remote = store.publish(digests=False)
    config = store.directory / "13" / "config.json"
    config.write_bytes(config.read_bytes()[:-1])
    for source in (str(store.directory / "13"), f"{store.url}/13"):
        with pytest.raises(PolicyRejected, match=r"config.json .* it has \d+ bytes, \d+ were published"):
            await stage.fetch(remote.model_copy(update={"checkpoint": source}), nothing)


async def test_a_local_source_of_which_nothing_was_published_is_looked_at(stage: Stage, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {WEIGHT: random(2, 2)}, {"model.norm.weight": random(2, 2)})
    policy = Policy(version=1, run="r", checkpoint=str(base))
    assert await stage.fetch(policy, nothing) == str(base)
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(PolicyRejected, match="model-00002-of-00002"):
        await stage.fetch(policy, nothing)


async def test_a_server_that_is_gone_is_not_the_sources_fault(stage: Stage) -> None:
    """Also where nothing was published of the source, and it has to be looked at first."""
    with pytest.raises(EngineUnavailable, match="cannot read"):
        await stage.fetch(Policy(version=1, run="r", checkpoint="http://127.0.0.1:1/13"), nothing)


async def test_a_remote_source_that_is_not_whole_is_refused(store: Store, stage: Stage) -> None:
    (store.directory / "13" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(PolicyRejected, match="model-00002-of-00002"):
        await stage.fetch(store.publish().model_copy(update={"files": ()}), nothing)


async def test_a_directory_that_is_not_here_may_come(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"no directory .* mounted"):
        await stage.fetch(Policy(version=1, run="r", checkpoint=str(tmp_path / "none")), nothing)


async def test_a_name_on_the_hub_is_left_to_the_engine(stage: Stage) -> None:
    assert await stage.fetch(Policy(version=1, run="r", checkpoint="Qwen/Qwen3-0.6B"), nothing) == "Qwen/Qwen3-0.6B"


async def test_a_name_on_the_hub_is_outside_the_roots(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "staged", roots=(str(tmp_path),))
    with pytest.raises(PolicyRejected, match="name on the hub"):
        await stage.fetch(Policy(version=1, run="r", checkpoint="Qwen/Qwen3-0.6B"), nothing)


async def test_a_disk_that_cannot_be_read_is_not_the_sources_fault(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise PolicyRejected("cannot read config.json: Stale file handle") from OSError("Stale file handle")

    monkeypatch.setattr("rollpool.worker.sources.stage.inventory", broken)
    with pytest.raises(EngineUnavailable, match="Stale file handle"):
        await stage.fetch(Policy(version=1, run="r", checkpoint=str(tmp_path)), nothing)


async def test_a_url_nothing_here_reads_says_so(stage: Stage) -> None:
    policy = Policy(version=1, run="r", checkpoint="nosuch://a/b", files=(SourceFile("config.json", 1),))
    with pytest.raises((EngineUnavailable, PolicyRejected), match="nosuch"):
        await stage.fetch(policy, nothing)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path / "staged", roots=(), budget_bytes=10_000_000)


def adapter_policy(path: Path, version: int = 14) -> Policy:
    return Policy(
        version=version, run="r", lora_path=str(path), files=tuple(described(f, path) for f in path.iterdir())
    )


async def test_an_adapter_is_merged_once(sources: Sources, tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    policy = adapter_policy(adapter)
    staged = await sources.stage(policy, nothing)
    merged = Path(await sources.merge(str(base), policy, staged))
    assert merged.parent == tmp_path / "staged"
    weights = merged / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert await sources.merge(str(base), policy, staged) == str(merged)
    assert weights.stat().st_mtime_ns == made
    assert weights.read_bytes() != (base / "model.safetensors").read_bytes()
    assert json.loads((merged / "config.json").read_text()) == {"tie_word_embeddings": False}


async def test_another_adapter_or_base_is_another_merge(sources: Sources, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one = make_adapter(tmp_path / "one")
    two = make_adapter(tmp_path / "two", {LORA_A: random(2, 4, 8), LORA_B: random(6, 2, 9)})
    other = make_base(tmp_path / "other", {WEIGHT: np.zeros((6, 4), np.float32)})
    merges = [
        await sources.merge(str(at), adapter_policy(adapter), str(adapter))
        for at, adapter in ((base, one), (base, two), (other, one))
    ]
    assert len({(Path(path) / "model.safetensors").read_bytes() for path in merges}) == 3


async def test_an_adapter_that_does_not_fit_leaves_nothing(sources: Sources, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {WEIGHT: np.full((6, 4), np.nan, np.float32)})
    adapter = make_adapter(tmp_path / "adapter")
    with pytest.raises(PolicyRejected, match="not finite"):
        await sources.merge(str(base), adapter_policy(adapter), str(adapter))
    assert [path.name for path in (tmp_path / "staged").iterdir()] == [".lock"]


async def test_a_cancelled_merge_leaves_nothing(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()

    def slow(plan: MergePlan, out: Path, on_progress: OnProgress) -> None:
        begun.set()
        assert may_go_on.wait(60)
        carry_out(plan, out, on_progress)

    monkeypatch.setattr("rollpool.worker.sources.store.carry_out", slow)
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    call = asyncio.create_task(sources.merge(str(base), adapter_policy(adapter), str(adapter)))
    await until(begun.is_set)
    call.cancel()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert [path.name for path in (tmp_path / "staged").iterdir()] == [".lock"]
    assert exists(await sources.merge(str(base), adapter_policy(adapter), str(adapter)))


async def test_verifying_ends_with_the_first_wrong_file(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others, which may be large, are not read to their ends."""

    def endless(path: Path, file: SourceFile, on_bytes: Callable[[int], None]) -> None:
        if file.name == "wrong":
            raise WrongFile("it has 2 bytes, 1 were published")
        while True:
            on_bytes(0)
            time.sleep(0.01)

    monkeypatch.setattr("rollpool.worker.sources.stage.check_file", endless)
    files = tuple(SourceFile(name, 1) for name in ("a", "wrong", "b"))
    with pytest.raises(PolicyRejected, match=r"wrong in .* is not what was published: it has 2 bytes"):
        await stage.fetch(Policy(version=1, run="r", checkpoint=str(tmp_path), files=files), nothing)


async def test_merged_checkpoints_share_the_budget(store: Store, tmp_path: Path) -> None:
    policy = store.publish()
    size = sum(file.size for file in policy.files)
    sources = Sources(tmp_path / "staged", roots=(), budget_bytes=2 * size)
    base = await sources.stage(policy, nothing)
    wide = make_adapter(tmp_path / "adapter", {LORA_A: random(2, 300), LORA_B: random(400, 2)})
    merged = await sources.merge(base, adapter_policy(wide, 14), str(wide))
    sources.keep([merged])
    again = make_adapter(tmp_path / "again", {LORA_A: random(2, 300, 5), LORA_B: random(400, 2)})
    with pytest.raises(PolicyRejected, match="does not fit"):  # the base is needed, the first merge is kept
        await sources.merge(base, adapter_policy(again, 15), str(again))
    sources.keep([])
    assert exists(await sources.merge(base, adapter_policy(again, 15), str(again)))
    assert not exists(merged)


async def test_a_base_that_is_not_here_is_named(sources: Sources, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    with pytest.raises(EngineUnavailable, match=r"base no/such-model is not on this host"):
        await sources.merge("no/such-model", adapter_policy(adapter), str(adapter))
