r"""Free coordinates of the parameters, the exact score in them, and the information of the complete data.

By Fisher's identity the gradient of the log-likelihood is that of the expected complete-data log density at the parameters
which the E step was made with, so that it costs nothing beyond the sums of the M step. Coefficients are their own coordinates,
variances go by their logarithm, full covariances by their Cholesky factor with the logarithm of its diagonal.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from issm.fitting.m_step import BLOCKS, BlockRules, Rules, coefficients_of, with_coefficients
from issm.fitting.regression import PatternStatistics, RowStatistics, raise_to_floor
from issm.fitting.statistics import SufficientStatistics
from issm.models.fields import TimeVarying
from issm.models.lgssm import ParamsLGSSM


class Coordinates(NamedTuple):
    """Of one block, or a gradient in them; `cov` has no entries where the covariance varies in time."""

    coefficients: Float[Array, "rows columns"]
    cov: Float[Array, "..."]


def to_coordinates(params: ParamsLGSSM) -> Float[Array, " coordinates"]:
    """The parameters as one unconstrained vector; not finite if a full covariance is singular."""
    return _join([_coordinates(getattr(params, name)) for name in BLOCKS])


def from_coordinates(
    vector: Float[Array, " coordinates"], like: ParamsLGSSM, rules: Rules, floor: Float[Array, " emission_dim"]
) -> ParamsLGSSM:
    """Parameters at a point; what is frozen keeps every bit of `like`."""
    blocks = []
    for name, point in zip(BLOCKS, _split(vector, like), strict=True):
        block = getattr(like, name)
        cov = block.cov
        if not isinstance(cov, TimeVarying):
            cov = jnp.exp(point.cov) if cov.ndim == 1 else _factor(point.cov) @ _factor(point.cov).T
            if name == "emissions":
                cov = jnp.maximum(cov, floor) if cov.ndim == 1 else raise_to_floor(cov, floor)
        blocks.append(with_coefficients(block, point.coefficients, cov))
    return keep_frozen(ParamsLGSSM(*blocks), like, rules)


def keep_frozen(params: ParamsLGSSM, like: ParamsLGSSM, rules: Rules) -> ParamsLGSSM:
    """The parameters with every bit of `like` in what is frozen, and variances of zero as they are there."""
    blocks = []
    for name in BLOCKS:
        new, old, rule = getattr(params, name), getattr(like, name), getattr(rules, name)
        free, cov = _free(old, rule), old.cov
        if not isinstance(cov, TimeVarying):
            cov = jnp.where(free.cov if cov.ndim == 1 else rule.cov.all(), new.cov, cov)
        coefficients = jnp.where(free.coefficients, coefficients_of(new), coefficients_of(old))
        blocks.append(with_coefficients(old, coefficients, cov))
    return ParamsLGSSM(*blocks)


def score(
    params: ParamsLGSSM, stats: SufficientStatistics, rules: Rules, floor: Float[Array, " emission_dim"]
) -> Float[Array, " coordinates"]:
    r"""Gradient of the log-likelihood plus the log priors at the parameters that `stats` were computed with.

    It is zero in what is frozen, and where a variance at its floor would have to fall.
    """
    parts = []
    for name in BLOCKS:
        block, rule = getattr(params, name), getattr(rules, name)
        gradient = _block_score(block, with_prior(block, getattr(stats, name), rule))
        free = _free(block, rule)
        cov = jnp.where(free.cov, gradient.cov, 0.0)
        if name == "emissions" and not isinstance(block.cov, TimeVarying) and block.cov.ndim == 1:
            cov = jnp.where((block.cov <= floor * (1 + 1e-3)) & (cov < 0), 0.0, cov)
        parts.append(Coordinates(jnp.where(free.coefficients, gradient.coefficients, 0.0), cov))
    return _join(parts)


class Preconditioner(eqx.Module):
    """The inverse of the information of the complete data: close to the optimum, it maps the score to the step of EM."""

    params: ParamsLGSSM
    rules: Rules
    factors: tuple[Array, ...]
    scales: tuple[Array, ...]
    counts: tuple[Array, ...]

    def __init__(self, params: ParamsLGSSM, stats: SufficientStatistics, rules: Rules):
        self.params = params
        self.rules = rules
        parts = []
        for name in BLOCKS:
            block, rule = getattr(params, name), getattr(rules, name)
            parts.append(_factor_information(with_prior(block, getattr(stats, name), rule), _free(block, rule)))
        self.factors, self.scales, self.counts = zip(*parts, strict=True)

    def __call__(self, gradient: Float[Array, " coordinates"]) -> Float[Array, " coordinates"]:
        """The search direction that belongs to a gradient."""
        steps = []
        parts = zip(BLOCKS, _split(gradient, self.params), self.factors, self.scales, self.counts, strict=True)
        for name, part, factor, scale, count in parts:
            block = getattr(self.params, name)
            free = _free(block, getattr(self.rules, name))
            scaled = _times_noise(block.cov, part.coefficients) / scale
            if factor.shape[0] == 1:
                coefficients = jsl.cho_solve((factor[0], True), scaled.T).T
            else:
                coefficients = jax.vmap(lambda f, x: jsl.cho_solve((f, True), x))(factor, scaled)
            cov = _solve_cov_information(block.cov, part.cov, count)
            steps.append(
                Coordinates(jnp.where(free.coefficients, coefficients / scale, 0.0), jnp.where(free.cov, cov, 0.0))
            )
        return _join(steps)


def emission_coefficients(
    vector: Float[Array, " coordinates"], like: ParamsLGSSM
) -> Float[Array, "emission_dim columns"]:
    """Those of `[C, D, d]`."""
    return _split(vector, like)[BLOCKS.index("emissions")].coefficients


def _free(block: Any, rule: BlockRules) -> Coordinates:
    """What may move, in coordinates; a variance of zero may not."""
    shape = coefficients_of(block).shape
    coefficients = jnp.broadcast_to(True if rule.coefficients is None else rule.coefficients, shape)
    if isinstance(block.cov, TimeVarying):
        return Coordinates(coefficients, jnp.zeros(0, bool))
    if block.cov.ndim == 1:
        return Coordinates(coefficients, rule.cov & (block.cov > 0))
    return Coordinates(coefficients, rule.cov.all() & jnp.tril(jnp.ones(block.cov.shape, bool)))


def _coordinates(block: Any) -> Coordinates:
    cov = block.cov
    if isinstance(cov, TimeVarying):
        point = jnp.zeros(0, cov.values.dtype)
    elif cov.ndim == 1:
        point = jnp.log(jnp.where(cov > 0, cov, 1.0))
    else:
        factor = jnp.linalg.cholesky(cov)
        diagonal = jnp.diagonal(factor)
        point = factor + jnp.diag(jnp.log(diagonal) - diagonal)
    return Coordinates(coefficients_of(block), point)


def _factor(point: Array) -> Array:
    """Cholesky factor at coordinates."""
    diagonal = jnp.diagonal(point)
    return jnp.tril(point) + jnp.diag(jnp.exp(diagonal) - diagonal)


def with_prior(
    block: Any, stats: RowStatistics | PatternStatistics, rule: BlockRules
) -> RowStatistics | PatternStatistics:
    """The sums of a block with what its prior adds to them."""
    return stats if rule.prior is None else rule.prior.add_to(stats, coefficients_of(block))


def _block_score(block: Any, stats: RowStatistics | PatternStatistics) -> Coordinates:
    cov = block.cov
    if isinstance(stats, RowStatistics):
        if isinstance(cov, TimeVarying):  # known variances are weights in the sums
            return Coordinates(stats.cross, jnp.zeros(0, stats.cross.dtype))
        inverse = jnp.where(cov > 0, 1 / jnp.where(cov > 0, cov, 1.0), 0.0)
        return Coordinates(stats.cross * inverse[:, None], (stats.second * inverse - stats.count) / 2)
    if isinstance(cov, TimeVarying):  # such a block is frozen
        return Coordinates(jnp.zeros_like(stats.cross[0]), jnp.zeros(0, stats.cross.dtype))
    factor = jnp.linalg.cholesky(cov)
    if stats.complete:
        coefficients = jsl.cho_solve((factor, True), stats.cross[0])
        half = jsl.solve_triangular(factor, stats.second[0], lower=True)
        white = jsl.solve_triangular(factor, half.T, lower=True) - stats.count[0] * jnp.eye(len(cov), dtype=cov.dtype)
        by_factor = jsl.solve_triangular(factor, white, lower=True, trans=1)
    else:
        coefficients, slope = _slopes_by_pattern(cov, stats)
        by_factor = slope @ factor
    by_factor = jnp.tril(by_factor)
    return Coordinates(coefficients, by_factor + jnp.diag(jnp.diagonal(by_factor) * (jnp.diagonal(factor) - 1)))


def _slopes_by_pattern(cov: Array, stats: PatternStatistics) -> tuple[Array, Array]:
    """Derivative with respect to the coefficients, and twice that with respect to the covariance."""
    both = stats.free[:, :, None] & stats.free[:, None, :]
    eye = jnp.eye(cov.shape[0], dtype=cov.dtype)
    solve = jax.vmap(lambda matrix: jsl.cho_solve((jnp.linalg.cholesky(matrix), True), eye))
    precisions = jnp.where(both, solve(jnp.where(both, cov[None], eye[None])), 0.0)
    coefficients = jnp.einsum("oij,ojp->ip", precisions, stats.cross)
    inner = jnp.einsum("oij,ojk,okl->il", precisions, stats.second, precisions)
    return coefficients, inner - jnp.einsum("o,oij->ij", stats.count, precisions)


def _factor_information(stats: RowStatistics | PatternStatistics, free: Coordinates) -> tuple[Array, Array, Array]:
    r"""Cholesky factors of $\sum E[z z^\top]$ scaled to a unit diagonal, the scales, and the counts."""
    if isinstance(stats, RowStatistics):
        gram, count, used = stats.gram, stats.count, free.coefficients
    else:
        gram, count = stats.gram.sum(axis=0)[None], stats.count.sum()
        used = free.coefficients.any(axis=0)[None]
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
    alive = used & (diagonal > 0)
    scale = jnp.where(diagonal > 0, jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0)), 1.0)
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
    scaled = jnp.where(alive[:, :, None] & alive[:, None, :], gram / scale[:, :, None] / scale[:, None, :], eye)
    ridge = jnp.sqrt(jnp.finfo(gram.dtype).eps)  # it only shapes search directions
    return jnp.linalg.cholesky(scaled + ridge * eye), scale, jnp.where(count > 0, count, 1.0)


def _times_noise(cov: Array | TimeVarying, gradient: Array) -> Array:
    if isinstance(cov, TimeVarying):
        return gradient
    return cov[:, None] * gradient if cov.ndim == 1 else cov @ gradient


def _solve_cov_information(cov: Array | TimeVarying, gradient: Array, count: Array) -> Array:
    r"""For a full covariance $Q = L L^\top$ the information of $K = L^{-1} dL$ is diagonal, $n (1 + δ_{ij})$."""
    if isinstance(cov, TimeVarying) or cov.ndim == 1:
        return gradient if gradient.size == 0 else 2 * gradient / count
    factor = jnp.linalg.cholesky(cov)
    diagonal = jnp.diagonal(factor)
    by_factor = gradient + jnp.diag(jnp.diagonal(gradient) * (1 / diagonal - 1))
    inner = jnp.tril(factor.T @ by_factor) / (count * (1 + jnp.eye(len(cov), dtype=cov.dtype)))
    step = factor @ inner
    return step + jnp.diag(jnp.diagonal(step) * (1 / diagonal - 1))


def log_variances(vector: Float[Array, " coordinates"], like: ParamsLGSSM) -> Float[Array, " variances"]:
    """The coordinates that are logarithms."""
    covs = [part.cov for part in _split(vector, like)]
    return jnp.concatenate([jnp.diagonal(cov) if cov.ndim == 2 else cov for cov in covs])


def _join(blocks: list[Coordinates]) -> Float[Array, " coordinates"]:
    return ravel_pytree(blocks)[0]


def _split(vector: Array, like: ParamsLGSSM) -> list[Coordinates]:
    shapes = [
        Coordinates(coefficients_of(b), jnp.zeros(0, vector.dtype) if isinstance(b.cov, TimeVarying) else b.cov)
        for b in (like.initial, like.dynamics, like.emissions)
    ]
    return ravel_pytree(shapes)[1](vector)
