"""What a simulated engine serves: weights with a label, and adapters by name.

Invariant: what is refused changes nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path

from rollpool.ops.sim.adapter import adapter_signature_of
from rollpool.ops.sim.arguments import Arguments
from rollpool.ops.sim.model import SimModel, read_model
from rollpool.ops.sim.replies import RefusedError
from rollpool.ops.sim.tokens import adapted


class ChangeRefusedError(ValueError):
    """New weights or an adapter that the engine does not take.

    Attributes:
        restart_may_help: True when an engine launched on them may serve them.
    """

    def __init__(self, message: str, *, restart_may_help: bool = False) -> None:
        super().__init__(message)
        self.restart_may_help = restart_may_help


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """One adapter in its slot."""

    path: str
    signature: int


@dataclass(slots=True)
class Serving:
    """The weights of now; make it with `launch`."""

    model: SimModel
    #: Label of the weights.
    version: str
    slots: int
    most_rank: int | None
    adapters: dict[str, LoadedAdapter] = field(default_factory=dict)

    @classmethod
    def launch(cls, arguments: Arguments, version: str) -> "Serving":
        """Load what the command line names.

        Raises:
            ValueError: it cannot be served.
        """
        model = read_model(arguments.model_path)
        if model.fault == "start":
            raise ValueError(f"no engine starts on {arguments.model_path}: its config asks for that fault")
        serving = cls(model, version, arguments.adapter_slots, arguments.max_lora_rank)
        for name, path in arguments.lora_paths.items():
            serving.load_adapter(name, path)
        return serving

    def adapter(self, name: str | None) -> int | None:
        """Signature of the adapter that a request names.

        Raises:
            RefusedError: there is none of this name.
        """
        if name is None:
            return None
        if name not in self.adapters:
            raise RefusedError(f"Got LoRA adapter that has never been loaded: {name}")
        return self.adapters[name].signature

    def signature(self, adapter: int | None) -> int:
        """Who answers a request with this adapter, or with none."""
        return self.model.signature if adapter is None else adapted(self.model.signature, adapter)

    def check(self, path: str) -> SimModel:
        """Load a checkpoint to change to.

        Raises:
            ChangeRefusedError: the engine cannot serve it.
        """
        try:
            model = read_model(path)
        except ValueError as error:
            raise ChangeRefusedError(str(error)) from error
        for name, is_now in self.model.shape.items():
            if model.shape[name] != is_now:
                raise ChangeRefusedError(
                    f"{path} has {name} {model.shape[name]}, and the engine runs {is_now}: restart it on the new one",
                    restart_may_help=True,
                )
        if model.fault is not None:
            # One on which no engine starts does not show that before somebody tries.
            raise ChangeRefusedError(
                f"{path} did not generate: its config asks for the fault {model.fault}",
                restart_may_help=model.fault == "start",
            )
        return model

    def load_adapter(self, name: str, path: str) -> None:
        """Put an adapter into a free slot; harmless to repeat.

        Raises:
            ChangeRefusedError: it cannot be served, or there is no room.
        """
        if (loaded := self.adapters.get(name)) is not None:
            if Path(loaded.path) != Path(path):
                raise ChangeRefusedError(f"{name} is loaded from {loaded.path}; unload it, or take another name")
            return
        if len(self.adapters) >= self.slots:
            raise ChangeRefusedError(f"all {self.slots} slots for adapters are taken; unload one first")
        try:
            self.adapters[name] = LoadedAdapter(path, adapter_signature_of(path, most_rank=self.most_rank))
        except ValueError as error:
            raise ChangeRefusedError(str(error)) from error

    def unload_adapter(self, name: str, requests: int) -> None:
        """Free the slot of an adapter.

        Raises:
            ChangeRefusedError: it is not loaded, or that many requests use it.
        """
        if name not in self.adapters:
            raise ChangeRefusedError(f"there is no adapter {name}")
        if requests:
            raise ChangeRefusedError(f"{requests} requests use {name}; unload it when they are over")
        del self.adapters[name]
