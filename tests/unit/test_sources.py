"""Sources of policies: which are under the roots, which are whole, and what is recorded of them."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_checkpoints import WEIGHT, make_adapter, make_base, random, write_tensors

from rollpool.schemas import PolicyRejected, SourceFile
from rollpool.schemas.sources import Kind, check_roots, digest_matches, inventory, is_hub_name, is_remote
from rollpool.schemas.stores import told_tag

INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_base(tmp_path / "sharded", {WEIGHT: random(6, 4)}, {"model.norm.weight": random(1, 4)})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")


def names(files: tuple[SourceFile, ...]) -> set[str]:
    return {file.name for file in files}


def looked_at(source: Path | str, kind: Kind = "checkpoint") -> set[str]:
    return names(inventory(str(source), kind, digests=False))


# Where they are


@pytest.mark.parametrize(
    ("location", "remote"),
    [
        *[(f"{scheme}://bucket/a", True) for scheme in ("gs", "s3", "http", "https", "memory", "GS", "x-y")],
        *[(place, False) for place in ("/models/1", "models/1", "org/name", "file:///models/1", "FILE:///m")],
        *[("~/models", False), ("", False), ("://x", False), ("C:/models", False), ("a\n://b", False)],
    ],
)
def test_urls_are_told_from_paths(location: str, remote: bool) -> None:
    assert is_remote(location) == remote


def test_a_name_on_the_hub_is_one_only_where_no_directory_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("Qwen/Qwen3-0.6B")
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    assert not is_hub_name("Qwen/Qwen3-0.6B")
    assert not any(map(is_hub_name, ("name", "/org/name", "a/b/c", "../name", "gs://a", "org/name ", "")))


# Roots


def under(location: str, *roots: str) -> bool:
    try:
        check_roots(location, roots)
    except PolicyRejected:
        return False
    return True


@pytest.mark.parametrize(
    ("location", "root", "passes"),
    [
        ("gs://bucket/a", "gs://bucket/a", True),
        ("gs://bucket/a/b", "gs://bucket/a", True),
        ("gs://bucket/a/b", "gs://bucket/a/", True),
        ("GS://bucket/a/b/", "gs://bucket", True),
        ("https://Example.org/a", "https://example.org/", True),
        ("gs://bucket/a b", "gs://bucket", False),
        ("gs://bucket/ab", "gs://bucket/a", False),
        ("gs://bucket", "gs://bucket/a", False),
        ("gs://bucket2/a", "gs://bucket", False),
        ("s3://bucket/a", "gs://bucket", False),
        ("memory://A/x", "memory://a", False),
        ("https://example.org.evil/a", "https://example.org", False),
        ("https://example.org@evil/a", "https://example.org", False),
        ("https://user@example.org/a", "https://example.org", False),
        ("https://example.org:444/a", "https://example.org", False),
        ("gs://bucket/a/../b", "gs://bucket/a", False),
        ("gs://bucket/a/..", "gs://bucket/a", False),
        ("https://h/a/%2e%2e/b", "https://h/a", False),
        ("https://h/a/%252E./b", "https://h/a", False),
        ("https://h/a/..%2fb", "https://h/a", False),
        ("https://h/a/..%5cb", "https://h/a", False),
        ("https://h/a\\..\\b", "https://h/a", False),
        ("https://h/a?/../../b", "https://h/a", False),
        ("https://h/a#b", "https://h/a", False),
        ("gs://bucket/a::file:///etc", "gs://bucket/a", False),
        ("gs:///bucket/a", "gs://bucket", False),
        ("/bucket/a", "gs://bucket", False),
        ("gs://bucket/a", "/", False),
        ("org/name", "/", False),
        ("~nobody-of-this-name/x", "/", True),
    ],
)
def test_only_what_is_under_a_root_passes(
    location: str, root: str, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert under(location, root) == passes
    assert under(location, "/no/such/root", root) == passes
    assert under(location)


def test_paths_are_compared_where_they_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside, link = tmp_path / "models", tmp_path / "models-of-others", tmp_path / "link"
    (inside / "1").mkdir(parents=True)
    outside.mkdir()
    (inside / "away").symlink_to(outside)
    (inside / "circle").symlink_to(inside / "circle")
    link.symlink_to(inside)
    root = str(inside)
    for good in (inside, inside / "1", inside / "not yet", link / "1", f"file://{inside}/1", outside / ".." / "models"):
        assert under(str(good), root), good
        assert under(str(good), str(link)), good
    for bad in (
        outside,
        inside / "away",
        inside / "1" / ".." / "..",
        inside / "..",
        f"file://{outside}",
        "\0",
        tmp_path,
    ):
        assert not under(str(bad), root), bad
    monkeypatch.chdir(inside)
    assert under("1", root)
    assert not under("../models-of-others", root)
    with pytest.raises(PolicyRejected, match="hub"):
        check_roots("org/name", [root])


segments = st.sampled_from(
    ["a", "b", "..", ".", "", "%2e%2e", "%2E.", "a%2f..", "%252e%252e", "..%5c", "a?", "#", "\\", "::"]
)


def resolved(url: str) -> PurePosixPath:
    """Where the most obliging of servers would look: everything is decoded, and every way of writing `..` works."""
    from urllib.parse import unquote

    path = url.partition("://")[2]
    while (decoded := unquote(path)) != path:
        path = decoded
    found: list[str] = []
    for name in path.replace("\\", "/").replace("?", "/").replace("#", "/").replace("::", "/").split("/"):
        if name == "..":
            found = found[:-1]
        elif name not in ("", "."):
            found.append(name)
    return PurePosixPath(*found)


@given(st.lists(segments, max_size=6), st.sampled_from(["a", "a/b", "a/a/b"]))
def test_no_url_passes_that_any_reader_could_take_elsewhere(parts: list[str], root: str) -> None:
    location = "https://host/" + "/".join(parts)
    if under(location, f"https://host/{root}"):
        assert resolved(location).is_relative_to(f"host/{root}")


@pytest.fixture(scope="session")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with links that lead out of it."""
    root = tmp_path_factory.mktemp("maze") / "models"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "link").symlink_to(root.parent)
    (root / "up").symlink_to("..")
    return root


