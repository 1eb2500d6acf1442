"""Entries of `control` and `acks`: readable as they stand, and the same again when they are read back."""

from typing import Any

import pytest

from rollpool.producer.control import makes_void, named
from rollpool.schemas import Ack, Command, Policy
from rollpool.schemas.control_log import ack_of, command_fields, command_of


def checkpoint(version: int, path: str = "") -> Policy:
    return Policy(version=version, checkpoint=path or f"/models/{version}", run="r")


def adapter(version: int, run: str = "r", base: str | None = "/models/1") -> Policy:
    return Policy(version=version, lora_path=f"/lora/{version}", base=base, run=run)


def stored(fields: dict[str, Any]) -> dict[bytes, bytes]:
    return {name.encode(): value if isinstance(value, bytes) else str(value).encode() for name, value in fields.items()}


COMMANDS: list[tuple[Command, dict[str, str]]] = [
    (
        Command(policy=checkpoint(3), mode="drain", way="restart", min_serving=0, workers=("a", "b")),
        {
            **{"kind": "policy", "policy": "3", "source": "/models/3", "run": "r"},
            **{"mode": "drain", "way": "restart", "min_serving": "0", "workers": "a,b"},
        },
    ),
    (
        Command(policy=adapter(4).model_copy(update={"generation": 2})),
        {
            **{"kind": "policy", "policy": "4", "source": "/lora/4", "base": "/models/1", "run": "r"},
            "generation": "2",
        },
    ),
    (Command(kind="pause"), {"kind": "pause"}),
    (Command(kind="drain", within_s=0.0), {"kind": "drain", "within_s": "0.0"}),
    (Command(kind="concurrency", concurrency=8), {"kind": "concurrency", "concurrency": "8"}),
    (Command(kind="concurrency"), {"kind": "concurrency", "concurrency": "default"}),
    (Command(kind="cancel", run="math"), {"kind": "cancel", "run": "math"}),
]


@pytest.mark.parametrize(("command", "plain"), COMMANDS, ids=[named(command) for command, _ in COMMANDS])
def test_a_command_is_plain_text_beside_its_body_and_reads_back(command: Command, plain: dict[str, str]) -> None:
    fields = command_fields(command)
    assert {name: value for name, value in fields.items() if name != "body"} == plain
    assert command_of(stored(fields)) == command


def test_what_is_no_command_is_none() -> None:
    assert command_of({}) is None
    assert command_of({b"kind": b"pause", b"body": b"nonsense"}) is None


@pytest.mark.parametrize(
    "ack",
    [
        Ack(worker="w", command="1-0", version=0, state="applied", seconds=1.5, detail="swapped"),
        Ack(worker="w", command="1-0", kind="pause", state="failed", seconds=0.0, error="no\nengine"),
    ],
    ids=["policy", "pause"],
)
def test_an_answer_reads_back_as_a_host_wrote_it(ack: Ack) -> None:
    written = {name: "" if value is None else value for name, value in ack.model_dump().items()}
    assert ack_of(stored(written)) == ack


def test_an_answer_that_somebody_made_up_is_none() -> None:
    assert ack_of({b"worker": b"w", b"command": b"1-0", b"state": b"perhaps", b"seconds": b"1"}) is None
    assert ack_of({b"worker": b"w", b"state": b"applied", b"seconds": b"1"}) is None


ONE = Command(policy=checkpoint(1))


@pytest.mark.parametrize(
    ("later", "command", "void"),
    [
        (Command(policy=checkpoint(2)), ONE, True),
        (Command(kind="pause"), ONE, False),
        (Command(policy=adapter(2)), ONE, False),
        (Command(policy=adapter(3)), Command(policy=adapter(2)), True),
        (Command(policy=adapter(3, run="other")), Command(policy=adapter(2)), False),
        (Command(policy=checkpoint(2)), Command(policy=adapter(2)), True),
        (Command(policy=checkpoint(2, "/models/1")), Command(policy=adapter(2)), False),
        (Command(kind="resume"), Command(kind="drain"), True),
        (Command(kind="concurrency"), Command(kind="drain"), False),
        (Command(kind="concurrency"), Command(kind="concurrency", concurrency=3), True),
        (Command(kind="flush"), Command(kind="flush"), False),
        (Command(kind="cancel", run="r"), Command(kind="cancel", run="r"), False),
    ],
)
def test_only_the_last_command_of_a_kind_is_in_force(later: Command, command: Command, void: bool) -> None:
    assert makes_void(later, command) is void
