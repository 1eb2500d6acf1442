"""How one engine is launched, or where it is attached to.

Invariant: settings that exist can be launched on one host by one worker: what sglang-jax does not implement
(data parallelism, several nodes) and what the worker itself must own (model, host, port) is refused here,
by name.
"""

import sys
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

#: Flags the worker sets from settings of its own; a second value in `extra_args` would win silently.
_OWNED_FLAGS = {
    "--model-path": "the policy's source",
    "--host": "engine.host",
    "--port": "engine.port",
    "--tp-size": "engine.tp_size",
    "--tensor-parallel-size": "engine.tp_size",
    "--device": "engine.device",
    "--max-seq-len": "engine.max_seq_len",
    "--context-length": "engine.max_seq_len",
    "--page-size": "engine.page_size",
    "--max-running-requests": "engine.max_running_requests",
    "--api-key": "engine.api_key",
    "--enable-lora": "engine.max_lora_rank",
    "--max-lora-rank": "engine.max_lora_rank",
    "--lora-target-modules": "engine.max_lora_rank, which takes all modules",
    "--max-loras-per-batch": "engine.adapter_slots",
    "--lora-paths": "the published policies",
    "--random-seed": "the worker, which picks one that compiles nothing anew",
}

_NO_DP = "sglang-jax does not implement data parallelism: use one v4-8 TPU VM for each engine"
#: Flags that sglang-jax parses but cannot serve with, each with its reason.
_ONE_ONLY = {
    "--dp-size": _NO_DP,
    "--data-parallel-size": _NO_DP,
    "--nnodes": "a worker owns one host: use one v4-8 TPU VM for each engine instead of a multi-host slice",
}


class EngineSettings(BaseModel):
    """One engine of one host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Attach to this server and launch nothing.
    url: str | None = Field(default=None, pattern=r"^https?://")
    #: The interpreter of the engine's own environment; its pins are strict, so it is rarely the worker's.
    python: Path = Path(sys.executable)
    #: Script that starts the server; None: the one that comes with rollpool.
    launcher: Path | None = None
    #: Script that says what the engine's environment holds, one line of JSON; None: the one that comes with rollpool.
    probe: Path | None = None
    #: Model for a worker that starts before any policy was published.
    model_path: str | None = None
    #: The whole of a v4-8, as its users count it; the preflight says which value the devices allow.
    tp_size: int = Field(default=8, ge=1)
    #: What JAX runs on: `tpu`, or `cpu` for trials.
    device: str = "tpu"
    #: Loopback: nobody but this host's worker calls the engine.
    host: str = "127.0.0.1"
    #: 0 picks a free port just before the launch.
    port: int = Field(default=0, ge=0, le=65535)
    #: Prompt and completion together, at most; None: the model's own limit.
    max_seq_len: int | None = Field(default=None, ge=16)
    #: With the TPU's attention kernel the requests that run at once are limited to about 131072 pages in
    #: all, so a long context with pages of one token runs only a few.
    page_size: int | None = Field(default=None, ge=1)
    #: Requests the engine runs at once, at most; None: the engine's own limit.
    max_running_requests: int | None = Field(default=None, ge=1)
    #: Largest rank of an adapter that can be served beside the weights, on the main line alone; None: adapters are
    #: merged into a checkpoint. Every slot takes the memory of this rank, used or not.
    max_lora_rank: int | None = Field(default=None, ge=1)
    #: Adapters held at once, beside the weights without one.
    adapter_slots: int = Field(default=4, ge=1)
    #: Kept over restarts, so that a restart on new weights compiles nothing.
    jit_cache_dir: Path = Path("/tmp/jit_cache")
    #: Further arguments of the server, as on its command line.
    extra_args: tuple[str, ...] = ()
    #: Further environment of the server.
    env: dict[str, str] = Field(default_factory=dict)
    #: Key the engine asks for; sent with each call.
    api_key: SecretStr | None = None
    #: Compiling for a TPU with a cold cache can take half an hour.
    start_timeout_s: float = Field(default=1800.0, gt=0)
    #: What SIGTERM is given before SIGKILL; 0: it is not sent. sglang-jax notices it within 5 s, drains, and then ends
    #: its scheduler by SIGKILL itself: for an engine that has nothing in flight that is a delay and no gain.
    stop_timeout_s: float = Field(default=0.0, ge=0)
    #: Without any progress for so long, while requests are in flight, the engine counts as dead. Over the
    #: time that one new shape takes to compile.
    stall_timeout_s: float = Field(default=300.0, gt=0)
    #: Taken while an engine lives: one worker a host, since a TPU serves one process.
    host_lock: Path = Path("/tmp/rollpool-host.lock")

    @property
    def lora(self) -> bool:
        """Whether engines are launched so that requests can name adapters."""
        return self.max_lora_rank is not None

    @field_validator("extra_args", mode="after")
    @classmethod
    def _launchable(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        for flag, value in _flags(args):
            if flag in _OWNED_FLAGS:
                raise ValueError(f"extra_args: {flag} belongs to {_OWNED_FLAGS[flag]}; take it out")
            if flag in _ONE_ONLY and value != "1":
                raise ValueError(f"extra_args: {flag} {value}: {_ONE_ONLY[flag]}")
        return args

    @model_validator(mode="after")
    def _attach_or_launch(self) -> Self:
        if self.url is not None and self.extra_args:
            raise ValueError("extra_args: have no effect on an engine that is attached by url; take them out")
        return self


def _flags(args: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """Each `--flag` with the word after it, or after its `=`."""
    found: list[tuple[str, str | None]] = []
    for i, arg in enumerate(args):
        if arg.startswith("--"):
            flag, eq, value = arg.partition("=")
            following = args[i + 1] if i + 1 < len(args) else None
            found.append((flag, value if eq else following))
    return found
