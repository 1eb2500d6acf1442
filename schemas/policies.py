"""Policies: weights with a version.

Invariant: a published `Policy` never changes; within one lineage and generation a version names one source for ever.
"""

from typing import Annotated, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollpool.schemas.jobs import Name

#: The lineage of checkpoints; those of adapters are called `lora:RUN`, which no name of a run can be.
CHECKPOINTS = "checkpoints"

#: A path, or a URL that fsspec knows, as the hosts see it.
Location = Annotated[str, Field(min_length=1)]


class SourceFile(NamedTuple):
    """One file of a source as it was when it was published, by which a copy is known to be whole."""

    #: Relative to the source.
    name: str
    #: Bytes.
    size: int
    #: `sha256:HEX`, or another digest or tag that the file's store tells; empty: the size is all that is known.
    digest: str = ""


class Policy(BaseModel):
    """Weights with a version, an integer that rises: a checkpoint, or an adapter (LoRA) on one."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    version: int = Field(ge=0)
    #: Directory with a Hugging Face checkpoint, or a name the engine can load; None for an adapter.
    checkpoint: Location | None = None
    #: Directory with an adapter in peft's layout; None for a checkpoint.
    lora_path: Location | None = None
    #: The checkpoint that the adapter belongs on; None: the model that hosts serve until a checkpoint is published.
    base: Location | None = None
    #: The run that published it.
    run: Name
    #: Rises each time the lineage goes back to an earlier version, so that a version used again is another policy.
    generation: int = Field(default=0, ge=0)
    #: What the source held when it was published; empty: it was not looked at.
    files: tuple[SourceFile, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.checkpoint is None) == (self.lora_path is None):
            raise ValueError("a policy is a checkpoint or an adapter: give one of checkpoint and lora_path")
        if self.base is not None and self.lora_path is None:
            raise ValueError("base: belongs to lora_path; a checkpoint has none")
        return self

    @property
    def source(self) -> str:
        """Where its own weights are."""
        return self.checkpoint or self.lora_path or ""

    @property
    def lineage(self) -> str:
        """Policies whose versions follow one another: all checkpoints of a pool, or the adapters of one run."""
        return CHECKPOINTS if self.lora_path is None else f"lora:{self.run}"

    @property
    def adapter_name(self) -> str:
        """What engines know the adapter by: never the name of other weights."""
        return f"{self.run}.g{self.generation}.v{self.version}"

    def same_source(self, other: "Policy") -> bool:
        """True when both name the same weights; then to publish again is harmless."""
        mine = (self.version, self.checkpoint, self.lora_path, self.base)
        return mine == (other.version, other.checkpoint, other.lora_path, other.base)
