"""One engine at work: what it serves, and the parts that keep it busy.

Invariant: what is pulled for is what the engine serves; both change in one place.
"""

from dataclasses import dataclass, replace

from rollpool.schemas import Policy
from rollpool.worker.engines.protocol import Engine
from rollpool.worker.generator import Generator
from rollpool.worker.policy.offer import Offer
from rollpool.worker.policy.orders import Target
from rollpool.worker.policy.plan import Setup
from rollpool.worker.puller import Puller
from rollpool.worker.tokenizer import PromptEncoder


@dataclass
class Session:
    """One engine, from its opening to its end."""

    engine: Engine
    #: What it was opened with, or changed to since.
    setup: Setup
    #: What it serves; of an attached engine, what that one says.
    offer: Offer
    generator: Generator
    puller: Puller
    #: Samples kept in the engine, where nobody commands otherwise.
    usual_target: int
    #: Samples kept in the engine.
    target: int
    #: True while nothing is to be pulled, since its weights go back to an earlier version.
    holding_back: bool = False
    #: Adapters that the engine has still, and that are given no further job.
    leaving: tuple[Policy, ...] = ()

    @property
    def policy(self) -> Policy:
        """Whose weights the engine has."""
        return self.offer.weights

    @property
    def loaded(self) -> tuple[Policy, ...]:
        """Every adapter that the engine has."""
        return (*self.offer.loaded, *self.leaving)

    def withdraw(self, policy: Policy) -> None:
        """Give an adapter no further job."""
        self.leaving = (*(other for other in self.leaving if other != policy), policy)
        self.serve(self.offer.without_adapter(policy))

    def readmit(self, policy: Policy) -> None:
        """Give it jobs again."""
        self.unloaded(policy)
        self.serve(self.offer.with_adapter(policy))

    def unloaded(self, policy: Policy) -> None:
        """The engine has it no more."""
        self.leaving = tuple(other for other in self.leaving if other != policy)

    def serve(self, offer: Offer) -> None:
        """These policies from now on."""
        self.offer = offer
        self.puller.serve(offer)

    def changed_to(self, target: Target, encoder: PromptEncoder) -> None:
        """The engine has the weights of this checkpoint by now, and no adapters on the one before."""
        self.setup, self.offer = Setup(target), Offer(target.policy)
        self.generator.serve(target.policy, encoder.decode)
        self.puller.serve(self.offer, encoder)

    def relabelled(self, target: Target) -> None:
        """Its weights are known as this target's policy from now on."""
        self.setup = replace(self.setup, checkpoint=target)
        if not self.setup.merged:
            self.serve(replace(self.offer, weights=target.policy))

    def retarget(self, samples: int | None) -> None:
        """Keep so many samples in the engine; None: as many as usual."""
        self.target = self.usual_target if samples is None else samples
        self.generator.retarget(self.target)
        self.puller.nudge()
