"""Breaks the settle script of a worker, to see that the checker notices; on the path of such workers alone.

Invariant: a worker that cannot be broken as asked does not start: a break without effect would pass for a good checker.
"""

import hashlib
import importlib
import os
import re
import sys

#: What is replaced, and by what.
BREAKS = {
    # Whatever is recorded before is forgotten: each of two finishers settles the job.
    "settle": (r"if before ~= 'open' then return 0, before or 'gone' end", "if not before then return 0, 'gone' end"),
    # Some jobs are acknowledged and deleted, and nothing is recorded.
    "lose": (r"(local function record\([^)]*\))", r"\1 if tonumber(index) % 17 == 3 then return 1, outcome end"),
}


def break_script(kind: str) -> None:
    """Replace the text of the settle script."""
    # By name: the package hands on a function of the module's own name.
    script = importlib.import_module("rollpool.schemas.scripts.settle")._SCRIPT
    old, new = BREAKS[kind]
    script.text, count = re.subn(old, new, script.text)
    if count != 1:
        raise SystemExit(f"the settle script cannot be broken as {kind!r}: it has {old!r} {count} times")
    script.digest = hashlib.sha1(script.text.encode(), usedforsecurity=False).hexdigest()


def break_policy() -> None:
    """Let every job run on every policy."""
    from rollpool.schemas import PromptJob

    PromptJob.may_run_on = lambda self, version: True  # type: ignore[method-assign]


if "rq.cli" in sys.orig_argv and (asked := os.environ.get("STORM_BREAK")):
    break_policy() if asked == "policy" else break_script(asked)
