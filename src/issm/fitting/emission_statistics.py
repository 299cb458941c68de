"""What the emissions are learned from: residuals and smoothed states of every step, one trial at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm.fitting.regression import PatternStatistics, RowStatistics
from issm.fitting.step_data import StepData, flat, gram, pad, with_inputs
from issm.inference.moments import Moments
from issm.models.emission_sums import keeps_digits
from issm.models.fields import TimeVarying, apply_weights, is_diagonal, over_time
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import emission_offsets


def emission_statistics(params: ParamsLGSSM, moments: Moments, data: StepData) -> RowStatistics | PatternStatistics:
    r"""The regression of $y_t$ on $[x_t; u_t; 1]$."""
    summarise = _row_emission_statistics if is_diagonal(params.emissions.cov) else _correlated_emission_statistics
    rows = over_time(params.emissions.weights, data.emissions.shape[1])
    return summarise(params, rows, moments.smoothed_means, moments.smoothed_covs, data)


def _row_emission_statistics(
    params: ParamsLGSSM, rows: Array, states: Array, state_covs: Array, data: StepData
) -> RowStatistics:
    cov, shape = params.emissions.cov, data.emissions.shape
    pattern_shape = (data.num_patterns, *shape[1:])
    shared = data.observed is None and not isinstance(cov, TimeVarying)
    if shared:  # one set of sums serves all rows
        shape, pattern_shape = (*shape[:2], 1), (*pattern_shape[:2], 1)
    weights = jnp.ones(shape, data.dtype) if data.observed is None else data.observed.astype(data.dtype)
    pattern_weights = jnp.ones(pattern_shape, data.dtype)
    if data.pattern_observed is not None:
        pattern_weights = data.pattern_observed.astype(data.dtype)
    if isinstance(cov, TimeVarying):
        weights, pattern_weights = weights / cov.values[None], pattern_weights / cov.values[None]
    pattern_weights = pattern_weights * data.pattern_count[:, None, None]
    if shared:
        rows, total = _by_map(params, rows, jnp.einsum("gtr,gtij->tij", pattern_weights, state_covs))
        loaded = rows @ total
        spread, cross_covs = jnp.einsum("tni,tni->n", loaded, rows), loaded.sum(axis=0)
    else:
        by_row = jnp.einsum("gtn,gtij->tnij", pattern_weights, state_covs)
        loaded = jnp.einsum("tni,tnij->tnj", rows, by_row)
        spread, cross_covs = jnp.einsum("tni,tni->n", loaded, rows), loaded.sum(axis=0)

    def add(residuals: Array, regressors: Array, weights: Array) -> tuple[Array, Array]:
        weighted = residuals * weights
        return weighted.T @ regressors, (weighted * residuals).sum(axis=0)

    regressors = with_inputs(states, data.inputs)
    cross, second = _from_data(params, regressors, data, partial(_sum_over_trials, params, data, add, weights))
    return RowStatistics(
        gram=gram(regressors, state_covs, None if shared else weights, pattern_weights),
        cross=cross - pad(cross_covs, regressors.shape[-1]),
        second=second + spread,
        count=jnp.broadcast_to(weights.sum(axis=(0, 1)), second.shape),
    )


def _correlated_emission_statistics(
    params: ParamsLGSSM, rows: Array, states: Array, state_covs: Array, data: StepData
) -> PatternStatistics:
    r"""Missing entries are filled in given the observed ones and the states: $e \to K_o e_o$, $K_o = R_{:,o} R_{oo}^{-1}$.

    They are part of the complete data, so that the M step is that of a complete regression. A step with nothing observed
    is left out.
    """
    cov, (num_trials, num_timesteps, emission_dim) = params.emissions.cov, data.emissions.shape
    if data.observed is None:
        gains = None
        used = jnp.ones((num_trials, num_timesteps, 1), data.dtype)
        pattern_weights = jnp.broadcast_to(data.pattern_count[:, None], state_covs.shape[:2])
        rows, total = _by_map(params, rows, jnp.einsum("gt,gtij->tij", pattern_weights, state_covs))
        loaded = rows @ total
        cross_covs, second_covs = loaded.sum(axis=0), jnp.einsum("tni,tmi->nm", loaded, rows)  # no N^2 for a step
    else:
        observed = data.observed[data.trials.representatives]
        used = data.observed.any(axis=2, keepdims=True).astype(data.dtype)
        pattern_weights = observed.any(axis=2).astype(data.dtype) * data.pattern_count[:, None]
        gains, unexplained = _fill_in(over_time(cov, num_timesteps)[None], observed)
        filled = gains @ rows[None]
        loaded = filled @ state_covs
        over_all = lambda covs: jnp.einsum("gt,gtij->ij", pattern_weights, covs)  # noqa: E731
        cross_covs, second_covs = over_all(loaded), over_all(loaded @ jnp.swapaxes(filled, 2, 3) + unexplained)

    def add(residuals: Array, regressors: Array, used: Array, pattern: Array) -> tuple[Array, Array]:
        if gains is not None:
            own_gains = lax.dynamic_index_in_dim(gains, pattern, keepdims=False)
            residuals = jnp.einsum("tnm,tm->tn", own_gains, residuals)
        weighted = residuals * used
        return weighted.T @ regressors, weighted.T @ residuals

    regressors = with_inputs(states, data.inputs)
    pattern = data.trials.spread(jnp.arange(data.num_patterns))
    cross, second = _from_data(params, regressors, data, partial(_sum_over_trials, params, data, add, used, pattern))
    return PatternStatistics(
        free=jnp.ones((1, emission_dim), bool),
        gram=gram(regressors, state_covs, None if data.observed is None else used, pattern_weights[:, :, None]),
        cross=(cross - pad(cross_covs, regressors.shape[-1]))[None],
        second=(second + second_covs)[None],
        count=used.sum()[None],
        complete=True,
    )


def _by_map(params: ParamsLGSSM, rows: Array, covs: Array) -> tuple[Array, Array]:
    """The emission weights of every step and the covariances behind them: one of each where the weights are constant."""
    if isinstance(params.emissions.weights, TimeVarying):
        return rows, covs
    return rows[:1], covs.sum(axis=0, keepdims=True)


def _from_data(
    params: ParamsLGSSM, regressors: Array, data: StepData, from_residuals: Callable[..., tuple[Array, Array]]
) -> tuple[Array, Array]:
    r"""$\sum e z^\top$ and $\sum e e^\top$ of the means z: from the sums of the data where these keep enough digits."""
    sums, means = data.trials.sums, flat(regressors)
    if sums is None:
        return from_residuals(regressors=means)
    block = params.emissions
    coefficients = jnp.concatenate([block.weights, block.input_weights, block.bias[:, None]], axis=1)  # type: ignore[list-item]
    by_state = means[:, : params.state_dim].T @ flat(data.emissions)
    by_state = lax.optimization_barrier(by_state)  # few rows by many columns: XLA would turn it to the slower way round
    cross = jnp.concatenate([by_state.T, sums.cross], axis=1)
    cross_after = cross - coefficients @ (means.T @ means)
    second = sums.less(coefficients, cross, cross_after)
    left = second if second.ndim == 1 else jnp.diagonal(jnp.linalg.cholesky(second)) ** 2
    total = sums.second if second.ndim == 1 else jnp.diagonal(sums.second)
    return lax.cond(
        keeps_digits(left, total),
        lambda means: (cross_after, second),
        lambda means: from_residuals(regressors=means),
        means,
    )


def _sum_over_trials(
    params: ParamsLGSSM, data: StepData, add: Callable[..., Any], *others: Array, regressors: Array
) -> Any:
    """Sum of `add(residuals, regressors, *others)`, trial by trial: residuals of all trials would be another copy of Y."""

    def one(at: tuple[Array, ...]) -> Any:
        emissions, inputs, regressors, *others = at
        by_states = apply_weights(params.emissions.weights, regressors[:, : params.state_dim])
        residuals = emissions - by_states - emission_offsets(params, inputs)
        if data.observed is not None:
            residuals = jnp.where(jnp.isnan(emissions), 0.0, residuals)
        return add(residuals, regressors, *others)

    by_trial = regressors.reshape(*data.emissions.shape[:2], -1)
    trials = (data.emissions, data.inputs, by_trial, *others)
    nothing = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], trials)),
    )
    step = lambda sums, at: (jax.tree.map(jnp.add, sums, one(at)), None)  # noqa: E731
    return lax.scan(step, nothing, trials)[0]


def _fill_in(cov: Array, observed: Array) -> tuple[Array, Array]:
    r"""$K_o$ (zero in the columns of missing entries) and $R - K_o R_{o,:}$ for every pattern and step."""
    both = observed[..., :, None] & observed[..., None, :]
    eye = jnp.eye(cov.shape[-1], dtype=cov.dtype)[None, None]
    factors = jnp.linalg.cholesky(jnp.where(both, cov, eye))
    seen = jnp.where(observed[..., :, None], cov, 0.0)
    gains = jnp.swapaxes(jax.scipy.linalg.cho_solve((factors, True), seen), -1, -2)
    gains = jnp.where(observed[..., None, :], gains, 0.0)
    return gains, cov - gains @ seen
