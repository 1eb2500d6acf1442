"""An entry of a results stream, as a trainer reads it.

Invariant: every entry becomes one group. One that a host settled holds the group's body; one that was put together from
parts holds the body of each, in order; one that the server ended by itself holds none, and its plain fields say it all.
"""

import re
from collections.abc import Mapping

import numpy as np

from rollpool.schemas.errors import SchemaMismatch
from rollpool.schemas.jobs import SamplingParams
from rollpool.schemas.results import OUTCOMES, Group
from rollpool.schemas.wire import unpack_group

#: Python refuses to read numbers of thousands of digits, which anyone could add by hand.
_NUMBER = re.compile(r"[0-9]{1,18}")


def bodies_of(fields: Mapping[bytes, bytes]) -> list[bytes]:
    """The encoded parts, in order; one of a group that was not split, none of one that the server ended."""
    if b"body" not in fields:
        return []
    parts = (fields.get(f"body:{number}".encode()) for number in range(1, len(fields)))
    return [fields[b"body"], *(part for part in parts if part is not None)]


def size_of(fields: Mapping[bytes, bytes]) -> int:
    """Bytes that count against the bound on unread results."""
    return sum(map(len, bodies_of(fields)))


def group_of(run: str, batch: str, fields: Mapping[bytes, bytes]) -> Group:
    """The group of one entry. Raises SchemaMismatch when it is none of ours, or a body is of another schema."""
    parts = [unpack_group(body) for body in bodies_of(fields)]
    if not parts:
        return _without_body(run, batch, fields)
    if len(parts) == 1:
        return parts[0]
    joined = {
        "samples": tuple(sample for part in parts for sample in part.samples),
        "worker": ",".join(dict.fromkeys(part.worker for part in parts)),
        "seconds": max(part.seconds for part in parts),
    }
    return parts[0].model_copy(update=joined)


def _without_body(run: str, batch: str, fields: Mapping[bytes, bytes]) -> Group:
    text = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
    index = text.get("job", "").removeprefix(f"{batch}/")
    if not _NUMBER.fullmatch(index):
        raise SchemaMismatch(f"a result of batch {batch} names none of its jobs: {text.get('job')!r:.80}")
    policy = text.get("policy", "")
    return Group(
        run=run,
        batch=batch,
        index=int(index),
        outcome=next((known for known in OUTCOMES if known == text.get("outcome")), "failed"),
        policy_version=int(policy) if _NUMBER.fullmatch(policy) else 0,
        prompt_ids=np.empty(0, np.int32),
        samples=(),
        sampling=SamplingParams(),
        error=text.get("error") or None,
    )
