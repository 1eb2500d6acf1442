"""The trainer's view of a pool: enqueue, collect, cancel, commit, publish, resume; for asyncio code.

Invariant: under one `batch_id` there is one batch, here as on the server. What a pool object handed out is in its
`state_dict`, so that a trainer that saves it with its weights trains nothing twice and skips nothing.
"""

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rollpool.producer.admission import Limits
from rollpool.producer.affinity import Affinity, Homes
from rollpool.producer.batch import AsyncBatch, hand_out_async
from rollpool.producer.cancel import cancel_run
from rollpool.producer.enqueue import Draft, PromptInput, draft
from rollpool.producer.feed import Feed
from rollpool.producer.inbox import Inbox
from rollpool.producer.lineages import current_policy
from rollpool.producer.params import ParamsSink
from rollpool.producer.progress import progress_bar
from rollpool.producer.publish import Publisher, roots_of
from rollpool.producer.resume import State, attach, consumed_of, state_of
from rollpool.producer.rollback import roll_back
from rollpool.producer.server import Server
from rollpool.producer.submit import Order, Submitter
from rollpool.producer.waiting import wait_for_policy
from rollpool.schemas import wire
from rollpool.schemas.commands import ChangeMode, ChangeWay
from rollpool.schemas.jobs import Endpoint, Lane, SamplingParams
from rollpool.schemas.policies import Policy
from rollpool.schemas.results import Group
from rollpool.schemas.staleness import StalenessRule

_LOG = logging.getLogger("rollpool.producer")

#: Open jobs of a run above which nothing is enqueued. It bounds the server's memory: with prompts of 2 KB, 200 MB.
BACKLOG_LIMIT = 100_000

#: Committed batches that a state names: many more than a trainer commits in the second that a server may lose.
_COMMITTED_NAMES = 100


