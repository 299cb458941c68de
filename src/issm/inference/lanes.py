"""Small matrix products with the batch innermost.

A matrix is an array `(..., rows, columns, lanes)`, a vector `(..., rows, lanes)`; lanes are trials, or patterns, or steps, and a
single lane broadcasts. Sums over the small axes are unrolled, so that XLA fuses each product into one vectorised loop over the
lanes: for a handful of states this is many times faster than a batch of calls into LAPACK, and it runs inside a scan
without leaving it.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def matmul(left: Array, right: Array) -> Array:
    """Products of matrices, `(..., i, j, lanes)` by `(..., j, k, lanes)`."""
    if left.shape[-1] == right.shape[-1] == 1 and left.ndim > 3:  # a batch over steps, without lanes to vectorise over
        return jnp.einsum("...ijl,...jkl->...ikl", left, right)
    columns = range(left.shape[-2])
    return sum(left[..., :, j, None, :] * right[..., None, j, :, :] for j in columns)  # type: ignore[return-value]


def matvec(matrix: Array, vector: Array) -> Array:
    """Products of matrices with vectors, `(..., i, j, lanes)` by `(..., j, lanes)`."""
    columns = range(matrix.shape[-2])
    return sum(matrix[..., :, j, :] * vector[..., None, j, :] for j in columns)  # type: ignore[return-value]


def transpose(matrix: Array) -> Array:
    """Transposed matrices."""
    return jnp.swapaxes(matrix, -2, -3)


def symmetrize(matrix: Array) -> Array:
    """Symmetric to the last bit: the lower triangle, mirrored.

    A mean of both triangles is not, once XLA has fused it with products.
    """
    rows = jnp.arange(matrix.shape[-2])
    lower = rows[:, None] >= rows[None]
    return jnp.where(lower.reshape(*(1,) * (matrix.ndim - 3), *lower.shape, 1), matrix, transpose(matrix))


def identity(dim: int, dtype: Any) -> Array:
    """The identity matrix as one lane."""
    return jnp.eye(dim, dtype=dtype)[:, :, None]


def cholesky(matrix: Array) -> Array:
    r"""Lower factors of positive semidefinite matrices; a pivot that is zero up to rounding gives a zero column."""
    dim = matrix.shape[-2]
    rows = jnp.arange(dim).reshape(*(1,) * (matrix.ndim - 3), dim, 1)
    tolerance = dim * jnp.finfo(matrix.dtype).eps

    def eliminate(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, remainder = carry
        column = _column(remainder, j)
        pivot = _row(column, j)
        positive = pivot > tolerance * _row(_column(matrix, j), j)
        scaled = jnp.where(positive & (rows >= j), column / jnp.sqrt(jnp.where(positive, pivot, 1.0)), 0.0)
        remainder = remainder - scaled[..., :, None, :] * scaled[..., None, :, :]
        return lax.dynamic_update_index_in_dim(factor, scaled, j, axis=factor.ndim - 2), remainder

    return lax.fori_loop(0, dim, eliminate, (jnp.zeros_like(matrix), matrix))[0]


def solve_lower(factor: Array, vector: Array) -> Array:
    """Solve L x = b for vectors; a zero pivot, whose row of b is zero but for rounding, gives a zero."""
    return solve_lower_matrix(factor, vector[..., None, :])[..., 0, :]


def solve_lower_transposed_matrix(factor: Array, matrix: Array) -> Array:
    r"""Solve $L^\top X = B$ for matrices: the same with both axes of L, and the rows of B, reversed."""
    reversed_factor = transpose(factor)[..., ::-1, ::-1, :]
    return solve_lower_matrix(reversed_factor, matrix[..., ::-1, :, :])[..., ::-1, :, :]


def solve_lower_matrix(factor: Array, matrix: Array) -> Array:
    """Solve L X = B for matrices, by columns of L."""
    dim = factor.shape[-2]
    rows = jnp.arange(dim).reshape(*(1,) * (factor.ndim - 3), dim, 1)

    def eliminate(i: Array, rest: Array) -> Array:
        column = _column(factor, i)
        pivot = _row(column, i)[..., None, :]
        here = lax.dynamic_index_in_dim(rest, i, axis=rest.ndim - 3, keepdims=True)
        solved = jnp.where(pivot != 0, here / jnp.where(pivot != 0, pivot, 1.0), 0.0)
        below = jnp.where(rows > i, column, 0.0)[..., :, None, :]
        return jnp.where((rows == i)[..., :, None, :], solved, rest - below * solved)

    shape = jnp.broadcast_shapes((*factor.shape[:-2], 1, factor.shape[-1]), matrix.shape)
    return lax.fori_loop(0, dim, eliminate, jnp.broadcast_to(matrix, shape))


def _column(matrix: Array, j: Array) -> Array:
    return lax.dynamic_index_in_dim(matrix, j, axis=matrix.ndim - 2, keepdims=False)


def _row(vector: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(vector, i, axis=vector.ndim - 2, keepdims=True)
