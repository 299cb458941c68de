r"""What the dynamics and the initial distribution are learned from: noise and regressors of every arrival.

The moments of the process noise come from the adjoints of the smoother (Durbin & Koopman 2012, sec. 4.5 and 4.7),

$$E[w_t \mid y] = Q_t r_t, \quad Cov[w_t \mid y] = Q_t - Q_t N_t Q_t, \quad Cov[w_t, x_{t-1} \mid y] = -Q_t N_t A_t P_{t-1},$$

which is exact for perfect clamps and does not cancel where the noise is small.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from issm.fitting.mask_patterns import MaskPatterns
from issm.fitting.regression import PatternStatistics, RowStatistics
from issm.fitting.step_data import StepData, flat, gram, pad, pad_both, with_inputs
from issm.inference.moments import Moments
from issm.models.fields import TimeVarying, as_matrix, is_diagonal, over_time
from issm.models.lgssm import ParamsLGSSM

MOST_PATTERNS_ONE_BY_ONE = 64


class ArrivalMoments(eqx.Module):
    """Means of regressors z and residuals e by trial, covariances by pattern, for the steps of one regression.

    Only the part of the covariances that is not zero is held: the states are the first of the regressors.
    """

    regressors: Float[Array, "num_trials steps regressors"]
    residuals: Float[Array, "num_trials steps rows"]
    regressor_covs: Float[Array, "num_patterns steps states states"]
    cross_covs: Float[Array, "num_patterns steps rows states"]
    residual_covs: Float[Array, "num_patterns steps rows rows"]


def initial_statistics(
    params: ParamsLGSSM, moments: Moments, data: StepData, patterns: MaskPatterns
) -> RowStatistics | PatternStatistics:
    r"""The regression of $x_0$ on 1."""
    cov, first = params.initial.cov, slice(0, 1)
    noise, noise_covs, _ = _process_noise(cov, moments, data, first)
    no_states = noise_covs[..., :0]
    found = ArrivalMoments(jnp.ones_like(noise[:, :, :1]), noise, no_states[:, :, :0], no_states, noise_covs)
    return arrival_statistics(found, data, first, patterns.free, patterns.index[..., None], patterns.unclamped, cov)


def dynamics_statistics(
    params: ParamsLGSSM, moments: Moments, data: StepData, patterns: MaskPatterns
) -> RowStatistics | PatternStatistics:
    r"""The regression of $x_t$ on $[x_{t-1}; u_t; 1]$ for t = 1 ... T-1."""
    num_timesteps = data.emissions.shape[1]
    later = slice(1, num_timesteps)
    cov = params.dynamics.cov
    cov = TimeVarying(cov.values[1:]) if isinstance(cov, TimeVarying) else cov
    noise, noise_covs, noise_informations = _process_noise(cov, moments, data, later)
    weights = over_time(params.dynamics.weights, num_timesteps)[None, 1:]
    weights = jnp.where(data.pattern_free[:, 1:, :, None], weights, 0.0)
    found = ArrivalMoments(
        regressors=with_inputs(moments.smoothed_means[:, :-1], data.inputs[:, 1:]),
        residuals=noise,
        regressor_covs=moments.smoothed_covs[:, :-1],
        cross_covs=-noise_informations @ weights @ moments.filtered_covs[:, :-1],
        residual_covs=noise_covs,
    )
    return arrival_statistics(found, data, later, patterns.free, patterns.index[..., 1:], patterns.unclamped, cov)


def _process_noise(
    cov: Array | TimeVarying, moments: Moments, data: StepData, steps: slice
) -> tuple[Array, Array, Array]:
    r"""$E[w_t \mid y]$ by trial, $Cov[w_t \mid y]$ and $Q_t N_t$ by pattern; zero in the rows of clamped states."""
    free, pattern_free = data.free[:, steps], data.pattern_free[:, steps]
    num_steps = free.shape[1]
    covs = over_time(as_matrix(cov), num_steps)[None]
    adjoints = jnp.where(free, moments.adjoints[:, steps], 0.0)
    if isinstance(cov, TimeVarying):
        means = jnp.einsum("tij,ktj->kti", covs[0], adjoints)
    elif is_diagonal(cov):
        means = adjoints * cov[None, None]
    else:
        means = adjoints @ cov
    kept = jnp.where(pattern_free[..., :, None] & pattern_free[..., None, :], covs, 0.0)
    weighted = kept @ moments.informations[:, steps]
    noise_covs = kept - weighted @ kept
    return jnp.where(free, means, 0.0), (noise_covs + jnp.swapaxes(noise_covs, 2, 3)) / 2, weighted


def arrival_statistics(
    found: ArrivalMoments,
    data: StepData,
    steps: slice,
    patterns_free: Array,
    index: Array,
    unclamped: bool,
    cov: Array | TimeVarying,
) -> RowStatistics | PatternStatistics:
    """Sums over the arrivals in which a row was free; `index` says which of the masks `patterns_free` holds where."""
    if is_diagonal(cov):
        weights, pattern_weights = (flags[:, steps].astype(data.dtype) for flags in (data.free, data.pattern_free))
        if isinstance(cov, TimeVarying):  # known variances are weights; rows without noise have nothing to learn
            inverse = jnp.where(cov.values > 0, 1 / jnp.where(cov.values > 0, cov.values, 1.0), 0.0)[None]
            weights, pattern_weights = weights * inverse, pattern_weights * inverse
        pattern_weights = pattern_weights * data.pattern_count[:, None, None]
        shared = unclamped and not isinstance(cov, TimeVarying)
        one = slice(0, 1) if shared else slice(None)
        weighted = found.residuals if shared and data.complete else weights * found.residuals
        gram_weights = None if shared and data.complete else weights[..., one]
        rows = found.residuals.shape[-1]
        return RowStatistics(
            gram=gram(found.regressors, found.regressor_covs, gram_weights, pattern_weights[..., one]),
            cross=flat(weighted).T @ flat(found.regressors)
            + pad(jnp.einsum("gti,gtip->ip", pattern_weights, found.cross_covs), found.regressors.shape[-1]),
            second=(weighted * found.residuals).sum(axis=(0, 1))
            + jnp.einsum("gti,gtii->i", pattern_weights, found.residual_covs).reshape(rows),
            count=weights.sum(axis=(0, 1)),
        )
    return _pattern_statistics(found, data, steps, patterns_free, index, unclamped)


def _pattern_statistics(
    found: ArrivalMoments, data: StepData, steps: slice, patterns_free: Array, index: Array, unclamped: bool
) -> PatternStatistics:
    num_trials, num_steps = found.residuals.shape[:2]
    num_masks = patterns_free.shape[0]
    index = jnp.broadcast_to(index, (num_trials, num_steps))
    weights = data.alive[:, steps].astype(data.dtype)
    chosen = index[data.trials.representatives]
    pattern_weights = data.pattern_alive[:, steps].astype(data.dtype) * data.pattern_count[:, None]
    both = jnp.concatenate([flat(found.residuals), flat(found.regressors)], axis=1)
    if unclamped and data.complete:
        second = (both.T @ both)[None]
    else:
        second = _group_products(both, weights.reshape(-1), index.reshape(-1), num_masks)

    def add(covs: Array) -> Array:
        if num_masks == 1:
            return jnp.einsum("gt,gtij->ij", pattern_weights, covs)[None]
        weighted = (covs * pattern_weights[..., None, None]).reshape(chosen.size, *covs.shape[2:])
        return jax.ops.segment_sum(weighted, chosen.reshape(-1), num_masks)

    rows = found.residuals.shape[-1]
    return PatternStatistics(
        free=patterns_free,
        gram=second[:, rows:, rows:] + pad_both(add(found.regressor_covs), found.regressors.shape[-1]),
        cross=second[:, :rows, rows:] + pad(add(found.cross_covs), found.regressors.shape[-1]),
        second=second[:, :rows, :rows] + add(found.residual_covs),
        count=_group_counts(weights, index, num_masks),
        complete=unclamped,
    )


def _group_counts(weights: Array, index: Array, num_groups: int) -> Array:
    """Sums of weights, one for each group of steps."""
    if num_groups == 1:
        return weights.sum()[None]
    return jax.ops.segment_sum(weights.reshape(-1), index.reshape(-1), num_groups)


def _group_products(vectors: Array, weights: Array, index: Array, num_groups: int) -> Array:
    """Sums of outer products, one for each group of steps."""
    if num_groups <= MOST_PATTERNS_ONE_BY_ONE:
        one = lambda group: (vectors * jnp.where(index == group, weights, 0.0)[:, None]).T @ vectors  # noqa: E731
        return lax.map(one, jnp.arange(num_groups, dtype=index.dtype))
    outer = vectors[:, :, None] * vectors[:, None, :] * weights[:, None, None]
    return jax.ops.segment_sum(outer, index, num_groups)
