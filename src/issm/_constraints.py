r"""Coordinates without constraints, in which a gradient may go anywhere.

A field is recognised by its name. `cov` with one axis (or none) holds variances, which go by their logarithm; with two it is a
matrix, which goes by its Cholesky factor with the logarithm of the diagonal. Everything else is its own coordinate. Arrays keep
their shapes, so that a mask over the parameters is one over the coordinates, too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from issm._check import fail
from issm._host import is_concrete

POSITIVE = ("cov", "concentration")
"""Names of fields with positive numbers; `cov` with two axes is a positive definite matrix."""


def unconstrain(tree: Any) -> Any:
    """Coordinates of a pytree of parameters; not finite where a variance or matrix is singular."""
    return _map_by_name(tree, matrix=_from_matrix, positive=jnp.log)


def constrain(tree: Any) -> Any:
    """Parameters at coordinates: the inverse of `unconstrain`."""
    return _map_by_name(tree, matrix=_to_matrix, positive=jnp.exp)


def log_volume(tree: Any, masks: Any) -> Float[Array, ""]:
    r"""$\log |\partial θ / \partial z|$ of parameters θ in their coordinates z, over the entries that the masks choose.

    $\sum \log v$ of variances v; $\sum_i (n + 1 - i) \log L_{ii} + n \log 2$, i from 0, of a matrix $L L^\top$ of n rows.

    References:
        Gelman et al. (2013), appendix A (the density of a transform).
    """

    def of(path: Any, leaf: Array, mask: Any) -> Array:
        kind = _kind(path, leaf)
        if kind == "free":
            return jnp.zeros((), leaf.dtype)
        if kind == "positive":
            return jnp.log(jnp.where(mask, leaf, 1.0)).sum()
        rows = leaf.shape[0]
        diagonal = jnp.diagonal(jnp.linalg.cholesky(jnp.where(mask, leaf, jnp.eye(rows, dtype=leaf.dtype))))
        powers = jnp.arange(rows + 1, 1, -1).astype(leaf.dtype)
        return jnp.where(mask.all(), powers @ jnp.log(diagonal) + rows * jnp.log(2.0).astype(leaf.dtype), 0.0)

    return jnp.stack(jax.tree.leaves(jax.tree_util.tree_map_with_path(of, tree, masks))).sum()


def whole_matrices(masks: Any, argument: str) -> Any:
    """Refuse a mask that is true for a part of a matrix only: its coordinates cannot be told apart by its entries."""

    def check(path: Any, mask: Any) -> Any:
        if _kind(path, mask) == "matrix" and is_concrete(mask) and np.any(mask) and not np.all(mask):
            fail(
                argument + jax.tree_util.keystr(path),
                got="single entries of a full covariance frozen",
                expected="True or False for the whole matrix",
                remedy="A diagonal covariance, given with one axis, can be frozen entry by entry.",
            )
        return mask

    return jax.tree_util.tree_map_with_path(check, masks)


def check_interior(tree: Any, masks: Any, argument: str) -> None:
    """Refuse to move what lies on the boundary: a variance of zero, a singular matrix."""

    def check(path: Any, leaf: Array, mask: Any) -> None:
        kind = _kind(path, leaf)
        if kind == "free" or not (is_concrete(leaf) and is_concrete(mask)) or not np.any(mask):
            return
        values = np.asarray(leaf, dtype=np.float64)
        smallest = np.linalg.eigvalsh(values).min() if kind == "matrix" else values[np.asarray(mask)].min()
        if not smallest > 0:
            fail(
                argument + jax.tree_util.keystr(path),
                got=f"a smallest {'eigenvalue' if kind == 'matrix' else 'entry'} of {smallest:.6g}",
                expected="a positive one, since a gradient moves its logarithm",
                remedy="Start from a positive value, or freeze the field in `trainable`.",
            )

    jax.tree_util.tree_map_with_path(check, tree, masks)


def _map_by_name(tree: Any, *, matrix: Any, positive: Any) -> Any:
    kinds = {"matrix": matrix, "positive": positive, "free": lambda leaf: leaf}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: kinds[_kind(path, leaf)](leaf), tree)


def _kind(path: Any, leaf: Any) -> str:
    name = getattr(path[-1], "name", getattr(path[-1], "key", None)) if path else None
    if name not in POSITIVE:
        return "free"
    return "matrix" if name == "cov" and np.ndim(leaf) == 2 else "positive"


def _from_matrix(cov: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    factor = jnp.linalg.cholesky(cov)
    diagonal = jnp.diagonal(factor)
    return factor + jnp.diag(jnp.log(diagonal) - diagonal)


def _to_matrix(point: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    factor = jnp.tril(point, -1) + jnp.diag(jnp.exp(jnp.diagonal(point)))
    return factor @ factor.T
