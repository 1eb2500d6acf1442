"""Opens engines: from what a host wants to serve to a session that serves it.

Invariant: an engine is opened only on sources that are on this host, whole and verified; and an error says which policy
it is about.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from rollpool.schemas import EngineUnavailable, PolicyRejected, RollpoolError
from rollpool.worker.engines.protocol import Adapter, Engine, EngineKilled, EngineOwner
from rollpool.worker.policy.choice import PolicyChoice
from rollpool.worker.policy.offer import Offer
from rollpool.worker.policy.orders import Target
from rollpool.worker.policy.plan import Setup
from rollpool.worker.session import Session
from rollpool.worker.shown import Shown
from rollpool.worker.tokenizer import PromptEncoder


class CannotServe(RollpoolError):  # noqa: N818 - in line with the words of the design
    """A policy's source cannot be had, or cannot be used.

    Attributes:
        target: whose source it is.
        for_ever: False where another try may help.
    """

    def __init__(self, target: Target, reason: str, *, for_ever: bool) -> None:
        super().__init__(reason)
        self.target = target
        self.for_ever = for_ever


@dataclass(frozen=True, slots=True)
class Staged:
    """A setup whose sources are on this host."""

    setup: Setup
    #: What the engine is opened on.
    checkpoint: str
    #: The adapters it is launched with.
    adapters: tuple[Adapter, ...]
    encoder: PromptEncoder | None
    #: Directories that must stay.
    paths: frozenset[str]


#: Makes the session of an engine that was opened.
MakeSession = Callable[[Engine, Setup, Offer, PromptEncoder], Session]


class Opening:
    """Opens the engines of one host, one at a time."""

    def __init__(self, owner: EngineOwner, choice: PolicyChoice, shown: Shown, make_session: MakeSession) -> None:
        self._owner = owner
        self._choice = choice
        self._shown = shown
        self._make_session = make_session
        self._in_use = frozenset[str]()
        #: What was staged last: verifying a large checkpoint once more would take as long as to load it.
        self._staged: Staged | None = None

    async def stage(self, setup: Setup) -> Staged:
        """Have everything that `setup` needs on this host, while an engine may go on serving.

        Raises:
            CannotServe: names the policy that is at fault.
        """
        if not self._owner.controls_weights:
            return Staged(setup, setup.checkpoint.policy.source, (), None, frozenset())
        base = checkpoint = await self.fetch(setup.checkpoint)
        fetched = [(target, await self.fetch(target)) for target in setup.adapters]
        if setup.merged:
            [(target, path)] = fetched
            checkpoint = await _blaming(target, self._owner.merge(base, target.policy, path))
            fetched = []
        try:
            encoder = await asyncio.to_thread(encoder_of, checkpoint)
        except EngineUnavailable as error:
            raise CannotServe(setup.checkpoint, str(error), for_ever=True) from error
        adapters = tuple(Adapter(target.policy.adapter_name, path) for target, path in fetched)
        paths = frozenset([base, checkpoint, *(path for _, path in fetched)])
        self._owner.keep(self._in_use | paths)
        self._staged = Staged(setup, checkpoint, adapters, encoder, paths)
        return self._staged

    async def fetch(self, target: Target) -> str:
        """Have the files of one policy on this host; where they are. Raises CannotServe."""
        with self._shown.progress_of(target.policy.version) as progress:
            path = await _blaming(target, self._owner.stage(target.policy, progress))
        self._owner.keep(self._in_use | {path})
        return path

    def has(self, setup: Setup) -> bool:
        """True when everything that it needs is here, and no engine failed to start on it since."""
        return self._staged is not None and self._staged.setup == setup

    async def open(self, setup: Setup) -> Session:
        """Open an engine.

        Raises:
            CannotServe: a source is at fault.
            EngineUnavailable: the engine does not start.
        """
        staged = self._staged if self.has(setup) else None
        staged = staged or await self.stage(setup)
        offer = offer_of(setup)
        version = offer.weights.version
        try:
            engine = await self._owner.open(staged.checkpoint, version=version, adapters=staged.adapters)
        except EngineKilled:  # that says nothing of what it was to serve
            raise
        except EngineUnavailable:
            self._staged = None  # it may have changed
            raise
        if not self._owner.controls_weights:
            offer = Offer(await self._choice.policy_of(engine.facts.model_path, self._owner.url))
        encoder = staged.encoder
        if encoder is None:
            encoder = await asyncio.to_thread(encoder_of, engine.facts.model_path)
        self.settled_on(staged)
        return self._make_session(engine, setup, offer, encoder)

    def settled_on(self, staged: Staged) -> None:
        """The engine serves this: what the one before needed may make room."""
        self._staged, self._in_use = staged, staged.paths
        self._owner.keep(self._in_use)


def offer_of(setup: Setup) -> Offer:
    """What an engine offers that was opened with this."""
    if setup.merged:
        return Offer(setup.adapters[0].policy)
    offer = Offer(setup.checkpoint.policy)
    for target in setup.adapters:
        offer = offer.with_adapter(target.policy)
    return offer


async def _blaming(target: Target, work: Coroutine[Any, Any, str]) -> str:
    try:
        return await work
    except PolicyRejected as error:
        raise CannotServe(target, str(error), for_ever=True) from error
    except EngineUnavailable as error:
        raise CannotServe(target, str(error), for_ever=False) from error


def encoder_of(model_path: str) -> PromptEncoder:
    """The tokenizer of a checkpoint. Raises EngineUnavailable where it does not load: the policy cannot be served."""
    try:
        return PromptEncoder(model_path)
    except Exception as error:  # whatever is wrong with its files
        raise EngineUnavailable(
            f"the tokenizer of {model_path} does not load ({type(error).__name__}: {error}); publish a checkpoint "
            "whose tokenizer.json, tokenizer_config.json, chat_template.jinja and config.json are whole"
        ) from error
