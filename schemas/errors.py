"""Every failure a user can meet, by name.

Invariant: each message says what happened, to what, and what to do next; every error of ours is a
`RollpoolError`, so that one `except` is enough for a trainer.
"""


class RollpoolError(Exception):
    """Root of everything rollpool raises on purpose."""


class InvalidPrompt(RollpoolError, ValueError):  # noqa: N818 - the words of the design
    """A prompt, or a parameter that goes with it, was refused before anything was sent."""


class BacklogFull(RollpoolError):  # noqa: N818
    """The pool's backlog is at its limit; wait, or enqueue less."""


class PolicyUnknown(RollpoolError):  # noqa: N818
    """A policy version was named that nobody published."""


class PolicyRejected(RollpoolError):  # noqa: N818
    """A policy could not be published: its version does not rise, or its source is not allowed."""


class EngineUnavailable(RollpoolError):  # noqa: N818
    """The engine of this host cannot be launched, reached, or made to generate."""


class PoolTimeout(RollpoolError, TimeoutError):  # noqa: N818
    """What was waited for did not happen in the given time; nothing was lost."""


class SchemaMismatch(RollpoolError):  # noqa: N818
    """A body was written by another major version of rollpool, or is not one of its bodies."""


class NotPermitted(RollpoolError):  # noqa: N818
    """The server refused a command to this user; the message names the role that is needed."""


class SettingsError(RollpoolError, ValueError):
    """A setting was refused at start; the message names it."""
