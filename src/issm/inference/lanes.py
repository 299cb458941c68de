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

from issm.inference.memory import stored


def matmul(left: Array, right: Array) -> Array:
    """Products of matrices, `(..., i, j, lanes)` by `(..., j, k, lanes)`."""
    if left.shape[-1] == right.shape[-1] == 1 and left.ndim == right.ndim == 3:  # nothing to vectorise over
        return (left[:, :, None] * right[None]).sum(axis=1)
    columns = range(left.shape[-2])
    return sum(left[..., :, j, None, :] * right[..., None, j, :, :] for j in columns)  # type: ignore[return-value]


def product(left: Array, right: Array) -> Array:
    """`matmul` as an array of its own, for a result that several others use."""
    return matmul(left, right) if left.shape[-1] == right.shape[-1] == 1 else stored(matmul(left, right))


def matvec(matrix: Array, vector: Array) -> Array:
    """Products of matrices with vectors, `(..., i, j, lanes)` by `(..., j, lanes)`.

    Where vectors have more lanes than matrices, a matrix serves as many neighbouring lanes as there are for each.
    """
    num_lanes, num_matrices = vector.shape[-1], matrix.shape[-1]
    if num_matrices == 1 and matrix.ndim > 3:
        return matrix[..., 0] @ vector
    if num_lanes > num_matrices:
        vector = vector.reshape(*vector.shape[:-1], num_matrices, num_lanes // num_matrices)
        product = jnp.einsum("...ijl,...jlk->...ilk", matrix, vector) if matrix.ndim > 3 else _unrolled(matrix, vector)
        return product.reshape(*product.shape[:-2], num_lanes)
    if matrix.ndim > 3:  # over all steps: a sum of its own, not computed again by all that use it
        return (matrix * vector[..., None, :, :]).sum(axis=-2)
    return _unrolled(matrix[..., None], vector[..., None])[..., 0]


def _unrolled(matrix: Array, vector: Array) -> Array:
    """The product of matrices `(i, j, lanes)` with as many vectors `(j, lanes, vectors)` each, for the body of a scan."""
    columns = range(matrix.shape[1])
    matrix = matrix[..., None] if matrix.ndim == 3 else matrix
    return sum(matrix[:, j] * vector[None, j] for j in columns)  # type: ignore[return-value]


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


def invert_lower(factor: Array) -> Array:
    """Inverses of lower triangular matrices; a zero pivot gives a zero row and column."""
    dim = factor.shape[-2]
    rows = jnp.arange(dim).reshape(*(1,) * (factor.ndim - 3), dim, 1)

    def eliminate(i: Array, rest: Array) -> Array:
        column = _column(factor, i)
        pivot = _row(column, i)[..., None, :]
        here = lax.dynamic_index_in_dim(rest, i, axis=rest.ndim - 3, keepdims=True)
        solved = jnp.where(pivot != 0, here / jnp.where(pivot != 0, pivot, 1.0), 0.0)
        below = jnp.where(rows > i, column, 0.0)[..., :, None, :]
        return jnp.where((rows == i)[..., :, None, :], solved, rest - below * solved)

    return lax.fori_loop(0, dim, eliminate, jnp.broadcast_to(identity(dim, factor.dtype), factor.shape))


def _column(matrix: Array, j: Array) -> Array:
    return lax.dynamic_index_in_dim(matrix, j, axis=matrix.ndim - 2, keepdims=False)


def _row(vector: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(vector, i, axis=vector.ndim - 2, keepdims=True)
