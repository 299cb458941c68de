"""Argument checks: every message names the argument, what came, what was expected and the remedy.

Shapes are checked always, values only when they are concrete: under `jit`, `vmap` or `grad` an array has no values yet.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from issm._host import is_concrete, to_device

ASYMMETRY_TOLERANCE = 1e-5
INDEFINITENESS_TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def fail(argument: str, *, got: str, expected: str, remedy: str) -> NoReturn:
    """Raise the one form of ValueError that this library raises for a bad argument."""
    raise ValueError(f"{argument}: got {got}; expected {expected}. {remedy}")


def as_array(argument: str, value: Any) -> jax.Array | np.ndarray:
    """An array of any kind; a ragged list is refused."""
    if isinstance(value, jax.Array):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        fail(
            argument,
            got="a ragged nested sequence",
            expected="a rectangular array",
            remedy="Pad trials of unequal length with `pad_trials`.",
        )


def as_float_array(argument: str, value: Any, dtype: Any = None) -> jax.Array:
    """Turn a user's numbers into a floating-point array; integers become floats, other kinds are refused.

    A string, an object or a complex number is refused, a ragged list too. Without a `dtype`, floats keep theirs.
    """
    return to_device(as_floats(argument, value, dtype))


def as_floats(argument: str, value: Any, dtype: Any = None) -> jax.Array | np.ndarray:
    """The same, where it lies: what is not on a device yet stays on the host."""
    array = as_array(argument, value)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        fail(
            argument,
            got="None" if value is None else f"dtype {array.dtype}",
            expected="real numbers (floating point or integer)",
            remedy="Convert it, e.g. with `np.asarray(x, dtype=float)`.",
        )
    if dtype is None and not jnp.issubdtype(array.dtype, jnp.floating):
        dtype = float
    dtype = jax.dtypes.canonicalize_dtype(array.dtype if dtype is None else dtype)
    return array if array.dtype == dtype else array.astype(dtype)


def common_float_dtype(*values: Any) -> Any:
    """The widest floating dtype among the arrays in `values`; JAX's default float where there is none.

    NumPy and Python numbers decide nothing as long as a JAX array is there to follow.
    """
    leaves = [leaf for leaf in jax.tree.leaves(values) if hasattr(leaf, "dtype")]
    jax_dtypes = [
        leaf.dtype for leaf in leaves if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    dtypes = jax_dtypes or [leaf.dtype for leaf in leaves if np.issubdtype(leaf.dtype, np.floating)]
    if not dtypes:
        return jnp.result_type(float)
    return jax.dtypes.canonicalize_dtype(max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits))


def check_shape(argument: str, array: Any, expected: Sequence[int], axes: Sequence[str], remedy: str) -> None:
    """Refuse an array whose shape is not `expected`; `axes` are the words for its axes."""
    if tuple(array.shape) != tuple(expected):
        fail(
            argument,
            got=f"shape {tuple(array.shape)}",
            expected=f"({', '.join(axes)}) = {tuple(expected)}",
            remedy=remedy,
        )


def check_key(key: Any) -> None:
    """Refuse what is not one JAX random key, new style or old."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    new_style = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and shape == ()
    old_style = isinstance(key, (jax.Array, np.ndarray)) and dtype == np.uint32 and shape == (2,)
    if not (new_style or old_style):
        fail(
            "key",
            got=f"a {type(key).__name__}" if dtype is None else f"dtype {dtype}, shape {shape}",
            expected="one JAX random key",
            remedy="Make one with `jax.random.key(0)`; map over several with `jax.vmap`.",
        )


def check_finite(argument: str, array: Any) -> None:
    """Refuse NaN and infinite entries, where the values are known."""
    if is_concrete(array) and not np.isfinite(np.asarray(array)).all():
        count = int((~np.isfinite(np.asarray(array))).sum())
        fail(
            argument,
            got=f"{count} entries that are NaN or infinite",
            expected="finite numbers",
            remedy="Replace or remove them.",
        )


def check_level(level: Any) -> None:
    """Refuse a level that is no probability strictly between 0 and 1."""
    if not is_concrete(level):
        return
    number = np.asarray(level)
    if number.ndim != 0 or number.dtype.kind not in "iuf" or not 0 < float(number) < 1:
        fail(
            "level",
            got=repr(level),
            expected="a number above 0 and below 1",
            remedy="Pass 0.95 for a 95 % interval.",
        )


def check_covariance(argument: str, cov: Any, *, positive: bool = False) -> None:
    """Refuse a covariance (diagonal or full, leading axes allowed) that is not finite, symmetric and semidefinite.

    Args:
        argument: Its name, for the message.
        cov: Variances `(..., dim)` if `cov` was recognised as diagonal by the caller, else matrices `(..., dim, dim)`;
            the caller passes diagonals as they are and says so by their last two axes being unequal or by `diagonal`.
        positive: Whether it must be positive definite.
    """
    if not is_concrete(cov):
        return
    check_finite(argument, cov)
    values = np.asarray(cov, dtype=np.float64)
    transposed = np.swapaxes(values, -1, -2)
    scale = np.abs(values).max(initial=0.0)
    if np.abs(values - transposed).max(initial=0.0) > ASYMMETRY_TOLERANCE * scale:
        fail(
            argument,
            got="a matrix that is not symmetric",
            expected="a covariance",
            remedy="Symmetrise it, (S + S.T) / 2, if the difference is rounding; else look at how it was made.",
        )
    smallest = np.linalg.eigvalsh((values + transposed) / 2).min(initial=np.inf)
    _check_smallest(argument, float(smallest), float(scale), str(cov.dtype), positive)


def check_variances(argument: str, variances: Any, *, positive: bool = False) -> None:
    """Refuse variances that are not finite or are negative (or zero, where they must be positive)."""
    if not is_concrete(variances):
        return
    check_finite(argument, variances)
    smallest = float(np.asarray(variances, dtype=np.float64).min(initial=np.inf))
    if smallest < 0 or (positive and smallest <= 0):
        wanted = "positive variances" if positive else "variances of at least zero"
        fail(
            argument,
            got=f"a smallest variance of {smallest:.6g}",
            expected=wanted,
            remedy="Pass variances, not their logarithms or standard deviations with a sign.",
        )


def _check_smallest(argument: str, smallest: float, scale: float, dtype: str, positive: bool) -> None:
    tolerance = INDEFINITENESS_TOLERANCE.get(dtype, 1e-5) * scale
    if smallest < -tolerance or (positive and smallest <= 0):
        kind = "positive definite" if positive else "positive semidefinite"
        fail(
            argument,
            got=f"a matrix with smallest eigenvalue {smallest:.6g}",
            expected=f"a {kind} covariance",
            remedy="Check its units and signs; a correlation cannot exceed one.",
        )
