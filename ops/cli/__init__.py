"""The `rollpool` command: what an operator runs.

Invariant: commands print what they found or did on stdout and exit 0; an error of ours is one line on stderr that says
what to do, and exit 1; Ctrl-C ends what was started and exits 130.
"""

from rollpool.ops.cli.app import app

__all__ = ["app"]
