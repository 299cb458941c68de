r"""Draws of the parameters given the states, and of the states given the parameters.

Every block is a regression $x = Θ z + e,\ e \sim N(0, Σ)$ on the steps in which a row was seen: the arrivals in which a state was
not clamped, the emissions that are not missing. Rows of a diagonal Σ are drawn one by one,

$$Θ_i \mid σ_i^2 \sim N\big((G_i + Λ)^{-1} (h_i + Λ M_i),\ σ_i^2 (G_i + Λ)^{-1}\big), \qquad
σ_i^2 \mid Θ_i \sim IG\big(\tfrac{n_i + p}{2} - 1,\ \tfrac12 (\textstyle\sum e_i^2 + (Θ_i - M_i) Λ (Θ_i - M_i)^\top + Ψ_{ii})\big).$$

For a full Σ the noise of rows that were not seen is drawn too, given that of the others; the regression is then complete.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jaxtyping import Array, Bool, Float

from issm._check import fail
from issm._linalg import psd_cholesky
from issm._types import PRNGKey
from issm.fitting.m_step import BLOCKS, BlockRules, Rules, coefficients_of, with_coefficients
from issm.fitting.priors import ResolvedPrior
from issm.inference.posterior import draw_states
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials


class Regression(eqx.Module):
    """Steps of one block, flat: targets, regressors, and which rows were seen."""

    targets: Float[Array, "steps rows"]
    regressors: Float[Array, "steps columns"]
    seen: Bool[Array, "steps rows"]


def sweep(key: PRNGKey, params: ParamsLGSSM, trials: Trials, rules: Rules, method: str) -> ParamsLGSSM:
    r"""Draw the states, then every block given them; leaves $p(Θ, x \mid y)$ as it is."""
    state_key, gamma_key, *keys = jax.random.split(key, 2 + len(BLOCKS))
    states = draw_states(state_key, params, trials, method)
    parts = [
        (getattr(params, name), regression, getattr(rules, name))
        for name, regression in zip(BLOCKS, regressions(states, trials), strict=True)
    ]
    # All at once: gamma variates are a large program, wherever they are drawn.
    shapes = [_gamma_shapes(*part) for part in parts]
    gammas = jax.random.gamma(gamma_key, jnp.concatenate(shapes), dtype=states.dtype)
    gammas = jnp.split(gammas, np.cumsum([len(shape) for shape in shapes])[:-1])
    return ParamsLGSSM(*(_draw_block(*each) for each in zip(keys, gammas, *zip(*parts, strict=True), strict=True)))


def regressions(
    states: Float[Array, "num_trials num_timesteps state_dim"], trials: Trials
) -> tuple[Regression, Regression, Regression]:
    """The regressions of the three blocks given the states. Steps after a trial's last observation are left out: exact."""
    num_trials, num_timesteps, _ = states.shape
    spread = lambda leaf: jnp.broadcast_to(leaf, (num_trials, num_timesteps, leaf.shape[-1]))  # noqa: E731
    inputs, clamped = spread(trials.plan.inputs), spread(trials.plan.intervention.mask)
    observed = ~jnp.isnan(trials.emissions)
    alive = jnp.flip(jnp.cumsum(jnp.flip(observed.any(axis=2), axis=1), axis=1), axis=1) > 0
    free = ~clamped & alive[:, :, None]
    ones = jnp.ones((num_trials, num_timesteps, 1), states.dtype)
    later = jnp.concatenate([states[:, :-1], inputs[:, 1:], ones[:, 1:]], axis=2)
    now = jnp.concatenate([states, inputs, ones], axis=2)
    flat = lambda array: array.reshape(-1, array.shape[-1])  # noqa: E731
    return (
        Regression(states[:, 0], ones[:, 0], free[:, 0]),
        Regression(flat(states[:, 1:]), flat(later), flat(free[:, 1:])),
        Regression(flat(jnp.where(observed, trials.emissions, 0.0)), flat(now), flat(observed)),
    )


