"""All that a host has of policies: what the owner of its engine asks for.

Invariant: a merged checkpoint is a function of the base and the adapter that it is named for, and shares the stage's
directory, budget and promises.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download

from rollpool.schemas import EngineUnavailable, Policy
from rollpool.worker.engines.protocol import OnProgress
from rollpool.worker.sources.merge import carry_out, plan_merge
from rollpool.worker.sources.shelf import MARKER
from rollpool.worker.sources.stage import Stage, named
from rollpool.worker.sources.working import Meter, Stop, in_thread, on_loop


class Sources:
    """Stages, merges, and makes room.

    Args:
        directory: of what is fetched and merged; a local disk.
        roots: directories and URLs that sources may be under; empty: any.
        budget_bytes: of the directory; 0: what its disk has, less a tenth.
    """

    def __init__(self, directory: Path, *, roots: tuple[str, ...], budget_bytes: int) -> None:
        self._stage = Stage(directory, roots=roots, budget_bytes=budget_bytes)

    async def stage(self, policy: Policy, on_progress: OnProgress) -> str:
        """A policy's own files on this host: see `Stage.fetch`."""
        return await self._stage.fetch(policy, on_progress)

    def keep(self, paths: Iterable[str]) -> None:
        """The staged and merged directories that are in use; others may make room for the next."""
        self._stage.keep(paths)

    async def merge(
        self, base: str, policy: Policy, adapter: str, on_progress: OnProgress = lambda _done, _all: None
    ) -> str:
        """Merge a staged adapter into a staged base, or find it merged.

        Args:
            base: directory of the base, or its name on the hub when its files are in the hub's cache.
            policy: the adapter's.
            adapter: its directory.
            on_progress: told bytes written and bytes in all.

        Returns:
            The directory of the merged checkpoint.

        Raises:
            PolicyRejected: the adapter does not fit the base, cannot be merged exactly, or there is no room.
            EngineUnavailable: the disk does not take it, or the base is not on this host.
        """
        tell = on_loop(on_progress)
        path = await in_thread(lambda stop: self._merge(base, policy, adapter, tell, stop), undo=self._unpin)
        self._unpin(path)
        return str(path)

    def _unpin(self, path: Path) -> None:
        self._stage.shelf.unpin(path.name)

    def _merge(self, base: str, policy: Policy, adapter: str, tell: OnProgress, stop: Stop) -> Path:
        with self._stage.shelf.pinned(base, adapter):
            try:
                weights = _directory_of(base)
                plan = plan_merge(weights, Path(adapter))
                name = named(f"{policy.adapter_name}-merged", [_identity(weights), _identity(Path(adapter))])
                size = plan.bytes
            except OSError as error:
                raise EngineUnavailable(f"cannot read {base} or {adapter}: {error}; see that this host may") from error
            meter = Meter(size, tell, stop)

            def fill(folder: Path) -> None:
                _empty(folder)
                done = 0

                def advance(now: int, _: int) -> None:
                    nonlocal done
                    meter.add(now - done)
                    done = now

                carry_out(plan, folder, advance)

            what = f"policy {policy.version} of run {policy.run}, merged into {base},"
            path = self._stage.shelf.obtain(name, size, what, fill, stop)
        tell(size, size)
        return path


def _directory_of(base: str) -> Path:
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(base, local_files_only=True))
    except (OSError, ValueError) as error:
        raise EngineUnavailable(
            f"the base {base} is not on this host, so no adapter can be merged into it: publish the base from a "
            "directory, or download it here beforehand"
        ) from error


def _identity(path: Path) -> list[object]:
    """Where it is, and what tells that it was not changed since."""
    stats = ((file.relative_to(path), file.stat()) for file in sorted(path.rglob("*")) if file.is_file())
    return [str(path), *([str(name), stat.st_size, stat.st_mtime_ns] for name, stat in stats if name.name != MARKER)]


def _empty(folder: Path) -> None:
    """What an interrupted merge left is not known to be right."""
    for path in folder.iterdir():
        if path.name == MARKER:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
