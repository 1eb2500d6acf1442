"""Publishing policies.

Invariant: within a generation of its lineage a version names one source for ever, so publishing may be repeated; no
host is told of a source that was not looked at, unless the caller said so; and a trainer that does not know that its
lineage went back publishes nothing more.
"""

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from rollpool.producer.abandoned import settle_abandoned
from rollpool.producer.lineages import Lineage, named, read_lineage, read_record, recorded
from rollpool.producer.params import ParamsSink, hf_tensors
from rollpool.producer.server import Server
from rollpool.schemas import scripts
from rollpool.schemas.commands import ChangeMode, ChangeWay, Command
from rollpool.schemas.errors import PolicyRejected, RollpoolError, SettingsError
from rollpool.schemas.policies import Policy, SourceFile
from rollpool.schemas.scripts import Answered
from rollpool.schemas.sources import Kind, check_roots, inventory, is_remote
from rollpool.schemas.wire import first_error

#: Seconds for which a run that published a checkpoint is the only one that may publish others: longer than a training
#: step, so that it keeps its turn from one to the next, and short enough that a run that died is succeeded soon.
PUBLISH_LEASE_S = 900

#: Times that a lineage may change between a look at it and the call before we give up: each time somebody else
#: published.
_TRIES = 20


class Publisher:
    """Publishes policies of one run.

    Args:
        server: of the pool.
        roots: that sources must be under; empty: any.
        sink: where a trainer's parameters are put.
    """

    def __init__(self, server: Server, roots: Sequence[str], sink: ParamsSink | None = None) -> None:
        self._server = server
        self._roots = tuple(roots)
        self._sink = sink
        #: The generation of each lineage that this object published to.
        self._known: dict[str, int] = {}

    async def publish(
        self,
        version: int,
        *,
        checkpoint: str | None,
        lora_path: str | None,
        base: str | None,
        mode: ChangeMode | None,
        way: ChangeWay,
        min_serving: int | None,
        check: bool,
    ) -> Policy:
        """See `AsyncRolloutPool.publish_policy`."""
        asked = _policy(version, self._server.run, checkpoint, lora_path, base)
        command = _command(asked, mode, way, min_serving)
        asked = await asyncio.to_thread(self._placed, asked, check)
        published = await recorded(self._server, asked.lineage, version)
        if check and (published is None or published.source != asked.source):
            asked = asked.model_copy(update={"files": await asyncio.to_thread(self._files_of, asked)})
        policy, lineage = await self._sent(command, asked)
        self._known[lineage.name] = lineage.generation
        await settle_abandoned(self._server, lineage.name, lineage.pending)
        return policy

    async def put_before(self, version: int, *others: str | None) -> str | None:
        """The checkpoint that this run published for parameters under a version; None: they are to be put now.

        Refuses what publishing would refuse, before gigabytes are written.

        Args:
            version: About to be published.
            others: Sources given beside the parameters.
        """
        sink = self._sink_for(version, others)
        asked = _policy(version, self._server.run, "params", None, None)
        known = await recorded(self._server, asked.lineage, version)
        if known is not None and known.run == asked.run and known.checkpoint and sink.holds(known.checkpoint):
            return known.checkpoint
        lineage = await read_lineage(self._server, asked.lineage)
        self.check_known(lineage)
        with self._server.doing(f"publish_policy({version})"):
            held: Any = await self._server.client.get(self._server.keys.publisher)
            left = await self._server.client.pttl(self._server.keys.publisher) if held else 0
        if held and held.decode() != asked.run:
            refuse(self._server, Answered("held", left, held.decode()), asked)
        if known is None and lineage.current is not None and version <= lineage.current:
            refuse(self._server, Answered("old", lineage.current), asked)
        return None

    def put(self, version: int, params: Any, mapping: Any) -> str:
        """Put parameters where hosts can take them up; in the caller's thread, which alone may use its arrays."""
        return self._sink_for(version, ()).put(version, hf_tensors(params, mapping))

    @property
    def checks_params(self) -> bool:
        """Whether what was put is looked at before it is published."""
        return self._sink is not None and self._sink.check

    def _sink_for(self, version: int, others: Sequence[str | None]) -> ParamsSink:
        if any(other is not None for other in others):
            raise PolicyRejected(
                f"policy {version}: params are a policy's whole source; give one of params, checkpoint and lora_path"
            )
        if self._sink is None:
            raise PolicyRejected(
                f"policy {version}: this pool was not told where to put params: RolloutPool(…, "
                "params=CheckpointFolder(…)) writes checkpoints to a folder that the hosts see, and "
                "rollpool.ops.local_pool gives a pool whose engine runs in this process"
            )
        return self._sink

    def _placed(self, policy: Policy, check: bool) -> Policy:
        """Its sources are under the roots; a directory here is named so that it is the same one everywhere."""
        check_roots(policy.source, self._roots)
        if policy.base is not None:
            check_roots(policy.base, self._roots)
        if not check or is_remote(policy.source) or not Path(policy.source).is_dir():
            return policy
        field = "checkpoint" if policy.lora_path is None else "lora_path"
        return policy.model_copy(update={field: os.path.abspath(policy.source)})  # noqa: PTH100 - links stay

    def _files_of(self, policy: Policy) -> tuple[SourceFile, ...]:
        kind: Kind = "checkpoint" if policy.lora_path is None else "adapter"
        return inventory(policy.source, kind, digests=True, roots=self._roots)

    async def _sent(self, command: Command, asked: Policy) -> tuple[Policy, Lineage]:
        for _ in range(_TRIES):
            lineage = await read_lineage(self._server, asked.lineage)
            self.check_known(lineage)
            policy = _completed(asked, lineage)
            with self._server.doing(f"publish_policy({asked.version})"):
                answer = await scripts.publish(
                    self._server.client,
                    self._server.keys,
                    command.model_copy(update={"policy": policy}),
                    lease_ms=PUBLISH_LEASE_S * 1000,
                    base_asked=asked.base is not None,
                )
            if answer.answer in ("new", "same"):
                return read_record(answer.text) or policy, lineage
            if answer.answer == "moved" or (answer.answer == "rebased" and asked.base is None):
                continue
            refuse(self._server, answer, policy)
        raise RollpoolError(
            f"publish_policy({asked.version}): others publish to pool {self._server.keys.pool!r} all along; repeat it"
        )

    def check_known(self, lineage: Lineage) -> None:
        """Refuse a lineage that went back since this object published to it."""
        known = self._known.get(lineage.name, lineage.generation)
        if known < lineage.generation:
            raise PolicyRejected(
                f"{named(lineage.name)} went back to policy {lineage.current} since this trainer published (generation "
                f"{lineage.generation}, known here {known}): load that policy and call "
                f"rollback_policy({lineage.current}) to go on from it, or end this trainer if another took its place"
            )

    def learn(self, lineage: str, generation: int) -> None:
        """This object went back itself, or was told that the lineage did."""
        self._known[lineage] = generation

    @property
    def server(self) -> Server:
        """Where it publishes."""
        return self._server


