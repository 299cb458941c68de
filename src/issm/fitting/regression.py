r"""Regressions on expected sufficient statistics: the three M steps of the model are this one, for other targets.

Everything is written for the change Δ of the coefficients, from sums over the residuals $e = x - Θz$ of the current ones.
Close to the optimum these are small, so that nothing cancels, and a direction of z about which the data say nothing
(a zero input, a state that never moves) simply has no change.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from issm._linalg import psd_cholesky, symmetrize

L1_SWEEPS = 200


class RowStatistics(eqx.Module):
    r"""Sums for rows with independent noise; row i runs over the steps $W_i$ in which it is learned.

    Attributes:
        gram: $\sum_{W_i} E[z z^\top]$, `(rows, regressors, regressors)`; one matrix if all rows share it.
        cross: $\sum_{W_i} E[e_i z^\top]$, `(rows, regressors)`.
        second: $\sum_{W_i} E[e_i^2]$, `(rows,)`.
        count: $|W_i|$, `(rows,)`.
    """

    gram: Float[Array, "rows_or_1 regressors regressors"]
    cross: Float[Array, "rows regressors"]
    second: Float[Array, " rows"]
    count: Float[Array, " rows"]


class PatternStatistics(eqx.Module):
    r"""Sums for rows with correlated noise, one set for each pattern o of rows that are learned together.

    Attributes:
        free: The rows in the pattern, `(patterns, rows)`.
        gram: $G_o = \sum E[z z^\top]$, `(patterns, regressors, regressors)`.
        cross: $H_o = \sum E[e z^\top]$, `(patterns, rows, regressors)`.
        second: $S_o = \sum E[e e^\top]$, `(patterns, rows, rows)`. Only the rows in o are read, of all three.
        count: Number of steps with the pattern, `(patterns,)`.
        complete: Whether there is one pattern, and all rows are in it.
    """

    free: Bool[Array, "patterns rows"]
    gram: Float[Array, "patterns regressors regressors"]
    cross: Float[Array, "patterns rows regressors"]
    second: Float[Array, "patterns rows rows"]
    count: Float[Array, " patterns"]
    complete: bool = eqx.field(static=True)


def never_free(stats: RowStatistics | PatternStatistics) -> Bool[Array, " rows"]:
    """Rows that nothing is known about."""
    if isinstance(stats, RowStatistics):
        return stats.count == 0
    return ~(stats.free & (stats.count > 0)[:, None]).any(axis=0)


def regress_rows(
    stats: RowStatistics,
    coefficients: Float[Array, "rows regressors"],
    variances: Float[Array, " rows"],
    *,
    trainable: Bool[Array, "rows_or_1 regressors"] | None,
    floor: Float[Array, " rows"] | None = None,
    l1: Float[Array, " regressors"] | None = None,
) -> tuple[Float[Array, "rows regressors"], Float[Array, " rows"]]:
    r"""Maximise over the coefficients and then over the variances of every row (model.md, section 4, diagonal Q).

    Args:
        stats: The sums.
        coefficients: Θ, at which the residuals were taken.
        variances: Current noise variances.
        trainable: Entries of Θ that may move, one row if it is the same for all; None: all.
        floor: Smallest variance.
        l1: Weight of the absolute value of each coefficient in the penalty.
    """
    every_gram = jnp.broadcast_to(stats.gram, (coefficients.shape[0], *stats.gram.shape[1:]))
    if l1 is not None:
        scale = jnp.where(variances > 0, variances, 1.0)
        free = jnp.broadcast_to(True if trainable is None else trainable, coefficients.shape)
        change = jax.vmap(_descend_coordinates, in_axes=(0, 0, 0, 0, None))(
            every_gram / scale[:, None, None], stats.cross / scale[:, None], coefficients, free, l1
        )
    else:
        change = _solve_rows(stats.gram, stats.cross, trainable)
    second = (
        stats.second - 2 * (change * stats.cross).sum(axis=1) + jnp.einsum("ip,ipq,iq->i", change, every_gram, change)
    )
    learned = stats.count > 0
    new = jnp.where(learned, jnp.maximum(second, 0.0) / jnp.where(learned, stats.count, 1.0), variances)
    return coefficients + change, new if floor is None else jnp.maximum(new, floor)


def regress_patterns(
    stats: PatternStatistics,
    coefficients: Float[Array, "rows regressors"],
    cov: Float[Array, "rows rows"],
    *,
    trainable: Bool[Array, "rows_or_1 regressors"] | None,
    floor: Float[Array, " rows"] | None = None,
    l1: Float[Array, " regressors"] | None = None,
) -> tuple[Float[Array, "rows regressors"], Float[Array, "rows rows"]]:
    r"""Maximise over the coefficients given the covariance, then update the covariance (model.md, section 4, full Q).

    The first step is exact given the covariance, the second is the EM step for a multivariate normal with missing entries
    (exact where no entry is missing): an ECM, which never lowers the likelihood.
    """
    alike = trainable is None or trainable.shape[0] == 1
    if stats.complete and alike and l1 is None:  # equal regressors in all rows: the covariance does not matter
        change = _solve_rows(stats.gram, stats.cross[0], trainable)
        new = _second_after(stats, change)[0] / jnp.where(stats.count[0] > 0, stats.count[0], 1.0)
    else:
        if trainable is not None:
            trainable = jnp.broadcast_to(trainable, coefficients.shape)
        factor, into = _whiten_patterns(stats.free, cov)
        if l1 is not None:
            change = _penalised_change(stats, into, coefficients, trainable, l1)
        else:
            change = _whitened_change(stats, factor, into, trainable)
        change = jnp.where(never_free(stats)[:, None], 0.0, change)
        new = _covariance_with_missing_rows(stats, change, factor, into, cov)
    new = jnp.where(stats.count.sum() > 0, symmetrize(new), cov)
    return coefficients + change, new if floor is None else raise_to_floor(new, floor)


def _solve_rows(gram: Array, cross: Array, trainable: Array | None) -> Array:
    """Least squares for every row, with its own sums and its own frozen entries, or in one solve where they share both."""
    if trainable is not None:
        gram = jnp.where(trainable[:, :, None] & trainable[:, None, :], gram, 0.0)
        cross = jnp.where(trainable, cross, 0.0)
    if gram.shape[0] == 1:
        return solve_semidefinite(gram[0], cross.T).T
    return jax.vmap(solve_semidefinite)(gram, cross[:, :, None])[:, :, 0]


def solve_semidefinite(
    matrix: Float[Array, "dim dim"], right: Float[Array, "dim columns"]
) -> Float[Array, "dim columns"]:
    """Least-norm solution of a semidefinite system, scaled to a unit diagonal; zero in its null directions."""
    scale = jnp.sqrt(jnp.diagonal(matrix))
    scale = jnp.where(scale > 0, scale, 1.0)
    return _solve_truncated(matrix / scale[:, None] / scale[None], right / scale[:, None]) / scale[:, None]


def _solve_truncated(matrix: Array, right: Array) -> Array:
    values, vectors = jnp.linalg.eigh(symmetrize(matrix))
    tolerance = 10 * matrix.shape[0] * jnp.finfo(matrix.dtype).eps * jnp.abs(values).max()
    kept = values > tolerance
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)
    solution = vectors @ (inverse[:, None] * (vectors.T @ right))
    return jnp.where(jnp.isfinite(values).all(), solution, jnp.nan)


def _second_after(stats: PatternStatistics, change: Array) -> Array:
    r"""$\sum E[(e - Δz)(e - Δz)^\top]$ in every pattern."""
    crossed = jnp.einsum("ip,ojp->oij", change, stats.cross)
    return (
        stats.second - crossed - jnp.swapaxes(crossed, 1, 2) + jnp.einsum("ip,opq,jq->oij", change, stats.gram, change)
    )


def _whiten_patterns(free: Array, cov: Array) -> tuple[Array, Array]:
    r"""L with $L L^\top = Q$, and $F_o^+$ where $F_o = E_o L$, so that $F_o^{+\top} F_o^+ = E_o^\top Q_{oo}^{-1} E_o$."""
    scale = jnp.sqrt(jnp.diagonal(cov))
    scale = jnp.where(scale > 0, scale, 1.0)
    factor = psd_cholesky(cov / scale[:, None] / scale[None])
    into = jnp.linalg.pinv(jnp.where(free[:, :, None], factor[None], 0.0))
    return factor * scale[:, None], into / scale[None, None]


def _whitened_change(stats: PatternStatistics, factor: Array, into: Array, trainable: Array | None) -> Array:
    r"""Solve $\sum_o W_o X G_o = \sum_o F_o^+ H_o$ for $Δ = L X$, where $W_o = F_o^+ F_o$ is a projection.

    In these coordinates a singular Q only shortens X: what has no noise has no change.
    """
    rows, regressors = stats.cross.shape[1:]
    scale = jnp.sqrt(jnp.diagonal(stats.gram.sum(axis=0)))
    scale = jnp.where(scale > 0, scale, 1.0)
    gram = stats.gram / scale[None, :, None] / scale[None, None]
    projections = into @ jnp.where(stats.free[:, :, None], factor[None], 0.0)
    matrix = jnp.einsum("oij,opq->ipjq", projections, gram).reshape(rows * regressors, rows * regressors)
    right = jnp.einsum("oij,ojp->ip", into, stats.cross / scale[None, None]).reshape(-1)
    if trainable is not None:  # X must leave the frozen entries of L X alone: project on the null space of those rows
        constraint = jnp.kron(factor, jnp.eye(regressors, dtype=factor.dtype))
        constraint = jnp.where(trainable.reshape(-1)[:, None], 0.0, constraint)
        projection = jnp.eye(rows * regressors, dtype=factor.dtype) - jnp.linalg.pinv(constraint) @ constraint
        matrix, right = projection @ matrix @ projection, projection @ right
    change = factor @ _solve_truncated(matrix, right[:, None]).reshape(rows, regressors) / scale[None]
    return change if trainable is None else jnp.where(trainable, change, 0.0)


def _penalised_change(
    stats: PatternStatistics, into: Array, coefficients: Array, trainable: Array | None, l1: Array
) -> Array:
    rows, regressors = stats.cross.shape[1:]
    precisions = jnp.swapaxes(into, 1, 2) @ into
    matrix = jnp.einsum("oij,opq->ipjq", precisions, stats.gram).reshape(rows * regressors, rows * regressors)
    right = jnp.einsum("oij,ojp->ip", precisions, stats.cross).reshape(-1)
    free = jnp.ones(rows * regressors, bool) if trainable is None else trainable.reshape(-1)
    change = _descend_coordinates(matrix, right, coefficients.reshape(-1), free, jnp.tile(l1, rows))
    return change.reshape(rows, regressors)


def _covariance_with_missing_rows(
    stats: PatternStatistics, change: Array, factor: Array, into: Array, cov: Array
) -> Array:
    r"""$n^{-1} \sum_o (K_o S_o K_o^\top + n_o (Q - K_o Q_{o,:}))$ with $K_o = Q_{:,o} Q_{oo}^{-1} = L F_o^+$."""
    gains = factor @ into
    count = jnp.where(stats.free.any(axis=1), stats.count, 0.0)
    second = jnp.einsum("oij,ojk,olk->il", gains, _second_after(stats, change), gains)
    unexplained = jnp.einsum("o,oij->ij", count, cov[None] - gains @ cov)
    total = count.sum()
    return jnp.where(total > 0, (second + unexplained) / jnp.where(total > 0, total, 1.0), cov)


def raise_to_floor(cov: Array, floor: Array) -> Array:
    """The maximiser over all covariances that exceed the diagonal matrix `floor` (eigenvalues raised to one in its units)."""
    scale = jnp.sqrt(floor)
    scaled = symmetrize(cov / scale[:, None] / scale[None])

    def raised() -> Array:
        values, vectors = jnp.linalg.eigh(scaled)
        return symmetrize((vectors * jnp.maximum(values, 1.0)[None]) @ vectors.T * scale[:, None] * scale[None])

    above = jnp.isfinite(jnp.linalg.cholesky(scaled - jnp.eye(scaled.shape[0], dtype=scaled.dtype))).all()
    return lax.cond(above, lambda: cov, raised)  # a factorisation is cheap, eigenvalues are not


def _descend_coordinates(matrix: Array, right: Array, start: Array, free: Array, l1: Array) -> Array:
    r"""Minimise $\tfrac12 v^\top A v - b^\top v + \sum_j λ_j |start_j + v_j|$ by exact coordinate steps from v = 0."""

    def coordinate(j: Array, change: Array) -> Array:
        curvature = matrix[j, j]
        positive = free[j] & (curvature > 0)
        safe = jnp.where(positive, curvature, 1.0)
        target = start[j] + change[j] + (right[j] - matrix[j] @ change) / safe
        shrunk = jnp.sign(target) * jnp.maximum(jnp.abs(target) - l1[j] / safe, 0.0)
        return change.at[j].set(jnp.where(positive, shrunk - start[j], change[j]))

    def sweep(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, change, _ = carry
        new = lax.fori_loop(0, start.shape[0], coordinate, change)
        return count + 1, new, jnp.abs(new - change).max(initial=0.0)

    def moving(carry: tuple[Array, Array, Array]) -> Array:
        count, change, step = carry
        return (count < L1_SWEEPS) & (step > jnp.finfo(start.dtype).eps * jnp.abs(start + change).max(initial=0.0))

    first = (jnp.zeros((), jnp.int32), jnp.zeros_like(start), jnp.full((), jnp.inf, start.dtype))
    return lax.while_loop(moving, sweep, first)[1]
