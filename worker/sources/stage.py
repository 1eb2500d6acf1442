"""The files of a policy, on this host.

Invariant: a path that `fetch` returns holds exactly what was published: each file has the size and the digest that the
policy says, or, of a policy that says nothing of its files, each file that such a source has is there. What is remote
is fetched into the stage's own directory; what is local is used where it is.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollpool.schemas import EngineUnavailable, Policy, PolicyRejected, SourceFile
from rollpool.schemas.sources import (
    ADAPTER_CONFIG,
    CONFIG,
    Kind,
    check_roots,
    inventory,
    is_hub_name,
    is_remote,
    local_path,
)
from rollpool.worker.engines.protocol import OnProgress
from rollpool.worker.sources.checking import WrongFile, check_file
from rollpool.worker.sources.fetching import Fetcher, Patience, local_name, unreachable
from rollpool.worker.sources.shelf import Shelf
from rollpool.worker.sources.working import Meter, Stop, for_each, in_thread, on_loop

#: The file that each kind of source has first of all.
_CONFIGS: dict[Kind, str] = {"checkpoint": CONFIG, "adapter": ADAPTER_CONFIG}

#: Files read at once: one reader of a network disk is slower than the disk.
_READ_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class _Staged:
    path: str
    #: In the stage's own directory, where it is pinned; empty: elsewhere.
    name: str = ""


class Stage:
    """Has policies' files on this host.

    Args:
        directory: of what is fetched; a local disk.
        roots: directories and URLs that sources may be under; empty: any.
        budget_bytes: of the directory; 0: what its disk has, less a tenth.
        patience: with transfers that break.
    """

    def __init__(
        self, directory: Path, *, roots: Sequence[str], budget_bytes: int = 0, patience: Patience | None = None
    ) -> None:
        self.shelf = Shelf(directory, budget_bytes)
        self._roots = tuple(roots)
        self._patience = patience or Patience()

    def keep(self, paths: Iterable[str]) -> None:
        """The staged directories that are in use; others may make room for what is staged next.

        What `fetch` returned is in use until a later call does not name it.
        """
        self.shelf.keep(paths)

    async def fetch(self, policy: Policy, on_progress: OnProgress) -> str:
        """Have a policy's own files here, whole and verified.

        Args:
            policy: its source is a directory, a URL, or a name on the hub, which is returned as it is.
            on_progress: told bytes that are there and bytes in all.

        Returns:
            The local directory.

        Raises:
            PolicyRejected: the source is outside the allowed roots, is not what was published, or does not fit.
            EngineUnavailable: it cannot be reached now; another try may help.
        """
        tell = on_loop(on_progress)
        staged = await in_thread(lambda stop: self._fetch(policy, tell, stop), undo=self._unpin)
        self._unpin(staged)
        return staged.path

    def _unpin(self, staged: _Staged) -> None:
        if staged.name:
            self.shelf.unpin(staged.name)

    def _fetch(self, policy: Policy, tell: OnProgress, stop: Stop) -> _Staged:
        source = policy.source
        check_roots(source, self._roots)
        for file in policy.files:
            # A file may be a link to one elsewhere.
            check_roots(f"{source.rstrip('/')}/{local_name(file.name)}", self._roots)
        if is_remote(source):
            return self._bring(policy, tell, stop)
        if is_hub_name(source):
            return _Staged(source)
        path = local_path(source)
        if not path.is_dir():
            raise EngineUnavailable(
                f"there is no directory {path} on this host; see that its disk is mounted here, or publish from one "
                "that is"
            )
        if policy.files:
            _verify(policy, path, tell, stop)
        else:
            self._look_at(policy)
        return _Staged(str(path))

    def _look_at(self, policy: Policy) -> tuple[SourceFile, ...]:
        """The files of a source of which nothing was published."""
        kind: Kind = "checkpoint" if policy.lora_path is None else "adapter"
        try:
            return inventory(policy.source, kind, digests=is_remote(policy.source), roots=self._roots)
        except PolicyRejected as error:
            if is_remote(policy.source) and (why := unreachable(policy.source, _CONFIGS[kind])):
                raise EngineUnavailable(
                    f"cannot read {policy.source}: {why}; see that this host reaches it, and may read it"
                ) from error
            if error.__cause__ is not None:  # not what it holds is the matter, but that it could not be read
                raise EngineUnavailable(str(error)) from error
            raise

    def _bring(self, policy: Policy, tell: OnProgress, stop: Stop) -> _Staged:
        source = policy.source
        files = policy.files or self._look_at(policy)
        name = staged_name(policy, files)
        size = sum(file.size for file in files)
        meter = Meter(size, tell, stop)

        def fill(folder: Path) -> None:
            wanted = {folder / file.name for file in files}
            for leftover in [path for path in folder.rglob("*") if path.is_file() and path not in wanted]:
                leftover.unlink()
            Fetcher(source, meter, self._patience).fetch(files, folder)

        path = self.shelf.obtain(name, size, f"policy {policy.version} from {source}", fill, stop, resumable=True)
        tell(size, size)
        return _Staged(str(path), name)


def staged_name(policy: Policy, files: Sequence[SourceFile]) -> str:
    """A name that no other content has, which people recognize.

    Files without a digest are told apart by the policy too: one that is published anew, from the same place and of the
    same size, is another.
    """
    known: list[object] = [policy.source, sorted(files)]
    if not all(file.digest for file in files):
        known += [policy.lineage, policy.version, policy.generation]
    shown = policy.source.rstrip("/").rpartition("/")[2] if policy.lora_path is None else policy.adapter_name
    return named(shown, known)


def named(shown: str, content: Sequence[object]) -> str:
    """`SHOWN-HASH`: as a directory may be called, with a hash of what is in it."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', shown).strip('.-')[:80] or 'source'}-{digest}"


def _verify(policy: Policy, path: Path, tell: OnProgress, stop: Stop) -> None:
    """Read all of a local source; this also has it in the page cache when the engine loads it."""
    meter = Meter(sum(file.size for file in policy.files), tell, stop)
    failed = Stop()

    def count(size: int) -> None:
        failed.check()
        meter.add(size)

    def check(file: SourceFile) -> None:
        try:
            check_file(path / file.name, file, count)
        except WrongFile as error:
            raise PolicyRejected(
                f"{file.name} in {path} is not what was published: {error}; publish the source anew, and do not change "
                "its files afterwards"
            ) from None
        except FileNotFoundError:
            raise PolicyRejected(
                f"{path} is not whole: {file.name}, which was published with it, is not there; publish it anew"
            ) from None
        except OSError as error:
            raise EngineUnavailable(f"cannot read {path / file.name}: {error}; see that this host may") from error

    for_each(policy.files, check, at_once=_READ_AT_ONCE, failed=failed)