def _gamma_shapes(block: Any, regression: Regression, rule: BlockRules) -> Float[Array, " rows"]:
    """Shapes of the gamma variates that a draw of the covariance is made of; any will do for a frozen one."""
    dtype, rows = block.cov.dtype, len(block.cov)
    count = lambda flags: flags.sum(axis=0).astype(dtype)  # noqa: E731
    if block.cov.ndim == 1:
        degrees = degrees_of_freedom(rule.prior, count(regression.seen), rows, diagonal=True)
        return jnp.where(rule.cov, degrees, 1.0) / 2
    degrees = degrees_of_freedom(rule.prior, count(regression.seen.any(axis=1)), rows, diagonal=False)
    return (jnp.where(rule.cov.all(), degrees, rows) - jnp.arange(rows, dtype=dtype)) / 2


def _draw_block(
    key: PRNGKey, gammas: Float[Array, " rows"], block: Any, regression: Regression, rule: BlockRules
) -> Any:
    """Draw coefficients given the covariance, and the covariance given the coefficients."""
    coefficients, cov = coefficients_of(block), block.cov
    prior = rule.prior
    if prior is None:
        rows, columns = coefficients.shape
        zeros = lambda *shape: jnp.zeros(shape, coefficients.dtype)  # noqa: E731
        prior = ResolvedPrior(zeros(rows, columns), zeros(columns, columns), None, zeros(rows, rows))
    free = jnp.broadcast_to(True if rule.coefficients is None else rule.coefficients, coefficients.shape)
    draw = _draw_rows if cov.ndim == 1 else _draw_correlated
    moves = rule.cov if cov.ndim == 1 else rule.cov.all()
    coefficients, new_cov = draw(key, gammas, coefficients, cov, regression, free, prior, moves)
    return with_coefficients(block, coefficients, jnp.where(moves, new_cov, cov))


def degrees_of_freedom(prior: ResolvedPrior | None, count: Any, dim: int, *, diagonal: bool) -> Any:
    """Of the conditional of a variance (twice the shape of its inverse gamma), or of a covariance (inverse Wishart)."""
    power = 0.0 if prior is None else prior.power(diagonal)
    return count + power - (2.0 if diagonal else dim + 1.0)


def check_proper(params: ParamsLGSSM, trials: Trials, rules: Rules) -> None:
    """Refuse a covariance that is seen too rarely for its posterior to be one."""
    for name, is_proper in zip(BLOCKS, _are_proper(params, trials, rules), strict=True):
        if not is_proper:
            fail(
                f"trainable.{name}.cov",
                got="True, but too few steps tell about it",
                expected="a posterior that is proper",
                remedy=f"Give it a prior, `Priors({name}=RegressionPrior(degrees=..., scale=...))`, or freeze it.",
            )


@jax.jit
def _are_proper(params: ParamsLGSSM, trials: Trials, rules: Rules) -> list[Bool[Array, ""]]:
    zeros = jnp.zeros((trials.num_trials, trials.emissions.shape[1], params.state_dim), params.initial.mean.dtype)
    shapes = [
        _gamma_shapes(getattr(params, name), regression, getattr(rules, name))
        for name, regression in zip(BLOCKS, regressions(zeros, trials), strict=True)
    ]
    return [(shape > 0).all() for shape in shapes]


def _draw_rows(
    key: PRNGKey,
    gammas: Array,
    coefficients: Array,
    variances: Array,
    data: Regression,
    free: Array,
    prior: ResolvedPrior,
    moves: Array,
) -> tuple[Array, Array]:
    seen = data.seen.astype(coefficients.dtype)
    residuals = data.targets - data.regressors @ coefficients.T
    gram = jnp.einsum("si,sp,sq->ipq", seen, data.regressors, data.regressors) + prior.precision[None]
    right = (seen * residuals).T @ data.regressors + (prior.mean - coefficients) @ prior.precision
    white = jax.random.normal(key, coefficients.shape, coefficients.dtype)
    change = jax.vmap(_draw_change)(gram, right, white * jnp.sqrt(variances)[:, None], free)
    coefficients = coefficients + change

    residuals = data.targets - data.regressors @ coefficients.T
    deviation = coefficients - prior.mean
    second = (seen * residuals**2).sum(axis=0) + jnp.diagonal(deviation @ prior.precision @ deviation.T + prior.scale)
    second = jnp.where(moves, second, 1.0)  # a frozen one may have no distribution
    return coefficients, second / 2 / gammas


