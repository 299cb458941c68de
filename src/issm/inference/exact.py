r"""Differences of products in twice the working precision, from error-free sums and products.

Where data are thousands of noise standard deviations large, $y - C x$ loses in its rounding what the likelihood measures.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def exact_residual(terms: tuple[Array, ...], matrices: Array, vectors: Array) -> Array:
    """The sum of `terms` minus `matrices @ vectors`, rounded once.

    Args:
        terms: Arrays that broadcast to `(..., rows)`.
        matrices: `(..., rows, columns)`, leading axes that broadcast.
        vectors: `(..., columns)`.

    References:
        Ogita, Rump & Oishi (2005), *SIAM J. Scientific Computing* 26, algorithm 5.3.
    """
    shape = jnp.broadcast_shapes(*(term.shape for term in terms), (*vectors.shape[:-1], matrices.shape[-2]))
    total, error = jnp.zeros(shape, vectors.dtype), jnp.zeros(shape, vectors.dtype)
    for term in terms:
        total, error = _add(total, error, term)

    def column(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left = _halves(lax.dynamic_index_in_dim(matrices, j, axis=matrices.ndim - 1, keepdims=False))
        right = _halves(lax.dynamic_index_in_dim(vectors, j, axis=vectors.ndim - 1, keepdims=True))
        for a in left:
            for b in right:
                carry = _add(*carry, -(a * b))  # exact: each half has half the digits
        return carry

    total, error = lax.fori_loop(0, vectors.shape[-1], column, (total, error))
    return total + error


def _add(total: Array, error: Array, term: Array) -> tuple[Array, Array]:
    """Add a term, and what rounding took from the sum to the errors (Knuth's two-sum)."""
    rounded = total + term
    taken = rounded - total
    return rounded, error + ((total - (rounded - taken)) + (term - taken))


def _halves(array: Array) -> tuple[Array, Array]:
    """Two numbers of half the digits each, whose sum is the array."""
    info = jnp.finfo(array.dtype)
    digits = (info.nmant + 1) // 2
    high = lax.reduce_precision(array, exponent_bits=info.nexp, mantissa_bits=digits - 1)
    return high, array - high
