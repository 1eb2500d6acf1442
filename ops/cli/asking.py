"""How a command asks the server.

Invariant: what goes wrong between here and the server reaches the operator as one line that says what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from rollpool.schemas import Keys, RollpoolError
from rollpool.schemas.connection import connect, not_permitted, without_password

Url = Annotated[str, typer.Option(envvar="ROLLPOOL_URL", help="Server of the pool.")]
Pool = Annotated[str, typer.Option(envvar="ROLLPOOL_POOL", help="Name of the pool.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


@contextmanager
def asking(url: str, keys: Keys) -> Iterator[Redis]:
    """A client of the pool's server; nothing is tried again, since a person waits.

    Raises:
        RollpoolError: the server cannot be reached, or answers with an error.
    """
    with connect(url, retries=0, slot_key=keys.runs) as client, told(url):
        yield client


@contextmanager
def told(url: str) -> Iterator[None]:
    """Turn the client library's errors into ours."""
    try:
        yield
    except NoPermissionError as error:
        raise not_permitted(error, f"the server at {without_password(url)}") from error
    except ResponseError as error:
        raise RollpoolError(
            f"the server at {without_password(url)} answered {str(error)!r}; if a key has the wrong type, "
            "`rollpool doctor` names it; rollpool needs Redis 7.0 or newer, or Valkey"
        ) from error
    except RedisError as error:
        raise RollpoolError(
            f"the server at {without_password(url)} cannot be reached ({error}); set --url or ROLLPOOL_URL"
        ) from error
