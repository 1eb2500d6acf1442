"""The msgpack codec: how models become the `body` of an entry, and back.

Invariant: what is decoded equals what was encoded, arrays included; arrays travel as little-endian bytes and come
back as read-only numpy views of the bytes msgpack hands over, which nothing here copies. A body starts with
its schema number: an unknown major is refused, unknown fields of a newer minor are ignored. Nothing here can run code.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgpack
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rollpool.schemas.commands import Command
from rollpool.schemas.errors import SchemaMismatch
from rollpool.schemas.jobs import PromptJob
from rollpool.schemas.results import Group, Sample

#: Major version of every body. A change that an older reader would misread raises it.
SCHEMA = 1

#: msgpack ext types of arrays, by dtype. The numbers are part of the format (tests/unit/golden).
_INT32 = 1
_FLOAT32 = 2
_DTYPES: dict[int, np.dtype[Any]] = {_INT32: np.dtype("<i4"), _FLOAT32: np.dtype("<f4")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Model = TypeVar("Model", bound=BaseModel)


def _encode_foreign(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.ndim == 1:
        if value.dtype in _CODES:  # what all of ours are; the rest is what a user put into metadata
            return msgpack.ExtType(_CODES[value.dtype], value.tobytes())
        code = _INT32 if np.issubdtype(value.dtype, np.integer) else _FLOAT32
        array = np.ascontiguousarray(value, dtype=_DTYPES[code])
        if not np.array_equal(array, value, equal_nan=code == _FLOAT32):
            raise TypeError(f"an array of {value.dtype} does not fit {_DTYPES[code]}; convert it yourself")
        return msgpack.ExtType(code, array.tobytes())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, BaseModel):
        return value.__dict__
    raise TypeError(f"msgpack carries no {type(value).__name__}: {value!r:.80}")


def _decode_ext(code: int, data: bytes) -> NDArray[Any]:
    if code not in _DTYPES:
        raise SchemaMismatch(f"ext type {code} is not one of rollpool's {sorted(_DTYPES)}; upgrade rollpool here")
    return np.frombuffer(data, dtype=_DTYPES[code])


def pack(value: Any) -> bytes:
    """Encode a plain value, arrays and models included; raises TypeError on what msgpack cannot carry."""
    packed: bytes = msgpack.packb(value, default=_encode_foreign, use_bin_type=True)
    return packed


def unpack(body: bytes) -> Any:
    """Decode what `pack` made. Raises SchemaMismatch on anything else."""
    try:
        return msgpack.unpackb(body, ext_hook=_decode_ext, raw=False, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise SchemaMismatch(f"not a rollpool body ({type(error).__name__}: {error})") from error


def pack_model(model: BaseModel) -> bytes:
    """Encode a model as a map whose first key is the schema number."""
    return pack({"schema": SCHEMA, **model.__dict__})


def _unpack_model(body: bytes, model: type[Model]) -> Model:
    fields = unpack(body)
    if not isinstance(fields, dict) or "schema" not in fields:
        raise SchemaMismatch(f"a {model.__name__} body has no schema number; was it written by rollpool?")
    schema = fields.pop("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise SchemaMismatch(
            f"a {model.__name__} body has schema {schema}, this rollpool reads {SCHEMA}: "
            "run the same version on both sides"
        )
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise SchemaMismatch(f"a {model.__name__} body does not validate: {first_error(error)}") from error


def first_error(error: ValidationError) -> str:
    """The first thing pydantic found, on one line: `field: what`."""
    found = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in found["loc"])
    what = found["msg"].removeprefix("Value error, ").removeprefix(f"{where}: ")
    return f"{where}: {what}" if where else what


def unpack_job(body: bytes) -> PromptJob:
    """Raises SchemaMismatch when the body is not a job of this schema."""
    return _unpack_model(body, PromptJob)


def unpack_group(body: bytes) -> Group:
    """Raises SchemaMismatch when the body is not a group of this schema."""
    return _unpack_model(body, Group)


def pack_samples(samples: Mapping[int, Sample], generation: int = 0) -> bytes:
    """Encode what was made of a job that goes elsewhere, by position in the group.

    A sample with the finish reason `abort` is the beginning of one. `generation` is that of the policy: version numbers
    of another one say nothing.
    """
    made = [[index, sample] for index, sample in sorted(samples.items())]
    return pack({"schema": SCHEMA, "generation": generation, "samples": made})


def unpack_samples(body: bytes) -> "Done":
    """Raises SchemaMismatch when the body is not one of `pack_samples`."""
    return _unpack_model(body, Done)


class Done(BaseModel):
    """What other hosts made of a job."""

    model_config = ConfigDict(strict=True)

    generation: int = 0
    samples: list[Annotated[tuple[int, Sample], Field(strict=False)]]


def unpack_command(body: bytes) -> Command:
    """Raises SchemaMismatch when the body is not a command of this schema."""
    return _unpack_model(body, Command)


class MapTemplate:
    """Encodes many maps that share most of their fields: the shared part is encoded once.

    `MapTemplate(shared, own=("index", "prompt")).pack((3, "text"))` equals `pack({**shared, "index": 3,
    "prompt": "text"})`. Encoding a batch is then the cost of what differs between its prompts. A template is used by
    one thread at a time.
    """

    def __init__(self, shared: Mapping[str, Any], own: Sequence[str]) -> None:
        packed = [pack(key) + pack(value) for key, value in shared.items()]
        # map16 holds up to 65,535 pairs and is the same length for every template.
        #: The encoded map up to its own fields.
        self.head = struct.pack(">BH", 0xDE, len(shared) + len(own)) + b"".join(packed)
        # Keys and values are encoded by one call, as a flat list whose header is then cut off.
        self._slots: list[Any] = [part for key in own for part in (key, None)]
        self._header = len(msgpack.Packer().pack_array_header(len(self._slots)))
        self._pack = msgpack.Packer(default=_encode_foreign, use_bin_type=True).pack

    def own(self, values: Sequence[Any]) -> bytes:
        """Encode what follows `head` in one map; `values` in the order of `own`."""
        slots = self._slots.copy()
        slots[1::2] = values
        packed: bytes = self._pack(slots)
        return packed[self._header :]

    def pack(self, values: Sequence[Any]) -> bytes:
        """Encode one map; `values` in the order of `own`."""
        return self.head + self.own(values)


def check_msgpack() -> None:
    """Raise SchemaMismatch when the installed msgpack is the old `msgpack-python` in disguise.

    Both packages install the module `msgpack`; if the old one lands last, text decodes as bytes and every body
    is misread. Neither pip nor an import error shows it.
    """
    if msgpack.unpackb(msgpack.packb({"a": b"b"})) != {"a": b"b"}:
        raise SchemaMismatch(
            "msgpack here decodes text as bytes: the old package msgpack-python has overwritten msgpack. Repair: "
            "pip uninstall -y msgpack-python && pip install --force-reinstall --no-deps msgpack"
        )
