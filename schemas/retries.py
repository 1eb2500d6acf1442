"""Which failures of a connection are tried again.

Invariant: what another attempt may mend is tried again, and what none can mend (a certificate, a login, a permission,
a setting) is told at once.
"""

import ssl
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import AbstractBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, TimeoutError
from redis.retry import Retry

from rollpool.schemas.errors import NotPermitted, RollpoolError

T = TypeVar("T")

#: TLS ended, as when the server restarts: not what a certificate or a version does.
_PASSING = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

_SILENT_TLS = "; a port that does not speak TLS stays silent so: is it the server's TLS port?"


class TlsRefused(NotPermitted, RedisError):  # noqa: N818 - like those of `errors`
    """One side does not accept the other's certificate or TLS; the message says which and what to set."""


def final_error(error: BaseException, outer: BaseException | None = None) -> Exception | None:
    """What is behind a failed attempt, where no further attempt can mend it.

    Args:
        error: of the attempt.
        outer: what was being handled before the attempt; it is not behind the error, though Python chains it.
    """
    behind: BaseException | None = error
    seen = set[int]()
    while behind is not None and behind is not outer and id(behind) not in seen:
        seen.add(id(behind))
        if isinstance(behind, RollpoolError | AuthenticationError | NoPermissionError):
            return behind
        if isinstance(behind, ssl.SSLError) and not isinstance(behind, _PASSING):
            return TlsRefused(f"{error}; {_remedy(behind)}")
        behind = behind.__cause__ or behind.__context__
    return None


def _remedy(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            "the server's certificate was not accepted: ssl_ca_certs in the URL names the authority that signed it, "
            "and the certificate must name the host that the URL (or Sentinel, or the cluster) names"
        )
    if "WRONG_VERSION" in str(error) or "RECORD_LAYER" in str(error):
        return "the server does not speak TLS on this port: use its TLS port, or redis in place of rediss"
    if error.library in ("X509", "PEM"):
        return "a file that ssl_ca_certs, ssl_certfile or ssl_keyfile names is not what it should be"
    return (
        "TLS failed: if the server asks for a client's certificate, name ssl_certfile and ssl_keyfile in the URL, "
        "signed by an authority the server knows"
    )


class _Final(Exception):  # noqa: N818 - it never leaves this module
    """Carries an error past redis-py's retries, which know it by its kind alone."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class PatientRetry(Retry):
    """For blocking clients.

    Args:
        backoff: the pause before each further attempt.
        retries: how many.
        tls: whether the server is spoken to over TLS.
    """

    def __init__(self, backoff: AbstractBackoff, retries: int, *, tls: bool) -> None:
        super().__init__(backoff, retries)
        self._tls = tls

    def call_with_retry(self, do: Callable[[], T], *args: Any, **options: Any) -> T:
        """As in redis-py, less what no attempt can mend."""
        outer = sys.exception()

        def attempt() -> T:
            try:
                return do()
            except RedisError as error:
                _raise_final(error, outer)
                raise

        try:
            return super().call_with_retry(attempt, *args, **options)
        except _Final as final:
            raise final.error from None
        except TimeoutError as error:
            if self._tls and _silent(error):
                raise TimeoutError(f"{error}{_SILENT_TLS}") from error
            raise


class PatientAsyncRetry(AsyncRetry):
    """For asyncio clients; the arguments are those of `PatientRetry`."""

    def __init__(self, backoff: AbstractBackoff, retries: int, *, tls: bool) -> None:
        super().__init__(backoff, retries)
        self._tls = tls

    async def call_with_retry(self, do: Callable[[], Awaitable[T]], *args: Any, **options: Any) -> T:
        """As in redis-py, less what no attempt can mend."""
        outer = sys.exception()

        async def attempt() -> T:
            try:
                return await do()
            except RedisError as error:
                _raise_final(error, outer)
                raise

        try:
            return await super().call_with_retry(attempt, *args, **options)
        except _Final as final:
            raise final.error from None
        except TimeoutError as error:
            if self._tls and _silent(error):
                raise TimeoutError(f"{error}{_SILENT_TLS}") from error
            raise


def _raise_final(error: RedisError, outer: BaseException | None) -> None:
    if (final := final_error(error, outer)) is not None:
        raise _Final(final) from None


def _silent(error: TimeoutError) -> bool:
    return str(error).endswith("connecting to server")
