"""What can be known to go wrong before minutes are spent on a launch.

Invariant: a launch that passed can fail only by what needs the engine to find out; each refusal says what
is the matter, with what, and what to do. `SettingsError` is for what stays wrong until somebody changes a
setting, `EngineUnavailable` for what may pass by itself.
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import shutil
import socket
import sys
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from rollpool.schemas.errors import SettingsError
from rollpool.worker.engines import diagnosis
from rollpool.worker.engines.host_lock import HostLock
from rollpool.worker.engines.listener import listener_of
from rollpool.worker.engines.protocol import EngineUnavailable
from rollpool.worker.engines.settings import EngineSettings

__all__ = ["HostLock", "ProbeReport", "engine_environment", "preflight", "probe"]

log = logging.getLogger(__name__)

#: Seconds for the probe: it imports JAX and opens the devices, which on a TPU takes tens of seconds.
_PROBE_TIMEOUT_S = 180.0

#: Free bytes below which nothing is launched. A margin, not a measured need: a full disk loses the JIT
#: cache, and with it the speed of every restart, and the log that would say why.
_MIN_FREE_BYTES = 1 << 30

#: JAX keeps only programs that took a second to compile, and a server compiles many small ones; both lines lower the
#: bounds themselves, but only for their scheduler, and main not over an inherited one.
_CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

#: A model on the hub: `organisation/name`.
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


class ProbeReport(BaseModel):
    """What the engine's own interpreter says of itself."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    #: The installed version of the package; decides the dialect.
    sglang_jax: str
    jax: str
    python: str
    #: What JAX runs on: `tpu`, `cpu`, `gpu`.
    platform: str
    #: How many devices JAX sees on this host.
    devices: int
    #: False when msgpack decodes strings as bytes, because an old package overwrote the new one.
    msgpack_ok: bool
    single_process: bool = False
    lora: bool = False


async def preflight(settings: EngineSettings) -> ProbeReport:
    """Check everything that a launch with these settings needs.

    Raises:
        SettingsError: a setting cannot work on this host.
        EngineUnavailable: the host cannot run an engine now.
    """
    check_model(settings.model_path)
    check_port(settings.host, settings.port)
    check_cache(settings.jit_cache_dir)
    report = await probe(settings)
    check_msgpack(report, settings.python)
    check_devices(report, settings)
    check_lora(report, settings)
    return report