class AsyncRolloutPool:
    """A pool of rollout workers, seen from one training run; for asyncio code, on one event loop.

    Nothing is sent before the first call. Use it as an async context manager, or `await pool.close()`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        pool: str | None = None,
        run: str | None = None,
        backlog_limit: int = BACKLOG_LIMIT,
        weight: float | None = None,
        staleness_rule: StalenessRule | None = None,
        model_roots: Sequence[str] | None = None,
        params: ParamsSink | None = None,
    ) -> None:
        """Name the pool.

        Args:
            url: The server: `redis://` or `rediss://` and the other forms of docs/howto-servers.md; by default
                $ROLLPOOL_URL, then redis://127.0.0.1:6379/0.
            pool: The namespace shared with the workers; by default $ROLLPOOL_POOL, then `default`.
            run: The training run; by default $ROLLPOOL_RUN, then `default`. Runs do not see one another's batches.
            backlog_limit: Open jobs of the run above which enqueueing waits or is refused; 0: no limit. A batch
                larger than the limit is accepted when nothing else is open.
            weight: Share of the run among those that have work: hosts make twice as many samples for a run of weight 2
                as for one of weight 1. Set at the next enqueueing; None leaves it as it is, 1 at first.
            staleness_rule: Holds enqueueing back so that nothing is too old when it is trained on; None: no rule. It
                counts published policies, so versions must rise by one a training step.
            model_roots: Directories and URLs that published sources must be under; by default $ROLLPOOL_MODEL_ROOTS, a
                JSON list, then none: any source. The hosts have their own.
            params: Where `publish_policy(…, params=…)` puts a trainer's parameters, as a `CheckpointFolder`.

        Raises:
            SettingsError: A name, the URL, a limit, the weight or a root cannot be.
            SchemaMismatch: The msgpack module is not msgpack.
        """
        wire.check_msgpack()
        self._server = Server(url, pool, run)
        self._submitter = Submitter(self._server, Limits(backlog_limit, staleness_rule), weight)
        self._publisher = Publisher(self._server, roots_of(model_roots), params)
        self._homes = Homes()
        self._batches: dict[str, AsyncBatch] = {}
        self._committed: dict[str, str] = {}
        self._resumed: State | None = None

    @property
    def run(self) -> str:
        """The training run."""
        return self._server.run

    @property
    def batches(self) -> dict[str, AsyncBatch]:
        """Batches of this object that are not committed, by id, in order of enqueueing."""
        return {name: batch for name, batch in self._batches.items() if not batch.committed}

    async def enqueue_prompts(
        self,
        prompts: Sequence[PromptInput],
        *,
        policy_version: int,
        n: int = 1,
        split: int = 1,
        min_samples: int | None = None,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        max_staleness: int | None = None,
        exact: bool = False,
        lane: Lane = "default",
        batch_id: str | None = None,
        metadata: Sequence[Any] | None = None,
        deadline: float | None = None,
        endpoint: Endpoint = "generate",
        logprobs: bool = True,
        affinity: Affinity = None,
        timeout: float | None = 0.0,
    ) -> AsyncBatch:
        """Enqueue one group a prompt: all of them, or, when anything is wrong, none.

        The encoded prompts are kept in this process until all results were read, so that a batch that the server loses
        is enqueued again: about the bytes of the prompts, ids at 4 bytes each.

        Args:
            prompts: Text, token ids ([T] integers, list or numpy) or chat messages; all of one kind.
            policy_version: The tag: which policy the samples are wanted from.
            n: Samples of each prompt; together they are its group.
            split: Jobs of each group, of `n / split` samples each, that several hosts may run at once; the group comes
                back whole.
            min_samples: Samples with which a group is `ok` when the rest cannot be had; None: all `n`. Not for split
                groups.
            sampling: How to sample, by sglang's names; unknown names are refused.
            max_staleness: The jobs may run on any policy from `policy_version - max_staleness` on, newer ones included;
                None: on any.
            exact: The jobs may run on `policy_version` alone.
            lane: `high`, `default` or `low`; hosts take the jobs of a run in this order.
            batch_id: Name of the batch. The same name with the same content returns the first batch, so the call may
                be repeated after any failure. By default a new one.
            metadata: One entry a prompt, what msgpack carries (numpy arrays included); comes back with the group.
            deadline: Seconds from now after which open jobs settle `expired`.
            endpoint: `generate`, or `chat` for evaluation: text alone, without token ids and log-probs.
            logprobs: Must be False for `endpoint="chat"`; `generate` returns log-probs in any case.
            affinity: A key, or one a prompt (None: none), for prompts that begin alike, as the turns of a conversation
                do: other hosts leave a job to the one that made the last collected group of its key, for up to two
                seconds. A wish, and no part of the batch's content. Not for split groups.
            timeout: Seconds to wait for room under the backlog limit and the staleness rule; None: for ever.

        Returns:
            The batch; `len(batch)` is the number of prompts.

        Raises:
            InvalidPrompt: A prompt or a parameter is wrong, named with its index, or `batch_id` names a batch with
                other content. Nothing was sent, or nothing was changed.
            BacklogFull: There was no room in time, or there can be none for a batch of this size.
            NotPermitted: The server's access list refuses this user.
        """
        made = draft(
            prompts,
            run=self.run,
            policy_version=policy_version,
            n=n,
            split=split,
            min_samples=min_samples,
            sampling=sampling,
            max_staleness=max_staleness,
            exact=exact,
            lane=lane,
            batch_id=batch_id,
            metadata=metadata,
            deadline=deadline,
            endpoint=endpoint,
            logprobs=logprobs,
            affinity=affinity,
            homes=self._homes,
        )
        if self._resumed and self._resumed.consumed_whole.get(made.batch) == made.content:
            return self._consumed_before(made)
        enqueued, order = await self._submitter.send(made, timeout)
        return self._remembered(order, enqueued.count)

    def _consumed_before(self, made: Draft) -> AsyncBatch:
        """A trainer that died before it saved its next step repeats what it had consumed whole."""
        _LOG.info("batch %s was consumed whole before the restart: nothing of it is handed out again", made.batch)
        inbox = Inbox(made.batch, made.size, consumed_of(self._resumed, made.batch, made.content))
        return AsyncBatch(self._submitter, inbox, made.content, consumed_before=True)

    def _remembered(self, order: Order, size: int) -> AsyncBatch:
        """The batch object: the one this pool has, with what it has handed out, or a new one."""
        self._forget_committed()
        name, content = order.draft.batch, order.draft.content
        known = self._batches.get(name)
        if known is None or known.content != content:
            # A resumed state may know of it although the server did not.
            known = self._added(Inbox(name, size, consumed_of(self._resumed, name, content)), content)
        known.sent(order)
        return known

    def _added(self, inbox: Inbox, content: str) -> AsyncBatch:
        batch = AsyncBatch(self._submitter, inbox, content, siblings=lambda: self.batches.values(), homes=self._homes)
        self._batches[inbox.batch] = batch
        return batch

    def _forget_committed(self) -> None:
        """All but the names, and of those the last: a long training run must not gather them."""
        self._committed = self._committed_last()
        self._batches = self.batches

    def _committed_last(self) -> dict[str, str]:
        new = {name: batch.content for name, batch in self._batches.items() if batch.committed}
        return dict([*self._committed.items(), *new.items()][-_COMMITTED_NAMES:])

    def groups(self, n: int | None = None, timeout: float | None = None) -> AsyncGenerator[Group, None]:
        """Yield `ok` groups of all batches in `batches` as they finish, the oldest batch first among those here.

        `group.batch` says which batch a group is of. Batches enqueued meanwhile are included. Ends after `n` groups, or
        when every batch is settled and handed out.

        Args:
            n: Groups to yield at most; None: all.
            timeout: Seconds from the call until waiting ends; None: never.

        Raises:
            PoolTimeout: Nothing finished in time; nothing is lost, and another call goes on.
            RollpoolError: The server lost a batch whose prompts are not here.
        """
        return hand_out_async(self.feed(timeout), progress_bar(False, ""), n)

    def feed(self, timeout: float | None) -> Feed:
        """The groups still to be handed out of all batches; for the pool, not for users."""
        return Feed(self._server, lambda: list(self.batches.values()), timeout)

    async def cancel(self, *, policy_version: int | None = None) -> int:
        """Settle every open job of the run `cancelled`, also of batches that this object does not know.

        Args:
            policy_version: Only batches with this tag; None: all.

        Returns:
            Groups that this call cancelled.

        Raises:
            RollpoolError: The server cannot be reached.
        """
        for batch in self.batches.values():
            if policy_version in (None, batch.policy_version):
                batch.was_cancelled()
        return await cancel_run(self._server, policy_version)

    async def publish_policy(
        self,
        version: int,
        *,
        checkpoint: str | None = None,
        lora_path: str | None = None,
        params: Any = None,
        mapping: Any = None,
        base: str | None = None,
        mode: ChangeMode | None = None,
        way: ChangeWay = "auto",
        min_serving: int | None = None,
        check: bool = True,
    ) -> Policy:
        """Make weights the current policy: the hosts begin to move to it. May be repeated.

        Checkpoints are one sequence of versions for the pool, and one run publishes them at a time: for 15 minutes
        after each no other run may. Adapters are a sequence for each run, beside the others.

        Parameters are put where the hosts can take them up (the pool's `params`), and published as a checkpoint. They
        may be overwritten or donated when this returns. They are put in the calling thread: this blocks an event loop
        meanwhile, since a thread of ours would run beside the trainer's JAX programs. Where this run published
        parameters under the version before, and they are still there, they are not put again: the policy is returned
        as it is recorded, whatever is given now.

        Args:
            version: Higher than every version published before in its sequence, and an adapter's higher than that of
                its checkpoint.
            checkpoint: Directory in Hugging Face layout, or a URL such as `gs://…`, as the hosts see it; or a name on
                the hub. One of checkpoint, lora_path and params.
            lora_path: Directory or URL of an adapter in peft's layout.
            params: The model's parameters: arrays by Hugging Face name, flat or nested, or a flax `nnx.State`; see
                `hf_tensors`.
            mapping: How the names of `params` are translated: Tunix's `MappingConfig`; None: they are Hugging Face's.
            base: The checkpoint that the adapter was trained on; None: the current one.
            mode: What becomes of work in flight: `drain`, `requeue` or `resume`; None: as each host is set.
            way: `restart` to have engines restarted also where they could change without.
            min_serving: Hosts that go on serving while others change; None: three quarters of those there are.
            check: Look at the source from here first, and read it whole for the digests by which hosts know their copy:
                seconds to a minute for large weights. False for a path that only the hosts see. For params their sink
                says whether there is something to look at.

        Returns:
            The policy as it is recorded, with its files.

        Raises:
            PolicyRejected: The version names another source already, does not rise, or the source belongs to another
                version; the source is not whole, or outside the roots; the base is not the current checkpoint; another
                run publishes checkpoints; or the sequence went back to an earlier version since this object published.
                Or params are not those of the model, or the pool was not told where to put them.
            NotPermitted: The server's access list refuses this user.
        """
        if params is not None:
            known = await self.put_before(version, checkpoint, lora_path, base)
            checkpoint = known or self.put_params(version, params, mapping)
            check = check and known is None and self.checks_params
        return await self._publisher.publish(
            version,
            checkpoint=checkpoint,
            lora_path=lora_path,
            base=base,
            mode=mode,
            way=way,
            min_serving=min_serving,
            check=check,
        )

    async def put_before(self, version: int, *others: str | None) -> str | None:
        """What was published for parameters under a version before, if it is there; for the pool, not for users."""
        return await self._publisher.put_before(version, *others)

    def put_params(self, version: int, params: Any, mapping: Any) -> str:
        """Put parameters where hosts find them, in the calling thread; for the pool, not for users."""
        return self._publisher.put(version, params, mapping)

    @property
    def checks_params(self) -> bool:
        """Whether what was put is looked at before it is published; for the pool, not for users."""
        return self._publisher.checks_params

    async def rollback_policy(self, version: int | None = None) -> Policy:
        """Go back to an earlier policy: of the run's adapters if it published any, else of the checkpoints.

        Those after it are abandoned: what was asked of them and is still open settles `stale`, and their numbers may be
        published anew. May be repeated: going back to the current version only finishes what was left to do.

        Args:
            version: One published before and not abandoned; None: the one before the current.

        Returns:
            The policy, in its new generation.

        Raises:
            PolicyUnknown: There is no such version, or it was abandoned.
            PolicyRejected: Another run publishes checkpoints; there is no version before the current; the adapter is
                for another checkpoint than the current; or another trainer of the run went back before.
            NotPermitted: The server's access list refuses this user.
        """
        return await roll_back(self._publisher, version)

    async def current_policy(self) -> Policy | None:
        """What the hosts are to serve to this run: its newest adapter, else the newest checkpoint; None before any."""
        return await current_policy(self._server)

    async def wait_for_policy(
        self,
        version: int,
        *,
        fraction: float | None = None,
        workers: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Wait until enough of the live workers serve `version`, or a newer one, to this run.

        Args:
            version: A published version.
            fraction: Part of the workers that have a heartbeat and are not stopping, more than 0 and at most 1; at
                least one worker in any case. All of them where workers is None too.
            workers: So many of them, at least 1.
            timeout: Seconds; None: for ever.

        Raises:
            PolicyUnknown: Nobody published the version, or its lineage went back from it.
            PolicyRejected: A worker failed to apply it; the message carries the worker's error.
            PoolTimeout: Too few in time; the message names those who are not there yet.
        """
        await wait_for_policy(self._server, version, fraction=fraction, workers=workers, timeout=timeout)

    def state_dict(self) -> dict[str, Any]:
        """What was handed out of the batches that are not committed: plain data for the trainer's checkpoint.

        Save it together with the weights, then commit what it calls complete. Returns `{"schema", "run", "batches",
        "committed"}`: each batch by its id as `{"consumed": [[start, end], …], "complete", "content"}`, indexes in
        half-open ranges; and the content of the batches that were committed last, by id.
        """
        return state_of(self.run, self.batches, self._committed_last())

    @classmethod
    async def resume(
        cls,
        state: Mapping[str, Any],
        url: str | None = None,
        *,
        pool: str | None = None,
        backlog_limit: int = BACKLOG_LIMIT,
        weight: float | None = None,
        staleness_rule: StalenessRule | None = None,
        model_roots: Sequence[str] | None = None,
        params: ParamsSink | None = None,
    ) -> Self:
        """Go on where a `state_dict` was saved: commit what it calls complete, and attach the rest.

        Every open batch of the run is in `batches` afterwards, and yields what the state does not name; a batch that
        the state does not know is yielded whole. An `enqueue_prompts` that was under way may be repeated with the same
        content.

        Args:
            state: What `state_dict` returned.
            url: As for the constructor, and so are the others.
            pool: The namespace.
            backlog_limit: Open jobs at most.
            weight: Share of the run.
            staleness_rule: The rule, which goes on counting where it was.
            model_roots: As for the constructor.
            params: As for the constructor.

        Raises:
            SchemaMismatch: The state is of another version of rollpool, or not a state.
        """
        saved = State.of(state)
        resumed = cls(
            url,
            pool=pool,
            run=saved.run,
            backlog_limit=backlog_limit,
            weight=weight,
            staleness_rule=staleness_rule,
            model_roots=model_roots,
            params=params,
        )
        try:
            await resumed.restore(saved)
        except BaseException:
            await resumed.close()
            raise
        return resumed

    async def restore(self, state: State) -> None:
        """Take up a state; for the pool, not for users."""
        self._resumed = state
        self._committed = state.consumed_whole
        for found in (await attach(self._server, state)).values():
            self._added(found.inbox, found.content)

    async def close(self) -> None:
        """Close the connections; batches stay on the server."""
        await self._server.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
