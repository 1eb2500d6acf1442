"""Numpy array fields of the models.

Invariant: an array in a model is one-dimensional and of the dtype its type names; nothing is cast in silence.
A list, which a user may write by hand, is accepted where every value of it fits.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator


def _coerce(value: Any, dtype: type[np.generic]) -> Any:
    if isinstance(value, list | tuple):
        return _from_list(value, dtype)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"expected a one-dimensional {dtype.__name__} array, got {type(value).__name__}")
    if value.dtype == dtype and value.ndim == 1:
        return value
    raise ValueError(f"expected a one-dimensional {dtype.__name__} array, got {value.dtype} of shape {value.shape}")


def _from_list(values: Sequence[Any], dtype: type[np.generic]) -> NDArray[Any]:
    array = np.asarray(values) if values else np.empty(0, dtype)
    if array.ndim != 1 or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"expected a list of {dtype.__name__}, got {array.dtype} of shape {array.shape}")
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if issubclass(dtype, np.integer) and not np.array_equal(cast, array):
        raise ValueError(f"expected a list of {dtype.__name__}, these lie in {array.min()}..{array.max()}")
    return cast


#: Token ids, shape [T].
Int32Array = Annotated[NDArray[np.int32], BeforeValidator(lambda value: _coerce(value, np.int32))]
#: Log-probabilities, natural logarithm, shape [T].
Float32Array = Annotated[NDArray[np.float32], BeforeValidator(lambda value: _coerce(value, np.float32))]
