"""Typed caller of `publish.lua`: a policy is recorded, current and announced, or none of it."""

from typing import Any, Literal, NamedTuple

from redis.asyncio import Redis

from rollpool.schemas.commands import Command
from rollpool.schemas.control_log import command_fields
from rollpool.schemas.keys import Keys
from rollpool.schemas.policies import CHECKPOINTS, Policy
from rollpool.schemas.scripts.base import Arg, Script

_SCRIPT = Script("publish")

Answer = Literal["new", "same", "other", "old", "taken", "held", "moved", "rebased"]


class Answered(NamedTuple):
    """What the server answered; what the number and the text are, `publish.lua` and `rollback.lua` say."""

    answer: Answer
    number: int
    text: str = ""

    @classmethod
    def of(cls, reply: Any) -> "Answered":
        """From a script's reply."""
        answer, number, text = reply
        return cls(answer.decode(), int(number), text.decode())


def policy_of(command: Command) -> Policy:
    """The policy of a command for one."""
    assert command.policy is not None, "the model checks it"
    return command.policy


def field_prefix(policy: Policy) -> str:
    """What the fields of its lineage begin with in the hash of policies."""
    return "" if policy.lineage == CHECKPOINTS else f"{policy.run}:"


def flat(command: Command) -> list[Arg]:
    """The entry of a command on `control`, as fields and values in turn."""
    return [part for field in command_fields(command).items() for part in field]


async def publish(
    client: Redis, keys: Keys, command: Command, *, lease_ms: int = 900_000, base_asked: bool = True
) -> Answered:
    """Publish the policy of a command, and send the command.

    Args:
        client: of the pool's server.
        keys: of the pool.
        command: for a policy, of the generation that its lineage has.
        lease_ms: for which no other run may publish checkpoints.
        base_asked: False: the base of the adapter is only the current checkpoint, so another one is not refused where
            the version names this adapter already.
    """
    policy = policy_of(command)
    source = "checkpoint" if policy.lora_path is None else "lora_path"
    words = policy.model_dump_json(include={source})[1:-1]
    args: list[Arg] = [policy.run, policy.lineage, field_prefix(policy), policy.version, policy.model_dump_json()]
    args += [policy.source, words, policy.base or "", int(base_asked), policy.generation, lease_ms, *flat(command)]
    return Answered.of(await _SCRIPT(client, keys, args))