@given(made=st.lists(st.sampled_from(["a", "b", "..", ".", "", "link", "up", "models"]), max_size=6))
def test_no_path_passes_that_leads_outside(made: list[str], maze: Path) -> None:
    location = "/".join([str(maze), *made])
    leads_to = os.path.realpath(location)
    assert under(location, str(maze)) == f"{leads_to}/".startswith(f"{os.path.realpath(maze)}/")


# What is whole


def test_a_checkpoint_is_what_engines_and_tokenizers_read_of_it(base: Path) -> None:
    for name in ("generation_config.json", "chat_template.jinja", "merges.txt"):
        (base / name).write_text("{}")
    for name in ("README.md", "optimizer.pt", "modeling.py", "pytorch_model.bin"):
        (base / name).write_text("not for hosts")
    assert looked_at(base) == {
        *("config.json", "model.safetensors", "tokenizer.json"),
        *("generation_config.json", "chat_template.jinja", "merges.txt"),
    }


def test_a_sharded_checkpoint_is_its_index_and_every_shard(sharded: Path) -> None:
    shards = {f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2)}
    assert looked_at(sharded) == {"config.json", "tokenizer.json", INDEX, *shards}


def test_an_adapter_is_its_config_and_its_weights(adapter: Path) -> None:
    (adapter / "README.md").write_text("x")
    assert looked_at(adapter, "adapter") == {"adapter_config.json", "adapter_model.safetensors"}


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count] if count >= 0 else path.read_bytes() + b"\0" * -count)


