"""The admission rule of a run, as its trainer states it and `enqueue.lua` keeps it.

Invariant: a rule that exists is one that can be kept.
"""

from dataclasses import dataclass

from rollpool.schemas.errors import SettingsError


@dataclass(frozen=True, slots=True)
class StalenessRule:
    """AReaL's admission rule: no more jobs than will still be fresh enough when they are trained on.

    A run held to it has at most `(max_staleness + 1) * batch_size` jobs that are open, or `ok` and not trained on yet,
    when every training step consumes `batch_size` of them and then publishes the next version.
    """

    #: Versions by which the policy that is trained may be ahead of the one that was current at enqueueing; 0: none.
    max_staleness: int
    #: Groups that one training step consumes.
    batch_size: int

    def __post_init__(self) -> None:
        for name, least in (("max_staleness", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingsError(f"staleness_rule: {name}: expected an integer from {least} on, got {value!r}")
