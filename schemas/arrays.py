"""Numpy array fields of the models.

Invariant: an array in a model is one-dimensional and of the dtype its type names; nothing is cast in silence
except lists, which a user may write by hand.
"""

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator


def _coerce(value: Any, dtype: type[np.generic]) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype == dtype and value.ndim == 1:
            return value
        raise ValueError(f"expected a one-dimensional {dtype.__name__} array, got {value.dtype} of shape {value.shape}")
    return np.asarray(value, dtype=dtype)


#: Token ids, shape [T].
Int32Array = Annotated[NDArray[np.int32], BeforeValidator(lambda value: _coerce(value, np.int32))]
#: Log-probabilities, natural logarithm, shape [T].
Float32Array = Annotated[NDArray[np.float32], BeforeValidator(lambda value: _coerce(value, np.float32))]