WEIGHTS = "model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda base: (base / "config.json").unlink(), r"config\.json is missing: a checkpoint is"),
    "half a config": (lambda base: cut(base / "config.json", 9), r"config\.json is not whole JSON"),
    "a config that is a list": (lambda base: (base / "config.json").write_text("[]"), "not a JSON object but list"),
    "no weights": (lambda base: (base / WEIGHTS).unlink(), "safetensors alone"),
    "empty weights": (lambda base: cut(base / WEIGHTS, 0), "has 0 bytes and no whole safetensors header"),
    "half a header": (lambda base: cut(base / WEIGHTS, 60), "no whole safetensors header"),
    "weights cut short": (lambda base: cut(base / WEIGHTS, 300), "has 300 bytes where its header says"),
    "weights too long": (lambda base: cut(base / WEIGHTS, -1), "still being written, or was cut"),
    "no JSON in the header": (
        lambda base: (base / WEIGHTS).write_bytes(b"\x04" + b"\0" * 7 + b"abcd"),
        "the header of .* is not whole JSON",
    ),
    "half a tokenizer": (lambda base: cut(base / "tokenizer.json", 5), r"tokenizer\.json is not whole JSON"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_checkpoint_that_is_not_whole_is_refused_by_what_is_missing(how: str, base: Path) -> None:
    breaking, why = BROKEN[how]
    breaking(base)
    with pytest.raises(PolicyRejected, match=why):
        looked_at(base)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": {"data_offsets": [0, 4]}, "b": {"data_offsets": [5, 8]}}, "leaves holes"),
        ({"a": {"data_offsets": [0, 4]}, "b": {"data_offsets": [2, 8]}}, "over one another"),
        ({"a": {"data_offsets": [0, 8]}, "b": {"data_offsets": [8, 4]}}, "over one another"),
        ({"a": {"data_offsets": [0]}}, "without data_offsets"),
        ({"a": {"data_offsets": ["0", True]}}, "without data_offsets"),
        ({"a": 1}, "without data_offsets"),
    ],
    ids=str,
)
def test_a_header_that_makes_no_sense_is_refused(header: Any, why: str, base: Path) -> None:
    text = json.dumps(header).encode()
    (base / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(PolicyRejected, match=why):
        looked_at(base)


def test_every_length_but_the_right_one_is_found(base: Path) -> None:
    whole = (base / WEIGHTS).read_bytes()
    for length in range(len(whole)):
        (base / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(PolicyRejected):
            looked_at(base)


@pytest.mark.parametrize(
    ("breaking", "why"),
    [
        (lambda base: (base / "model-00002-of-00002.safetensors").unlink(), "1 of 2 shards"),
        (lambda base: cut(base / "model-00002-of-00002.safetensors", -8), "still being written"),
        (lambda base: (base / INDEX).write_text("{}"), "no weight_map"),
        (
            lambda base: rewrite(base / INDEX, lambda index: {"weight_map": {"a": "../../etc/x.safetensors"}}),
            "beside its index",
        ),
        (lambda base: rewrite(base / INDEX, lambda index: {"weight_map": {"a": "model.bin"}}), "beside its index"),
        (
            lambda base: write_tensors(base / "model-00001-of-00002.safetensors", {"other": random(1, 1)}),
            "lacks .*q_proj.* different saves",
        ),
    ],
    ids=["missing", "half", "no map", "a path", "no safetensors", "of another save"],
)
def test_shards_are_all_there_and_of_one_save(breaking: Callable[[Path], object], why: str, sharded: Path) -> None:
    breaking(sharded)
    with pytest.raises(PolicyRejected, match=why):
        looked_at(sharded)


def test_a_tokenizer_comes_along_where_there_is_one(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    assert looked_at(base) == {"config.json", "model.safetensors"}, "prompts of token ids need none"
    for name in ("tokenizer_config.json", "vocab.json"):
        (base / name).write_text("{}")
    (base / "merges.txt").write_text("a b")
    assert {"tokenizer_config.json", "vocab.json", "merges.txt"} < looked_at(base)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"peft_type": "IA3"}, "adapters are LORA"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"target_modules": []}, "target_modules"),
    ],
    ids=str,
)
def test_an_adapter_that_is_no_lora_is_refused(config: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyRejected, match=why):
        looked_at(make_adapter(tmp_path / "made", **config), "adapter")


def test_an_adapter_without_weights_is_refused(adapter: Path) -> None:
    cut(adapter / "adapter_model.safetensors", -1)
    with pytest.raises(PolicyRejected, match="still being written"):
        looked_at(adapter, "adapter")
    write_tensors(adapter / "adapter_model.safetensors", {})
    with pytest.raises(PolicyRejected, match="holds no tensor"):
        looked_at(adapter, "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(PolicyRejected, match="is missing"):
        looked_at(adapter, "adapter")


def test_one_kind_in_the_place_of_the_other_is_named(base: Path, adapter: Path) -> None:
    with pytest.raises(PolicyRejected, match="give an adapter as lora_path"):
        looked_at(adapter)
    with pytest.raises(PolicyRejected, match="give a checkpoint as checkpoint"):
        looked_at(base, "adapter")


def test_what_is_no_directory_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyRejected, match=r"nothing at this path .* check=False"):
        looked_at(tmp_path / "none")
    with pytest.raises(PolicyRejected, match="a file at this path"):
        looked_at(base / WEIGHTS)


def test_a_name_on_the_hub_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert inventory("org/name", "checkpoint", digests=True) == ()
    with pytest.raises(PolicyRejected, match="name on the hub"):
        inventory("org/name", "checkpoint", digests=True, roots=["/models"])


