"""Append-only files of facts, one JSON object a line: what a process knew before it was killed.

Invariant: what `sync` returned after is on the disk; a line that a killed writer left torn is skipped, never misread
and never glued to the next one.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Fact = dict[str, Any]


class Journal:
    """One writer at a time; the next one goes on in the same file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        # Ends a line that the writer before this one may have left torn.
        os.write(self._file, b"\n")

    def add(self, fact: str, **fields: Any) -> None:
        """Append one fact: in the system's hands, so that it outlives this process, though not the machine."""
        line = memoryview(json.dumps({"fact": fact, **fields}, separators=(",", ":")).encode() + b"\n")
        while line:
            line = line[os.write(self._file, line) :]

    def sync(self) -> None:
        """Return when everything added is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """End; harmless to repeat."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> Iterator[Fact]:
    """The facts of a file, in order; nothing where there is no file."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                fact = json.loads(line)
            except ValueError:  # torn by a kill, or the empty line before a new writer's first
                continue
            if isinstance(fact, dict):
                yield fact


def replace(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all: a reader, or a restart, sees the old one or the new one."""
    draft = path.with_name(f"{path.name}.new")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
