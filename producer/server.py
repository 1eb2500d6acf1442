"""The pool's connections to its server, and one language for its failures.

Invariant: whatever goes wrong between here and the server reaches the user as a RollpoolError that says what was
being done and what to do next; a reader that blocks never shares a connection with a command.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    ResponseError,
    TimeoutError,
)

from rollpool.schemas.connection import DEFAULT_POOL, DEFAULT_URL, connect_async, not_permitted, without_password
from rollpool.schemas.errors import BacklogFull, NotPermitted, RollpoolError, SettingsError
from rollpool.schemas.jobs import NAME_PATTERN
from rollpool.schemas.keys import Keys

#: The run of a trainer that names none.
DEFAULT_RUN = "default"

#: Milliseconds a read blocks. Between two reads it is seen that a batch vanished, so this is how late that is told.
BLOCK_MS = 2000

#: Socket timeout of the blocking reader, seconds: well over twice its block, or an idle stream would look like a
#: dead server.
_READER_TIMEOUT_S = 5 * BLOCK_MS / 1000


class Server:
    """Where a pool object talks to: its address, its names and its two clients."""

    def __init__(self, url: str | None, pool: str | None, run: str | None) -> None:
        """Arguments left None come from ROLLPOOL_URL, ROLLPOOL_POOL and ROLLPOOL_RUN, then the defaults."""
        self.url = url or os.environ.get("ROLLPOOL_URL") or DEFAULT_URL
        self.keys = Keys(pool or os.environ.get("ROLLPOOL_POOL") or DEFAULT_POOL)
        self.run = run or os.environ.get("ROLLPOOL_RUN") or DEFAULT_RUN
        if not re.fullmatch(NAME_PATTERN, self.run):
            raise SettingsError(f"run {self.run!r}: a run's name is letters, digits, '.', '_' and '-'")
        slot_key = self.keys.runs
        self.client = connect_async(self.url, slot_key=slot_key)
        self.reader = connect_async(self.url, timeout_s=_READER_TIMEOUT_S, slot_key=slot_key)

    @property
    def place(self) -> str:
        """The address without its credentials, for messages."""
        return without_password(self.url)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Turn the client library's errors into ours."""
        try:
            yield
        except NoPermissionError as error:
            raise not_permitted(error, what) from error
        except AuthenticationError as error:
            raise NotPermitted(f"{what}: {self.place} refused the login ({error}); check the URL's user") from error
        except OutOfMemoryError as error:
            raise BacklogFull(
                f"{what}: the server is at its memory limit ({error}); commit batches that were consumed, wait for the "
                "backlog to shrink, or raise maxmemory"
            ) from error
        except ResponseError as error:
            raise _from_script(error, what) from error
        except (ConnectionError, TimeoutError) as error:
            raise RollpoolError(
                f"{what}: no answer from {self.place} ({error}); check that the server runs and that ROLLPOOL_URL "
                "names it. The call may be repeated: under the same batch_id nothing happens twice"
            ) from error

    async def close(self) -> None:
        """Close both clients."""
        await self.client.aclose()
        await self.reader.aclose()


def _from_script(error: ResponseError, what: str) -> RollpoolError:
    """Inside a script the server's refusals lose their type and keep their words."""
    text = str(error)
    if "executing the script" in text or "ACL failure" in text:
        return not_permitted(NoPermissionError(text), what)
    if "OOM" in text or "maxmemory" in text:
        return BacklogFull(f"{what}: the server is at its memory limit ({text})")
    return RollpoolError(f"{what}: the server answered {text!r}; rollpool needs Redis 7.0 or newer, or Valkey")
