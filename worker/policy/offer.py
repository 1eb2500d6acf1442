"""What a host can run now: the policy whose weights its engine has, and the adapters that are loaded beside it. Pure.

Invariant: a job is given the newest policy of its run that its tag allows, an exact one its own, or none at all; so no
job runs on a policy that its tag forbids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rollpool.schemas import Policy, PromptJob
from rollpool.schemas.scripts import RunOffer


@dataclass(frozen=True, slots=True)
class Offer:
    """The policies that one host serves side by side."""

    #: Whose weights the engine has: a checkpoint's, for jobs of every run, or those with a run's adapter merged in.
    weights: Policy
    #: Adapters by the run whose jobs they are for, versions rising.
    adapters: Mapping[str, tuple[Policy, ...]] = field(default_factory=dict)

    def policies(self, run: str) -> tuple[Policy, ...]:
        """What jobs of this run may be given, versions rising."""
        weights = (self.weights,) if self.checkpoint or self.weights.run == run else ()
        return (*weights, *self.adapters.get(run, ()))

    @property
    def checkpoint(self) -> Policy | None:
        """The policy of the weights; None while an adapter is merged into them."""
        return self.weights if self.weights.lora_path is None else None

    def adapter_of(self, policy: Policy) -> str | None:
        """By which name a request asks for this policy; None: the engine's weights are its own."""
        return None if policy == self.weights else policy.adapter_name

    def newest(self, run: str) -> int | None:
        """The newest version for this run; None where there is none."""
        policies = self.policies(run)
        return policies[-1].version if policies else None

    def choose(self, job: PromptJob) -> Policy | None:
        """The policy that this job runs on here; None: it may not run here."""
        policies = self.policies(job.run)
        if job.exact:
            return next((policy for policy in policies if policy.version == job.policy_version), None)
        return policies[-1] if policies and job.may_run_on(policies[-1].version) else None

    def for_run(self, run: str) -> RunOffer:
        """As a pull asks for jobs of this run."""
        return RunOffer(run, self.newest(run), tuple(policy.version for policy in self.policies(run)))

    @property
    def loaded(self) -> tuple[Policy, ...]:
        """Every adapter."""
        return tuple(policy for policies in self.adapters.values() for policy in policies)

    def with_adapter(self, policy: Policy) -> "Offer":
        """One adapter more."""
        others = [other for other in self.adapters.get(policy.run, ()) if other.version != policy.version]
        policies = tuple(sorted([*others, policy], key=lambda each: each.version))
        return Offer(self.weights, {**self.adapters, policy.run: policies})

    def without_adapter(self, policy: Policy) -> "Offer":
        """One adapter less."""
        policies = tuple(other for other in self.adapters.get(policy.run, ()) if other != policy)
        kept = {run: others for run, others in self.adapters.items() if run != policy.run}
        return Offer(self.weights, {**kept, policy.run: policies} if policies else kept)

    def shown(self) -> str:
        """The adapters as a heartbeat says them, `RUN:VERSION,VERSION RUN:VERSION`; a merged one among them."""
        merged = {} if self.checkpoint else {self.weights.run: (self.weights,)}
        adapters = {**self.adapters, **merged}
        return " ".join(
            f"{run}:{','.join(str(policy.version) for policy in policies)}"
            for run, policies in sorted(adapters.items())
        )
