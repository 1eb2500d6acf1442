"""Policies: weights with a version.

Invariant: a published `Policy` never changes; a version names one source for ever.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from rollpool.schemas.jobs import Name


class Policy(BaseModel):
    """Weights with a version, an integer that rises."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    version: int = Field(ge=0)
    #: Directory with a Hugging Face checkpoint, or a name the engine can load, as the hosts see it.
    checkpoint: Annotated[str, Field(min_length=1)]
    #: The run that published it.
    run: Name

    def same_source(self, other: "Policy") -> bool:
        """True when both name the same weights; then to publish again is harmless."""
        return (self.version, self.checkpoint) == (other.version, other.checkpoint)
