"""A job in this host's hands, from pull to settlement.

Invariant: a `HeldJob` belongs to exactly one owner at a time (puller, generator, settler), and leaves the host by
exactly one of: settled, given back, or dropped because another host has it.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rollpool.schemas import Group, Outcome, PromptJob, Sample
from rollpool.schemas.scripts import Entry

#: The prompt of a job that never reached an engine, and the ids of a chat.
NO_IDS: NDArray[np.int32] = np.empty(0, dtype=np.int32)


@dataclass(slots=True, eq=False)
class HeldJob:
    """One job and what this host has made of it so far."""

    entry: Entry
    job: PromptJob
    #: Local monotonic seconds.
    pulled_at: float
    #: [P], once tokenized.
    prompt_ids: NDArray[np.int32] = field(default_factory=lambda: NO_IDS)
    #: Finished samples, by position in the group.
    samples: dict[int, Sample] = field(default_factory=dict)
    #: True once it left the host; late samples of it are ignored.
    left: bool = False

    def group(self, outcome: Outcome, *, worker: str, now: float, error: str | None = None) -> Group:
        """The group this job settles with; samples only when the outcome is `ok`."""
        job = self.job
        samples = tuple(self.samples[index] for index in range(job.n)) if outcome == "ok" else ()
        # Every part was validated when it was made; validating the whole again would double the cost of a settlement.
        return Group.model_construct(
            run=job.run,
            batch=job.batch,
            index=job.index,
            outcome=outcome,
            policy_version=job.policy_version,
            prompt_ids=self.prompt_ids,
            samples=samples,
            sampling=job.sampling,
            metadata=job.metadata,
            error=error,
            worker=worker,
            seconds=now - self.pulled_at,
        )
