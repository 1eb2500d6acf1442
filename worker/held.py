"""A job in this host's hands, from pull to settlement.

Invariant: a `HeldJob` belongs to exactly one owner at a time (puller, generator, settler), and leaves the host by
exactly one of: settled, given back, or dropped because another host has it or it was settled elsewhere.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rollpool.schemas import Group, Outcome, PromptJob, Sample, SchemaMismatch
from rollpool.schemas.scripts import Entry, Record
from rollpool.schemas.wire import Done, unpack_samples
from rollpool.worker.samples import is_piece

#: The prompt of a job that never reached an engine, and the ids of a chat.
NO_IDS: NDArray[np.int32] = np.empty(0, dtype=np.int32)


@dataclass(slots=True, eq=False)
class HeldJob:
    """One job and what this host has made of it so far."""

    entry: Entry
    job: PromptJob
    #: Local monotonic seconds.
    pulled_at: float
    #: What delivery has cost it.
    record: Record = field(default_factory=Record)
    #: [P], once tokenized.
    prompt_ids: NDArray[np.int32] = field(default_factory=lambda: NO_IDS)
    #: Finished samples, by position in the group; those of other hosts included.
    samples: dict[int, Sample] = field(default_factory=dict)
    #: Beginnings of others, likewise.
    pieces: dict[int, Sample] = field(default_factory=dict)
    #: The adapter that it runs on here, by the engine's name for it; None: the engine's own weights.
    adapter: str | None = None
    #: The version that this adapter is.
    version: int = 0
    #: Of the policies that made its samples and pieces.
    generation: int = 0
    #: True once it left the host; late samples of it are ignored.
    left: bool = False

    @classmethod
    def of(cls, entry: Entry, job: PromptJob, now: float, *, generation: int | None = None) -> "HeldJob":
        """As pulled, with what others made of it that counts under policies of this generation; None: all of it."""
        done = _made_elsewhere(entry)
        held = cls(entry, job, now, record=entry.record, generation=done.generation)
        if generation is not None and generation != done.generation:
            held.generation = generation
            return held
        for index, sample in done.samples:
            if 0 <= index < job.n:
                (held.pieces if is_piece(sample) else held.samples)[index] = sample
        return held

    @property
    def enough(self) -> bool:
        """True when it may settle `ok` with the samples it has."""
        return len(self.samples) >= self.job.fewest_samples

    def group(self, outcome: Outcome, *, worker: str, now: float, error: str | None = None) -> Group:
        """The group this job settles with; samples only when the outcome is `ok`."""
        job = self.job
        # They are finished in any order; a group of min_samples has gaps.
        indexes = range(job.n) if len(self.samples) == job.n else sorted(self.samples)
        samples = tuple(self.samples[index] for index in indexes) if outcome == "ok" else ()
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


def _made_elsewhere(entry: Entry) -> Done:
    """Samples that travelled with the entry; none where they cannot be read, since all can be made again."""
    if entry.done:
        try:
            return unpack_samples(entry.done)
        except SchemaMismatch:
            pass
    return _NOTHING


_NOTHING = Done(samples=[])