def _draw_correlated(
    key: PRNGKey,
    gammas: Array,
    coefficients: Array,
    cov: Array,
    data: Regression,
    free: Array,
    prior: ResolvedPrior,
    moves: Array,
) -> tuple[Array, Array]:
    fill_key, row_key, cov_key = jax.random.split(key, 3)
    rows, columns = coefficients.shape
    used = data.seen.any(axis=1)
    targets = _fill_in(fill_key, coefficients, cov, data)
    residuals = jnp.where(used[:, None], targets - data.regressors @ coefficients.T, 0.0)
    regressors = jnp.where(used[:, None], data.regressors, 0.0)
    precision = jsl.cho_solve((jnp.linalg.cholesky(cov), True), jnp.eye(rows, dtype=cov.dtype))
    right = residuals.T @ regressors + (prior.mean - coefficients) @ prior.precision
    white = jax.random.normal(row_key, (rows * columns,), cov.dtype)
    gram = jnp.kron(precision, regressors.T @ regressors + prior.precision)
    change = _draw_change(gram, (precision @ right).reshape(-1), white, free.reshape(-1)).reshape(rows, columns)
    coefficients = coefficients + change

    residuals = residuals - regressors @ change.T
    deviation = coefficients - prior.mean
    second = residuals.T @ residuals + deviation @ prior.precision @ deviation.T + prior.scale
    second = jnp.where(moves, second, jnp.eye(rows, dtype=cov.dtype))
    return coefficients, _draw_inverse_wishart(cov_key, gammas, second)


def _draw_change(precision: Array, right: Array, white: Array, free: Array) -> Array:
    """A draw from $N(P^{-1} r, s^2 P^{-1})$, `white` having variance s²; zero where an entry is frozen, given the rest."""
    both = free[:, None] & free[None]
    factor = jnp.linalg.cholesky(jnp.where(both, precision, jnp.eye(len(free), dtype=precision.dtype)))
    mean = jsl.cho_solve((factor, True), jnp.where(free, right, 0.0))
    noise = jsl.solve_triangular(factor, jnp.where(free, white, 0.0), lower=True, trans="T")
    return jnp.where(free, mean + noise, 0.0)


def _fill_in(key: PRNGKey, coefficients: Array, cov: Array, data: Regression) -> Array:
    r"""Targets with the rows that were not seen drawn given the others: $e^+ + K (e - e^+)$ on the rows seen, $e^+ \sim N(0, Σ)$."""
    means = data.regressors @ coefficients.T
    drawn = jax.random.normal(key, means.shape, cov.dtype) @ psd_cholesky(cov).T
    both = data.seen[:, :, None] & data.seen[:, None, :]
    eye = jnp.eye(cov.shape[0], dtype=cov.dtype)
    factors = jnp.linalg.cholesky(jnp.where(both, cov[None], eye[None]))
    off = jnp.where(data.seen, data.targets - means - drawn, 0.0)
    solved = jnp.where(data.seen, jsl.cho_solve((factors, True), off[..., None])[..., 0], 0.0)
    return jnp.where(data.seen, data.targets, means + drawn + solved @ cov)


def _draw_inverse_wishart(key: PRNGKey, gammas: Array, scale: Array) -> Array:
    r"""Bartlett: with $Ψ = L L^\top$, $Σ = L A^{-\top} A^{-1} L^\top$, A lower with chi variates on its diagonal."""
    dim = scale.shape[0]
    lower = jnp.tril(jax.random.normal(key, (dim, dim), scale.dtype), -1) + jnp.diag(jnp.sqrt(2 * gammas))
    root = jsl.solve_triangular(lower, jnp.linalg.cholesky(scale).T, lower=True)
    return root.T @ root
