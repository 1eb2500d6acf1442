"""What JAX's cache of compiled programs holds, by which a launch is known to have compiled nothing.

Invariant: it is only looked at; a directory that cannot be read holds nothing.
"""

import os
from contextlib import suppress
from pathlib import Path

#: How JAX ends the name of a compiled program's file; beside it lie others, with the time of its last use.
_PROGRAM = "-cache"


def programs_in(directory: Path) -> frozenset[str]:
    """The programs it holds; those that come to it while an engine starts, the engine had to compile."""
    with suppress(OSError), os.scandir(directory) as entries:
        return frozenset(entry.name for entry in entries if entry.name.endswith(_PROGRAM))
    return frozenset()
