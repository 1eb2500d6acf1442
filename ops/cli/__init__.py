"""The `rollpool` command: what an operator runs.

Invariant: commands print what they found or did on stdout and exit 0; an error of ours is one line on stderr that says
what to do, and exit 1; Ctrl-C ends what was started and exits 130.
"""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command; a trainer's light installation is told what the command needs."""
    try:
        from rollpool.ops.cli.app import app
    except ModuleNotFoundError as error:
        sys.exit(f"rollpool: the command needs {error.name}: pip install 'rollpool[ops]'")
    app()
