"""Owns the engine of this process, and takes parameters for it straight from the trainer.

A policy that was published by its parameters is named, as any other, by a directory: it has the model's config and
tokenizer, and no weights, which are staged in the engine under its name.

Invariant: an engine serves such a policy only with the parameters that were put for it; where they are gone, the policy
is refused, and never served with others.
"""

import asyncio
import logging
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from rollpool.schemas import EngineUnavailable, Policy, PolicyRejected
from rollpool.worker.engines.in_process import InProcessEngine
from rollpool.worker.engines.protocol import Adapter, Engine, OnProgress
from rollpool.worker.sources import Sources

log = logging.getLogger(__name__)

#: How many times smaller than the largest the second shape is that is compiled, of prefills and of decoding steps: two
#: of each keep both short and full batches quick, where the engine's own list of 8 and of 9 takes memory for each
#: before the first request.
_SMALLER = 8


class InProcessSettings(BaseModel):
    """How an engine is launched in this process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Directory in Hugging Face layout: the model, its tokenizer, and the weights served first.
    model_path: str
    #: Counted from the first device of this process.
    device_indexes: tuple[int, ...] = Field(min_length=1)
    #: What JAX runs on here.
    device: str
    #: Prompt and completion together, at most; None: the model's own limit.
    max_seq_len: int | None = Field(default=None, ge=16)
    #: Tokens of a page of the cache.
    page_size: int = Field(default=1, ge=1)
    #: Requests run at once.
    max_running_requests: int = Field(default=64, ge=1)
    #: Tokens of one prefill at most: a longer prompt is cut into such pieces.
    prefill_tokens: int = Field(default=2048, ge=16)
    #: Prefills are padded to these numbers of tokens, each compiled at the start; None: two, up to `prefill_tokens`.
    token_paddings: tuple[int, ...] | None = None
    #: Decoding steps are padded to these numbers of requests; None: two, up to `max_running_requests`.
    batch_paddings: tuple[int, ...] | None = None
    #: Largest rank of an adapter; None: no adapters, they are merged into a checkpoint.
    max_lora_rank: int | None = Field(default=None, ge=1)
    #: Adapters held at once.
    adapter_slots: int = Field(default=4, ge=1)
    #: Where parameters wait to be served: on the rollout devices, for which they need room for a second copy; by leaf,
    #: in the host's memory; or the first of the two that fits.
    staging: Literal["auto", "device", "leaf"] = "auto"
    #: Further arguments of sglang-jax's `ServerArgs`.
    engine_args: dict[str, Any] = Field(default_factory=dict)

    def arguments(self, model_path: str) -> dict[str, Any]:
        """Of sglang-jax's `ServerArgs`."""
        tokens, batches = paddings(self.max_running_requests, self.prefill_tokens)
        args: dict[str, Any] = {
            "model_path": model_path,
            "device": self.device,
            "tp_size": len(self.device_indexes),
            "device_indexes": list(self.device_indexes),
            "page_size": self.page_size,
            "max_running_requests": self.max_running_requests,
            "chunked_prefill_size": self.prefill_tokens,
            "max_prefill_tokens": self.prefill_tokens,
            "precompile_token_paddings": list(self.token_paddings or tokens),
            "precompile_bs_paddings": list(self.batch_paddings or batches),
            # A stock one asks for no log-probs, which kills the engine beside requests that do.
            "skip_server_warmup": True,
            "log_level": "error",
        }
        if self.max_seq_len is not None:
            args["context_length"] = self.max_seq_len
        if self.max_lora_rank is not None:
            args |= {
                "enable_lora": True,
                "max_lora_rank": self.max_lora_rank,
                "lora_target_modules": ["all"],
                "max_loras_per_batch": self.adapter_slots + 1,
            }
        return args | self.engine_args