def roots_of(given: Sequence[str] | None) -> tuple[str, ...]:
    """The allowed roots of sources: as given, or from $ROLLPOOL_MODEL_ROOTS, a JSON list; none: everything is allowed.

    Raises:
        SettingsError: they are no list of strings.
    """
    roots: Any = given
    if roots is None:
        try:
            roots = json.loads(os.environ.get("ROLLPOOL_MODEL_ROOTS") or "[]")
        except ValueError:
            roots = os.environ["ROLLPOOL_MODEL_ROOTS"]
    if isinstance(roots, str) or not all(isinstance(root, str) and root for root in roots):
        raise SettingsError(
            f"model_roots (ROLLPOOL_MODEL_ROOTS): expected a list of directories and URLs, as "
            f'["/models", "gs://bucket/models"], got {roots!r}'
        )
    return tuple(roots)


def _policy(version: int, run: str, checkpoint: str | None, lora_path: str | None, base: str | None) -> Policy:
    try:
        return Policy(version=version, checkpoint=checkpoint, lora_path=lora_path, base=base, run=run)
    except ValidationError as error:
        source = checkpoint if lora_path is None else lora_path
        raise PolicyRejected(f"policy {version!r} from {source!r}: {first_error(error)}") from None


def _command(policy: Policy, mode: ChangeMode | None, way: ChangeWay, min_serving: int | None) -> Command:
    try:
        return Command(policy=policy, mode=mode, way=way, min_serving=min_serving)
    except ValidationError as error:
        raise PolicyRejected(f"policy {policy.version}: {first_error(error)}") from None


def _completed(asked: Policy, lineage: Lineage) -> Policy:
    """With what the server knows: the lineage's generation, and the base of an adapter."""
    base = asked.base
    if asked.lora_path is not None and base is None and lineage.checkpoint is not None:
        base = lineage.checkpoint.checkpoint
    return asked.model_copy(update={"generation": lineage.generation, "base": base})


def refuse(server: Server, answer: Answered, policy: Policy) -> NoReturn:
    """Raise for an answer that is a refusal."""
    version, source, number = policy.version, policy.source, answer.number
    if answer.answer == "held":
        left = f"for {number / 1000:.0f} s more" if number >= 0 else f"until {server.keys.publisher} is deleted"
        raise PolicyRejected(
            f"run {answer.text!r} publishes the checkpoints of pool {server.keys.pool!r}, {left}: one run at a time, "
            f"or the hosts would serve neither. Wait until it ends, or have run {policy.run!r} publish adapters "
            "(lora_path=), of which each run has its own"
        )
    known = read_record(answer.text)
    if answer.answer == "other":
        before = f"{known.source!r}" + (f" on {known.base!r}" if known.base else "") if known else "another source"
        raise PolicyRejected(
            f"policy {version} already names {before}, so it cannot name {source!r}; publish under a new version"
        )
    if answer.answer == "taken":
        kind = "checkpoint" if policy.lora_path is None else "adapter"
        raise PolicyRejected(
            f"{kind} {source!r} is that of policy {number} already: give each version a path of its own, that "
            "is never written to again, since a result can name only the version, not what lay there at the time"
        )
    if answer.answer == "rebased":
        raise PolicyRejected(
            f"adapter {source!r} is for {policy.base!r}, and the current checkpoint is policy {number}, "
            f"{known.source if known else 'unknown'!r}: publish its base first, or leave base out"
        )
    relation = "older" if version < number else "not newer"
    raise PolicyRejected(
        f"policy {version} is {relation} than the current policy {number}; versions rise: publish {number + 1} or later"
    )
