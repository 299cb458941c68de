"""Fields of a model, which may vary in time, and covariances, which may be diagonal."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from issm._check import as_float_array, fail


class TimeVarying(eqx.Module):
    """Marks a field of the dynamics or the emissions as one that varies in time.

    Nothing is ever guessed from shapes: a field without this mark is constant.

    Attributes:
        values: The field's value at each step, leading axis num_timesteps. Entry 0 of a dynamics field is not used, since
            the first state comes from the initial distribution.

    References:
        Särkkä & Svensson (2023), *Bayesian Filtering and Smoothing*, sec. 6.2.

    Examples:
        >>> import numpy as np
        >>> from issm import TimeVarying
        >>> TimeVarying(np.ones((10, 2, 2))).values.shape
        (10, 2, 2)
    """

    values: Shaped[Array, "num_timesteps *field"]

    def __init__(self, values: Any):
        self.values = as_float_array("values", values)
        if self.values.ndim == 0:
            fail(
                "values",
                got="shape ()",
                expected="(num_timesteps, ...)",
                remedy="Give one entry for each step; a constant field needs no mark.",
            )


def values_of(field: Array | TimeVarying) -> Array:
    """The array of a field, with its leading time axis if it varies."""
    return field.values if isinstance(field, TimeVarying) else field


def is_diagonal(cov: Array | TimeVarying) -> bool:
    """Whether a covariance field holds variances rather than matrices."""
    return values_of(cov).ndim == (2 if isinstance(cov, TimeVarying) else 1)


def over_time(field: Array | TimeVarying, num_timesteps: int) -> Array:
    """The field's value at every step, leading axis num_timesteps."""
    if isinstance(field, TimeVarying):
        return field.values
    return jnp.broadcast_to(field, (num_timesteps, *field.shape))


def apply_weights(weights: Array | TimeVarying, vectors: Array) -> Array:
    """The product with one vector for each step, `(num_timesteps, columns)` to `(num_timesteps, rows)`."""
    if isinstance(weights, TimeVarying):
        return jnp.einsum("tij,tj->ti", weights.values, vectors)
    return vectors @ weights.T


def as_matrix(cov: Array | TimeVarying) -> Array | TimeVarying:
    """The field as full covariance matrices."""
    if not is_diagonal(cov):
        return cov
    matrices = jnp.vectorize(jnp.diag, signature="(n)->(n,n)")(values_of(cov))
    return TimeVarying(matrices) if isinstance(cov, TimeVarying) else matrices
