"""Arithmetic before a program runs: NumPy where the values are known, since `jax.numpy` compiles a program for every shape."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_concrete(value: Any) -> bool:
    """Whether the values of an array can be looked at, which they cannot while JAX traces."""
    return not isinstance(value, Tracer)


def on_host(*arrays: Any) -> tuple[ModuleType, tuple[Any, ...]]:
    """NumPy and the arrays as NumPy's, where all values are known; `jax.numpy` and the arrays as they are while JAX traces one."""
    if all(map(is_concrete, arrays)):
        return np, tuple(map(np.asarray, arrays))
    return jnp, arrays


def with_equal_axes(*arrays: Any) -> tuple[Any, ...]:
    """The arrays, those with fewer axes with others in front: JAX may be set to refuse to do so by itself."""
    ndim = max(array.ndim for array in arrays)
    return tuple(array[(None,) * (ndim - array.ndim)] for array in arrays)


def to_device(array: Any, dtype: Any = None) -> jax.Array:
    """A copy as a JAX array, without a program; what is one already, of this dtype, comes back as it is."""
    if isinstance(array, jax.Array):
        return array if dtype is None or array.dtype == dtype else array.astype(dtype)
    return jax.device_put(np.array(array, dtype))
