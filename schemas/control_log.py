"""Entries of `control` and `acks`: plain fields for people, and how both are read back.

Invariant: what a command asks for stands in its body alone, and the plain fields beside it say the same; an entry that
somebody made up is skipped by whoever reads it, and harms nobody.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from rollpool.schemas.commands import Ack, Command
from rollpool.schemas.errors import SchemaMismatch
from rollpool.schemas.wire import pack_model, unpack_command


def command_fields(command: Command) -> dict[str, str | bytes]:
    """A command as an entry of `control`: what is not said is left out."""
    return {**_plain(command), "body": pack_model(command)}


def _plain(command: Command) -> dict[str, str]:
    policy = command.policy
    said: dict[str, object] = {
        "kind": command.kind,
        "policy": policy.version if policy else None,
        "source": policy.source if policy else None,
        "base": policy.base if policy else None,
        "run": policy.run if policy else command.run,
        "generation": policy.generation or None if policy else None,
        "mode": command.mode,
        "way": command.way if command.way != "auto" else None,
        "min_serving": command.min_serving,
        "concurrency": _concurrency(command),
        "within_s": command.within_s,
        "workers": ",".join(command.workers) if command.workers is not None else None,
    }
    return {name: str(value) for name, value in said.items() if value is not None}


def _concurrency(command: Command) -> int | str | None:
    return (command.concurrency or "default") if command.kind == "concurrency" else None


def command_of(fields: Mapping[bytes, bytes]) -> Command | None:
    """The command of an entry of `control`; None where there is none in it."""
    try:
        return unpack_command(fields.get(b"body", b""))
    except SchemaMismatch:
        return None


def ack_of(fields: Mapping[bytes, bytes]) -> Ack | None:
    """The answer of an entry of `acks`; None where it is none."""
    text: dict[str, Any] = {
        name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()
    }
    optional = {"version": text.get("version") or None, "error": text.get("error") or None}
    try:
        return Ack.model_validate({**text, **optional}, strict=False)
    except ValidationError:
        return None


def order_of(entry: str) -> tuple[int, int]:
    """Of two entries of one stream the later one has the greater."""
    milliseconds, _, number = entry.partition("-")
    return int(milliseconds), int(number or 0)
