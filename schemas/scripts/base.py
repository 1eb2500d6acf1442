"""How a Lua file becomes a call.

Invariant: a script is sent by its digest, and by its text only when the server does not know it (a fresh server, a
failover); the caller never notices.
"""

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import NoScriptError

#: What may be an argument of a script.
Arg = str | bytes | int | float


class Script:
    """One Lua file of this folder."""

    def __init__(self, name: str) -> None:
        self.text = files(__package__).joinpath(f"{name}.lua").read_text(encoding="utf-8")
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, client: AsyncRedis, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run on an asyncio client."""
        try:
            return await client.evalsha(self.digest, len(keys), *keys, *args)
        except NoScriptError:
            return await client.eval(self.text, len(keys), *keys, *args)

    def blocking(self, client: Redis, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run on a blocking client, for threads of their own."""
        try:
            return client.evalsha(self.digest, len(keys), *keys, *args)
        except NoScriptError:
            return client.eval(self.text, len(keys), *keys, *args)