def test_a_file_that_is_a_link_to_the_outside_is_refused(base: Path, tmp_path: Path) -> None:
    roots = [str(base)]
    assert inventory(str(base), "checkpoint", digests=False, roots=roots)
    (base / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (base / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(PolicyRejected, match=r"tokenizer\.json is outside"):
        inventory(str(base), "checkpoint", digests=False, roots=roots)
    assert inventory(str(base), "checkpoint", digests=False, roots=[str(tmp_path)])


# Digests


def test_each_file_is_recorded_with_its_size_and_sha256(sharded: Path) -> None:
    told: list[tuple[int, int]] = []
    files = inventory(str(sharded), "checkpoint", digests=True, on_progress=lambda done, of: told.append((done, of)))
    for file in files:
        content = (sharded / file.name).read_bytes()
        assert file == (file.name, len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")
        assert digest_matches(sharded / file.name, file)
    total = sum(file.size for file in files)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert inventory(f"file://{sharded}", "checkpoint", digests=True) == files


def test_a_file_that_grows_while_it_is_read_is_refused(base: Path) -> None:
    def grow(done: int, total: int) -> None:
        with (base / "tokenizer.json").open("ab") as file:
            file.write(b" ")

    with pytest.raises(PolicyRejected, match="is being written"):
        inventory(str(base), "checkpoint", digests=True, on_progress=grow)


@pytest.mark.parametrize(
    ("digest", "matches"),
    [
        (f"sha256:{hashlib.sha256(b'abc').hexdigest()}", True),
        (f"md5:{hashlib.md5(b'abc').hexdigest()}", True),
        (f"sha256:{hashlib.sha256(b'abd').hexdigest()}", False),
        ("crc32c:NkMBfg==", None),
        ("etag:xyz", None),
        ("", None),
    ],
)
def test_a_copy_is_compared_by_what_can_be_computed(digest: str, matches: bool | None, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(b"abc")
    assert digest_matches(copy, SourceFile("copy", 3, digest)) is matches
    assert digest_matches(copy, SourceFile("copy", 4, digest)) is False
    assert digest_matches(tmp_path / "none", SourceFile("none", 3, digest)) is False


@pytest.mark.parametrize(
    ("info", "tag"),
    [
        ({"md5Hash": "kAFQmDzST7DWlj99KOF/cg==", "crc32c": "x", "etag": "y"}, "md5:900150983cd24fb0d6963f7d28e17f72"),
        ({"Content-MD5": "kAFQmDzST7DWlj99KOF/cg=="}, "md5:900150983cd24fb0d6963f7d28e17f72"),
        ({"md5Hash": "not base64!", "crc32c": "NkMBfg=="}, "crc32c:NkMBfg=="),
        ({"ETag": '"0123-2"'}, "etag:0123-2"),
        ({"ETag": 'W/"0123"'}, "etag:0123"),
        ({"size": 3, "etag": None}, ""),
    ],
    ids=str,
)
def test_a_store_is_asked_for_the_best_it_knows(info: dict[str, Any], tag: str) -> None:
    assert told_tag(info) == tag


# URLs


@pytest.fixture
def memory(sharded: Path) -> Iterator[Any]:
    """A store of objects, with a checkpoint in it."""
    store = fsspec.filesystem("memory")
    store.put(str(sharded), "/bucket/13", recursive=True)
    yield store
    store.rm("/bucket", recursive=True)


def test_a_checkpoint_behind_a_url_is_looked_at_where_it_lies(memory: Any, sharded: Path) -> None:
    files = inventory("memory://bucket/13/", "checkpoint", digests=True, roots=["memory://bucket"])
    assert [(file.name, file.size) for file in files] == [
        (file.name, file.size) for file in inventory(str(sharded), "checkpoint", digests=False)
    ]
    memory.pipe("/bucket/13/model-00001-of-00002.safetensors", b"")
    with pytest.raises(PolicyRejected, match=r"memory://bucket/13/model-00001-of-00002\.safetensors has 0 bytes"):
        looked_at("memory://bucket/13")
    memory.rm("/bucket/13/tokenizer.json")
    with pytest.raises(PolicyRejected, match="memory://bucket/14: there is no such directory"):
        looked_at("memory://bucket/14")


def test_urls_that_cannot_be_read_here_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PolicyRejected, match="fsspec knows no nothing://"):
        looked_at("nothing://bucket/1")
    with pytest.raises(PolicyRejected, match="chained URLs"):
        looked_at("memory://a::file:///etc")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(PolicyRejected, match="gs:// needs gcsfs"):
        looked_at("gs://bucket/1")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(PolicyRejected, match=r"rollpool\[remote\]"):
        looked_at("memory://bucket/1")