def paddings(max_running_requests: int, prefill_tokens: int) -> tuple[list[int], list[int]]:
    """The shapes that are compiled before anything is generated: few, since each takes memory and time.

    Returns:
        Numbers of tokens of a prefill, and numbers of requests of a decoding step. The engine has no prefill of fewer
        tokens than it runs requests.
    """
    tokens = sorted({min(max(prefill_tokens // _SMALLER, max_running_requests), prefill_tokens), prefill_tokens})
    batches = sorted({max(max_running_requests // _SMALLER, 1), max_running_requests})
    return tokens, batches


class InProcessOwner:
    """An `EngineOwner` of an engine in this process, and the `ParamsSink` of its trainer.

    Args:
        settings: of the engine.
        sources: fetches and keeps checkpoints and adapters.
        clock: monotonic seconds.
    """

    controls_weights = True

    #: There are no files to look at.
    check = False

    def __init__(
        self, settings: InProcessSettings, sources: Sources, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._sources = sources
        self._clock = clock
        self._engine: InProcessEngine | None = None
        self._opened = ""
        self._folder = Path(tempfile.mkdtemp(prefix="rollpool-params-"))
        self._remover = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        #: Put while there was no engine: a directory, and copies in the host's memory.
        self._waiting: tuple[str, dict[str, Any]] | None = None

    @property
    def url(self) -> str:
        """Where the engine is, for people."""
        devices = ",".join(map(str, self._settings.device_indexes))
        return f"in process, devices {devices}" if self._engine else ""

    @property
    def opened(self) -> str:
        """How long the last launch took."""
        return self._opened

    # The trainer's side, in the trainer's thread.

    def put(self, version: int, tensors: Mapping[str, Any]) -> str:
        """Stage parameters in the engine, and return the directory that stands for them. See `ParamsSink`."""
        from rollpool.worker.launch.hot_swap_messages import Refused

        directory, engine = self._directory(version), self._engine
        try:
            if engine is not None and not engine.embedded.failure:
                engine.embedded.side.deposit(directory, tensors, self._settings.staging)
                self._waiting = None
            else:
                self._waiting = directory, {name: np.array(tensors[name]) for name in tensors}
        except Refused as error:
            raise PolicyRejected(f"the parameters of policy {version} are not served: {error}") from error
        return directory

    def holds(self, checkpoint: str) -> bool:
        """Whether these parameters are staged, or served. See `ParamsSink`."""
        if self._waiting is not None and self._waiting[0] == checkpoint:
            return True
        engine = self._engine
        if engine is None or engine.embedded.scheduler is None:
            return False
        return engine.facts.model_path == checkpoint or bool(engine.embedded.side.has_deposit(checkpoint))

    def _directory(self, version: int) -> str:
        directory = self._folder / str(version)
        directory.mkdir(exist_ok=True)
        for file in Path(self._settings.model_path).iterdir():
            if file.is_file() and file.suffix in (".json", ".txt", ".jinja", ".model") and "index" not in file.name:
                shutil.copyfile(file, directory / file.name)
        return str(directory)

    def _stands_for_params(self, checkpoint: str) -> bool:
        return Path(checkpoint).parent == self._folder

    # The host's side, in its event loop.

    async def stage(self, policy: Policy, on_progress: OnProgress) -> str:
        """See that parameters are there; fetch anything else."""
        if policy.checkpoint is None or not self._stands_for_params(policy.checkpoint):
            return await self._sources.stage(policy, on_progress)
        if not self.holds(policy.checkpoint):
            raise PolicyRejected(
                f"the parameters of policy {policy.version} are in memory no more: later ones took their place, or the "
                "engine was started anew; publish them again, under a new version"
            )
        return policy.checkpoint

    async def merge(self, base: str, policy: Policy, adapter: str) -> str:
        """Merge, as the sources do."""
        if self._stands_for_params(base):
            raise PolicyRejected(
                f"policy {policy.version} cannot be merged into parameters in memory: set max_lora_rank, by which "
                "adapters are served beside them"
            )
        return await self._sources.merge(base, policy, adapter)

    def keep(self, paths: Iterable[str]) -> None:
        """As the sources do, of what they have."""
        self._sources.keep(path for path in paths if not self._stands_for_params(path))

    async def open(self, checkpoint: str, *, version: int, adapters: Sequence[Adapter] = ()) -> Engine:
        """Launch an engine, once the one before it has ended; parameters that wait are put into it."""
        await self.close()
        began = self._clock()
        from_memory = self._stands_for_params(checkpoint)
        if from_memory and (self._waiting is None or self._waiting[0] != checkpoint):
            raise EngineUnavailable(
                f"the engine ended, and the parameters of policy {version} with it: publish the next policy"
            )
        path = self._settings.model_path if from_memory else checkpoint
        engine = self._engine = await InProcessEngine.start(self._settings.arguments(path), version=version)
        if from_memory:
            await self._put_what_waits(engine, version)
        for adapter in adapters:
            await engine.load_adapter(adapter)
        self._opened = f"{self._clock() - began:.1f} s, in this process"
        return engine

    async def _put_what_waits(self, engine: InProcessEngine, version: int) -> None:
        from rollpool.worker.launch.hot_swap_messages import Refused

        assert self._waiting is not None, "seen before"
        (directory, tensors), self._waiting = self._waiting, None
        try:
            await asyncio.to_thread(engine.embedded.side.deposit, directory, tensors, self._settings.staging)
        except Refused as error:
            raise EngineUnavailable(f"the parameters of policy {version} are not served: {error}") from error
        await engine.swap(directory, version)

    async def watch(self) -> str:
        """Return the reason once a part of the engine has failed."""
        assert self._engine is not None, "open first"
        return await self._engine.embedded.watch()

    async def close(self) -> None:
        """End the engine's threads, and free its devices."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.embedded.close()
