"""A host's settings: from the environment, from `rollpool.toml`, with the defaults the reasons for stand beside.

Invariant: a wrong setting is refused at start, by its name and with what is allowed; a misspelt one is not ignored.
"""

import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings import SettingsError as EnvSettingsError

from rollpool.schemas import ChangeMode, SettingsError
from rollpool.worker.engines.settings import EngineSettings

PREFIX = "ROLLPOOL_"

#: Where the file is looked for when ROLLPOOL_CONFIG does not name one.
DEFAULT_FILE = Path("rollpool.toml")

#: Variables with our prefix that are not a host's settings: the trainer's, and those of the local tools.
_OTHERS = {"CONFIG", "POOL", "RUN", "CACHE", "LOCAL_ENGINE_PYTHON", "LIFELINE_FD"}


class WorkerSettings(BaseSettings):
    """What one host needs to know."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, env_ignore_empty=True
    )

    #: Server of the pool; None: the one `rq worker` was given.
    url: str | None = None
    #: Samples kept in the engine, over what it runs at once: a quarter more than it runs waits inside it, so that it
    #: never idles for a round trip to the server.
    oversubscription: float = Field(default=1.25, ge=1.0, le=16.0)
    #: A job not renewed for so long is returned. A live host renews four times a lease, and the hosts look for what
    #: others lost up to eight times, so a job of a dead host is back, first in its lane, within 1.375 leases: 11 s.
    lease_s: float = Field(default=8.0, ge=0.5, le=3600.0)
    #: Seconds between heartbeats; a worker that misses five is listed no more.
    heartbeat_s: float = Field(default=2.0, ge=0.05, le=3600.0)
    #: Losses of the infrastructure (a worker that died, a connection that broke) a job may meet before it is dead:
    #: NeMo-RL's budget.
    max_attempts: int = Field(default=5, ge=1)
    #: Engines or workers that may die while they run a job alone before it is dead: twice is no accident.
    max_faults: int = Field(default=2, ge=1)
    #: Seconds one sample may take before its engine counts as having forgotten it, and the job runs again: well over
    #: what the longest completion takes.
    sample_timeout_s: float = Field(default=1800.0, gt=0.0)
    #: MiB of results that a run's trainer has not read, over which no more are made for it, while other runs go on:
    #: bounds the server's memory when a trainer stops collecting; 0: no bound.
    unread_mib: int = Field(default=1024, ge=0)
    #: Work in flight may finish for so long before a stop or a policy change gives it back. Preemption of a TPU VM
    #: leaves 30 s in all.
    drain_s: float = Field(default=20.0, ge=0.0, le=86400.0)
    #: What becomes of the work in flight when the weights change, where the command does not say: `resume` throws no
    #: token away, and keeps the host no longer than `requeue`.
    change_mode: ChangeMode = "resume"
    #: Directories and URLs that policies may come from, and what is under them; empty: from anywhere.
    model_roots: tuple[str, ...] = ()
    #: Where remote policies are fetched to, and adapters are merged: a local disk with room for two checkpoints.
    stage_dir: Path = Path("/tmp/rollpool/staged")
    #: GiB of that directory that may be used; 0: what its disk has, less a tenth.
    stage_gib: float = Field(default=0.0, ge=0.0)
    #: Version of `engine.model_path`, served until a policy is published.
    initial_version: int = Field(default=0, ge=0)
    #: Directory of the engine's log.
    log_dir: Path = Path("/tmp/rollpool")
    engine: EngineSettings = EngineSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=_file())


def _file() -> Path:
    named = os.environ.get(f"{PREFIX}CONFIG")
    if named and not Path(named).is_file():
        raise SettingsError(f"{PREFIX}CONFIG names {named}, which is not a file")
    return Path(named) if named else DEFAULT_FILE


def _refuse_unknown(environment: dict[str, str]) -> None:
    """Refuse variables of ours that nothing reads: a misspelt setting is a wrong one."""
    fields = {name.upper() for name in WorkerSettings.model_fields} | _OTHERS
    for name in environment:
        setting, nested, _ = name.upper().removeprefix(PREFIX).partition("__")
        if not name.upper().startswith(PREFIX):
            continue
        if setting not in fields or (nested and setting != "ENGINE"):
            raise SettingsError(f"{name}: there is no such setting; there are {', '.join(sorted(fields))}")


def load_settings(**flags: Any) -> WorkerSettings:
    """Read the settings; `flags` win over the environment, which wins over the file.

    Raises:
        SettingsError: names the setting and what is wrong with it.
    """
    _refuse_unknown(dict(os.environ))
    try:
        return WorkerSettings(**flags)
    except ValidationError as error:
        lines = []
        for found in error.errors(include_url=False):
            name = ".".join(str(part) for part in found["loc"]) or "settings"
            lines.append(f"{name}: {found['msg']} (got {found['input']!r:.80})")
        raise SettingsError("; ".join(lines)) from error
    except EnvSettingsError as error:  # an `engine` that is no JSON
        raise SettingsError(f"{error}: {error.__cause__}") from error
    except (OSError, ValueError) as error:  # no readable file, or no TOML
        raise SettingsError(f"{_file()}: {error}") from error