async def probe(settings: EngineSettings) -> ProbeReport:
    """Ask the engine's interpreter, in the environment the engine would get, what it is."""
    script = str(settings.probe or resources.files("rollpool.worker") / "launch" / "probe.py")
    try:
        process = await asyncio.create_subprocess_exec(
            str(settings.python),
            script,
            env=engine_environment(settings),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise SettingsError(
            f"engine.python: cannot run {settings.python}: {error}; set it to the interpreter that has sglang-jax"
        ) from error
    try:
        out, err = await asyncio.wait_for(process.communicate(), _PROBE_TIMEOUT_S)
    except TimeoutError:
        raise EngineUnavailable(
            f"{settings.python} {script} told nothing within {_PROBE_TIMEOUT_S:.0f} s; opening the devices hangs "
            "while another process uses them"
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return parse_probe(out, err, settings)


def parse_probe(out: bytes, err: bytes, settings: EngineSettings) -> ProbeReport:
    """The report in the last line of `out`; what went wrong where there is none."""
    lines = out.decode(errors="replace").strip().splitlines()
    try:
        said = json.loads(lines[-1]) if lines else {}
        if "error" not in said:
            return _on_device(ProbeReport.model_validate(said), err, settings)
    except (ValueError, TypeError, ValidationError):
        said = {}
    words = str(said.get("error") or "it printed no report")
    tail = diagnosis.last_lines(err)
    advice = diagnosis.advice(f"{words}\n{tail}")
    note = f"the engine's interpreter {settings.python} cannot serve: {words}"
    raise EngineUnavailable(f"{note}: {advice}" if advice else f"{note}\n{tail}".rstrip())


def _on_device(report: ProbeReport, err: bytes, settings: EngineSettings) -> ProbeReport:
    """JAX falls back to the CPU, with a line on stderr, when it may not have the TPU."""
    if report.platform == settings.device:
        return report
    tail = diagnosis.last_lines(err)
    advice = diagnosis.advice(tail) or (
        f"set engine.device={report.platform}, or engine.python to an environment with jax[{settings.device}]"
    )
    raise EngineUnavailable(
        f"engine.device={settings.device}, but JAX in {settings.python} runs on {report.platform}: {advice}"
    )


def check_msgpack(report: ProbeReport, python: Path) -> None:
    """sglang-jax 0.0.1.post1 installs two packages that write the same module."""
    if not report.msgpack_ok:
        raise SettingsError(
            f"msgpack in {python} decodes strings as bytes, since the package msgpack-python overwrote it: repair "
            f"it with `{python} -m pip install --force-reinstall --no-deps msgpack`"
        )


def check_devices(report: ProbeReport, settings: EngineSettings) -> None:
    """`tp_size` against the devices there are; says which value would work."""
    have, want = report.devices, settings.tp_size
    chips = " (a v4-8 is 4 chips, which JAX usually shows as 4 devices)" if settings.device == "tpu" else ""
    if have < want or have % want:
        raise SettingsError(f"engine.tp_size: {have} devices visible{chips}, tp_size={want}: set engine.tp_size={have}")
    if have > want and "--device-indexes" not in settings.extra_args:
        log.warning(
            "%d devices visible, tp_size=%d: the engine leaves %d idle; set engine.tp_size=%d to use all",
            *(have, want, have - want, have),
        )


def check_lora(report: ProbeReport, settings: EngineSettings) -> None:
    """Without LoRA an engine serves all the same: adapters are merged for it."""
    if settings.lora and not report.lora:
        log.warning(
            "engine.max_lora_rank=%d has no effect: sglang-jax %s has no LoRA, so adapters are merged into checkpoints",
            *(settings.max_lora_rank, report.sglang_jax),
        )


def check_model(model_path: str | None) -> None:
    """A directory with a config, or a name on the hub, which only the engine can look up."""
    if model_path is None:
        return
    path = Path(model_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EngineUnavailable(
                f"the model directory {path} has no config.json; give the directory of a Hugging Face checkpoint"
            )
    elif not _HUB_NAME.match(model_path):
        raise EngineUnavailable(
            f"there is no model at {model_path}; give a local directory, or a name on the hub such as org/name"
        )


def check_port(host: str, port: int) -> None:
    """A second server on a port loads all its weights before it fails."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise SettingsError(f"engine.host: cannot listen on {host}:{port}: {error}") from error
            holder = listener_of(port)
            who = f"process {holder.pid}" if holder else "another process"
            raise EngineUnavailable(
                f"{who} already listens on port {port}: end it, or set engine.port=0 to have a free port picked"
            ) from None


def check_cache(directory: Path) -> None:
    """The JIT cache must take writes, and the disk must have room."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mark = directory / f".rollpool-{os.getpid()}"
        mark.touch()
        mark.unlink()
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise SettingsError(
            f"engine.jit_cache_dir: cannot write to {directory}: {error}; without it every restart compiles anew"
        ) from error
    if free < _MIN_FREE_BYTES:
        raise EngineUnavailable(
            f"{free >> 20} MiB are free on the disk of {directory}, which an engine needs for its JIT cache and "
            f"log; free at least {_MIN_FREE_BYTES >> 20} MiB, or move engine.jit_cache_dir"
        )


def engine_environment(settings: EngineSettings) -> dict[str, str]:
    """The engine's environment: ours, without what would lead another interpreter to our packages."""
    env = dict(os.environ)
    if settings.python != Path(sys.executable):
        env.pop("PYTHONPATH", None)
        env.pop("PYTHONHOME", None)
    env |= {"JAX_COMPILATION_CACHE_DIR": str(settings.jit_cache_dir), **_CACHE_ALL, **settings.env}
    # With LoRA the engine opens the CPU too, to read adapters, which `tpu` alone would not let it; and `tpu,cpu` is
    # refused, since it compares the variable with `--device`. Unset, JAX opens both.
    if settings.lora and env.get("JAX_PLATFORMS") == "tpu":
        del env["JAX_PLATFORMS"]
    return env
