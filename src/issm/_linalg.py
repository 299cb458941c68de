"""Factors and solves for covariances that may be singular; nothing here adds jitter."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def symmetrize(matrix: Float[Array, "*batch dim dim"]) -> Float[Array, "*batch dim dim"]:
    """The symmetric part, which is the matrix itself up to rounding."""
    return (matrix + jnp.swapaxes(matrix, -1, -2)) / 2


def safe_sqrt(variance: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Square root whose derivative at zero is zero, not infinite: a noise that is switched off stays off."""
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)


def psd_cholesky(cov: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    r"""Lower factor L with $L L^\top = S$ for a positive semidefinite S of any rank.

    A pivot that is zero up to rounding, relative to its own diagonal entry, gives a zero column.
    """
    dim = cov.shape[-1]
    rows = jnp.arange(dim)
    tolerance = dim * jnp.finfo(cov.dtype).eps * jnp.diagonal(cov)

    def eliminate(column: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, remainder = carry
        pivot = remainder[column, column]
        positive = pivot > tolerance[column]
        scaled = jnp.where(positive, remainder[:, column] / jnp.sqrt(jnp.where(positive, pivot, 1.0)), 0.0)
        scaled = jnp.where(rows >= column, scaled, 0.0)
        return factor.at[:, column].set(scaled), remainder - jnp.outer(scaled, scaled)

    factor, _ = lax.fori_loop(0, dim, eliminate, (jnp.zeros_like(cov), cov))
    return factor


def noise_factor(cov: Float[Array, "*batch_and_cov"], *, diagonal: bool) -> Float[Array, "*batch dim dim"]:
    """A factor of one covariance or a batch of them, given as matrices or as their diagonals."""
    if diagonal:
        return safe_sqrt(cov)[..., None] * jnp.eye(cov.shape[-1], dtype=cov.dtype)[(None,) * (cov.ndim - 1)]
    return psd_cholesky(cov) if cov.ndim == 2 else jax.vmap(psd_cholesky)(cov)
