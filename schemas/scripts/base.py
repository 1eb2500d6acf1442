"""How a Lua file becomes a call.

Invariant: a script is sent by its digest, and by its text only when the server does not know it (a fresh server, a
failover); the caller never notices.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import NoScriptError

from rollpool.schemas.keys import Keys

#: What may be an argument of a script.
Arg = str | bytes | int | float


@cache
def _text(name: str) -> str:
    return files(__package__).joinpath(f"{name}.lua").read_text(encoding="utf-8")


class Script:
    """One Lua file of this folder, after what all of them share (`places.lua`)."""

    def __init__(self, name: str) -> None:
        self.text = f"{_text('places')}\n{_text(name)}"
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, client: AsyncRedis, keys: Keys, args: Sequence[Arg]) -> Any:
        """Run on an asyncio client."""
        try:
            return await client.evalsha(self.digest, 1, keys.runs, *args)
        except NoScriptError:
            return await self.by_text(client, keys, args)

    async def by_text(self, client: AsyncRedis, keys: Keys, args: Sequence[Arg]) -> Any:
        """The same, sent by its text: for arguments so large that sending them twice would be the greater cost."""
        return await client.eval(self.text, 1, keys.runs, *args)

    def blocking(self, client: Redis, keys: Keys, args: Sequence[Arg]) -> Any:
        """Run on a blocking client, for threads of their own."""
        try:
            return client.evalsha(self.digest, 1, keys.runs, *args)
        except NoScriptError:
            return client.eval(self.text, 1, keys.runs, *args)
