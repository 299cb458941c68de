r"""The E step: expected sufficient statistics of the parameters, sums over trials and time only.

All residuals are those of the current parameters. The moments of the process noise come from the adjoints of the smoother,
$E[w_t \mid y] = Q_t r_t,\ Cov[w_t \mid y] = Q_t - Q_t N_t Q_t,\ Cov[w_t, x_{t-1} \mid y] = -Q_t N_t A_t P_{t-1}$ (Durbin &
Koopman 2012, sec. 4.5 and 4.7), which is exact for perfect clamps and does not cancel where the noise is small. Means are
summed over trials, covariances over the patterns that trials share.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from issm._check import is_concrete
from issm.fitting.regression import PatternStatistics, RowStatistics
from issm.inference.methods import filter_and_smooth
from issm.inference.moments import Moments
from issm.models.lgssm import ParamsLGSSM, TimeVarying, apply_weights, as_matrix, is_diagonal, over_time
from issm.models.transitions import emission_offsets
from issm.models.trials import Trials

MOST_PATTERNS_ONE_BY_ONE = 64


class MaskPatterns(eqx.Module):
    """The different clamp masks of the data, and which of them holds at each step.

    Attributes:
        free: The unclamped states of each pattern, `(patterns, state_dim)`.
        index: Pattern at each step, `(*trials, num_timesteps)`, or at the first step alone, `(*trials,)`.
        unclamped: Whether no state is clamped anywhere.
    """

    free: Bool[Array, "patterns state_dim"]
    index: Int[Array, "*steps"]
    unclamped: bool = eqx.field(static=True)


class Patterns(eqx.Module):
    """Mask patterns of the first step and of all later ones."""

    initial: MaskPatterns
    dynamics: MaskPatterns


class SufficientStatistics(eqx.Module):
    """What an M step needs, with the log-likelihood of the parameters that it was computed with."""

    log_prob: Float[Array, ""]
    initial: RowStatistics | PatternStatistics
    dynamics: RowStatistics | PatternStatistics
    emissions: RowStatistics | PatternStatistics


def find_patterns(params: ParamsLGSSM, trials: Trials) -> Patterns:
    """Group the steps by their clamp mask, where the noise is correlated; elsewhere rows are learned one by one."""
    mask = trials.plan.intervention.mask
    full_initial, full_dynamics = not is_diagonal(params.initial.cov), not is_diagonal(params.dynamics.cov)
    return Patterns(_group(mask[..., 0, :], full_initial), _group(mask, full_dynamics))


def expected_statistics(params: ParamsLGSSM, trials: Trials, patterns: Patterns) -> SufficientStatistics:
    """Smooth every trial and add up what the M step needs."""
    moments = filter_and_smooth(params, trials, "auto")
    data = _Data(trials)
    return SufficientStatistics(
        log_prob=moments.logliks.sum(),
        initial=_initial_statistics(params, moments, data, patterns.initial),
        dynamics=_dynamics_statistics(params, moments, data, patterns.dynamics),
        emissions=_emission_statistics(params, moments, data),
    )


def _group(mask: Bool[Array, "*steps state_dim"], correlated: bool) -> MaskPatterns:
    state_dim, steps = mask.shape[-1], mask.shape[:-1]
    unclamped = is_concrete(mask) and not np.asarray(mask).any()
    if unclamped or not correlated:
        return MaskPatterns(jnp.ones((1, state_dim), bool), jnp.zeros(steps, jnp.int32), unclamped)
    if is_concrete(mask):
        table, index = np.unique(np.asarray(mask).reshape(-1, state_dim), axis=0, return_inverse=True)
        return MaskPatterns(jnp.asarray(~table), jnp.asarray(index.reshape(steps), jnp.int32), False)
    num_steps = int(np.prod(steps))
    if 2**state_dim <= num_steps:  # every subset has a place in the table
        places = 2 ** np.arange(state_dim)
        table = (np.arange(2**state_dim)[:, None] & places[None]) > 0
        index = mask.astype(jnp.int32) @ jnp.asarray(places, jnp.int32)
        return MaskPatterns(jnp.asarray(~table), index, False)
    return MaskPatterns(~mask.reshape(-1, state_dim), jnp.arange(num_steps, dtype=jnp.int32).reshape(steps), False)


class _Data:
    """Trials with every array in full: by trial (k), and by pattern of clamps and missing entries (g)."""

    def __init__(self, trials: Trials):
        self.trials = trials
        self.emissions = trials.emissions
        num_trials, num_timesteps, _ = trials.emissions.shape
        self.dtype = trials.emissions.dtype
        spread = lambda leaf, size: jnp.broadcast_to(leaf, (size, *leaf.shape[-2:]))  # noqa: E731
        self.inputs = spread(trials.plan.inputs, num_trials)
        free = ~trials.plan.intervention.mask
        self.observed = ~jnp.isnan(trials.emissions) if trials.may_miss else None
        alive = jnp.ones((num_trials, num_timesteps), bool)
        if self.observed is not None:
            # Steps after the last observation of a trial say nothing: leaving them out is exact, and quicker to converge.
            alive = jnp.flip(jnp.cumsum(jnp.flip(self.observed.any(axis=2), axis=1), axis=1), axis=1) > 0
        self.alive = alive
        self.free = spread(free, num_trials) & alive[:, :, None]
        chosen = trials.representatives
        self.num_patterns = chosen.shape[0]
        self.pattern_free = self.free[chosen]
        self.pattern_alive = alive[chosen]
        self.pattern_observed = None if self.observed is None else self.observed[chosen]
        if trials.pattern is None:
            self.pattern_count = jnp.full(self.num_patterns, num_trials / self.num_patterns, self.dtype)
        else:
            self.pattern_count = jnp.zeros(self.num_patterns, self.dtype).at[trials.pattern].add(1.0)


class _Moments(eqx.Module):
    """Means of regressors z and residuals e by trial, covariances by pattern, for the steps of one regression.

    Only the part of the covariances that is not zero is held: the states are the first of the regressors.
    """

    regressors: Float[Array, "num_trials steps regressors"]
    residuals: Float[Array, "num_trials steps rows"]
    regressor_covs: Float[Array, "num_patterns steps states states"]
    cross_covs: Float[Array, "num_patterns steps rows states"]
    residual_covs: Float[Array, "num_patterns steps rows rows"]


def _initial_statistics(
    params: ParamsLGSSM, moments: Moments, data: _Data, patterns: MaskPatterns
) -> RowStatistics | PatternStatistics:
    r"""The regression of $x_0$ on 1."""
    cov, first = params.initial.cov, slice(0, 1)
    noise, noise_covs, _ = _process_noise(cov, moments, data, first)
    no_states = noise_covs[..., :0]
    found = _Moments(jnp.ones_like(noise[:, :, :1]), noise, no_states[:, :, :0], no_states, noise_covs)
    return _arrival_statistics(found, data, first, patterns.free, patterns.index[..., None], patterns.unclamped, cov)


def _dynamics_statistics(
    params: ParamsLGSSM, moments: Moments, data: _Data, patterns: MaskPatterns
) -> RowStatistics | PatternStatistics:
    r"""The regression of $x_t$ on $[x_{t-1}; u_t; 1]$ for t = 1 ... T-1."""
    num_timesteps = data.emissions.shape[1]
    later = slice(1, num_timesteps)
    cov = params.dynamics.cov
    cov = TimeVarying(cov.values[1:]) if isinstance(cov, TimeVarying) else cov
    noise, noise_covs, noise_informations = _process_noise(cov, moments, data, later)
    weights = over_time(params.dynamics.weights, num_timesteps)[None, 1:]
    weights = jnp.where(data.pattern_free[:, 1:, :, None], weights, 0.0)
    found = _Moments(
        regressors=_with_inputs(moments.smoothed_means[:, :-1], data.inputs[:, 1:]),
        residuals=noise,
        regressor_covs=moments.smoothed_covs[:, :-1],
        cross_covs=-noise_informations @ weights @ moments.filtered_covs[:, :-1],
        residual_covs=noise_covs,
    )
    return _arrival_statistics(found, data, later, patterns.free, patterns.index[..., 1:], patterns.unclamped, cov)


def _process_noise(cov: Array | TimeVarying, moments: Moments, data: _Data, steps: slice) -> tuple[Array, Array, Array]:
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


def _arrival_statistics(
    found: _Moments,
    data: _Data,
    steps: slice,
    patterns_free: Array,
    index: Array,
    unclamped: bool,
    cov: Array | TimeVarying,
) -> RowStatistics | PatternStatistics:
    """Sums over the arrivals in which a row was free."""
    if is_diagonal(cov):
        weights, pattern_weights = (flags[:, steps].astype(data.dtype) for flags in (data.free, data.pattern_free))
        if isinstance(cov, TimeVarying):  # known variances are weights; rows without noise have nothing to learn
            inverse = jnp.where(cov.values > 0, 1 / jnp.where(cov.values > 0, cov.values, 1.0), 0.0)[None]
            weights, pattern_weights = weights * inverse, pattern_weights * inverse
        pattern_weights = pattern_weights * data.pattern_count[:, None, None]
        shared = unclamped and not isinstance(cov, TimeVarying)
        one = slice(0, 1) if shared else slice(None)
        rows = found.residuals.shape[-1]
        return RowStatistics(
            gram=_gram(found.regressors, found.regressor_covs, weights[..., one], pattern_weights[..., one]),
            cross=_flat(weights * found.residuals).T @ _flat(found.regressors)
            + _pad(jnp.einsum("gti,gtip->ip", pattern_weights, found.cross_covs), found.regressors.shape[-1]),
            second=(weights * found.residuals**2).sum(axis=(0, 1))
            + jnp.einsum("gti,gtii->i", pattern_weights, found.residual_covs).reshape(rows),
            count=weights.sum(axis=(0, 1)),
        )
    return _pattern_statistics(found, data, steps, patterns_free, index, unclamped)


def _pattern_statistics(
    found: _Moments, data: _Data, steps: slice, patterns_free: Array, index: Array, unclamped: bool
) -> PatternStatistics:
    num_trials, num_steps = found.residuals.shape[:2]
    num_masks = patterns_free.shape[0]
    index = jnp.broadcast_to(index, (num_trials, num_steps))
    weights = data.alive[:, steps].astype(data.dtype)
    chosen = index[data.trials.representatives]
    pattern_weights = data.pattern_alive[:, steps].astype(data.dtype) * data.pattern_count[:, None]
    both = jnp.concatenate([_flat(found.residuals), _flat(found.regressors)], axis=1)
    second = _group_products(both, weights.reshape(-1), index.reshape(-1), num_masks)

    def add(covs: Array) -> Array:
        weighted = (covs * pattern_weights[..., None, None]).reshape(chosen.size, *covs.shape[2:])
        return jax.ops.segment_sum(weighted, chosen.reshape(-1), num_masks)

    rows = found.residuals.shape[-1]
    return PatternStatistics(
        free=patterns_free,
        gram=second[:, rows:, rows:] + _pad_both(add(found.regressor_covs), found.regressors.shape[-1]),
        cross=second[:, :rows, rows:] + _pad(add(found.cross_covs), found.regressors.shape[-1]),
        second=second[:, :rows, :rows] + add(found.residual_covs),
        count=jax.ops.segment_sum(weights.reshape(-1), index.reshape(-1), num_masks),
        complete=unclamped,
    )


def _group_products(vectors: Array, weights: Array, index: Array, num_groups: int) -> Array:
    """Sums of outer products, one for each group of steps."""
    if num_groups <= MOST_PATTERNS_ONE_BY_ONE:
        one = lambda group: (vectors * jnp.where(index == group, weights, 0.0)[:, None]).T @ vectors  # noqa: E731
        return lax.map(one, jnp.arange(num_groups, dtype=index.dtype))
    outer = vectors[:, :, None] * vectors[:, None, :] * weights[:, None, None]
    return jax.ops.segment_sum(outer, index, num_groups)


def _gram(regressors: Array, covs: Array, weights: Array, pattern_weights: Array) -> Array:
    r"""$\sum E[z z^\top]$ with one weight for each step and row."""
    flat = _flat(regressors)
    means = lax.map(lambda weight: (flat * weight[:, None]).T @ flat, _flat(weights).T)
    return means + _pad_both(jnp.einsum("gtr,gtij->rij", pattern_weights, covs), flat.shape[1])


def _pad(sums: Array, columns: int) -> Array:
    """Zeros for the regressors that are known."""
    return jnp.pad(sums, (*((0, 0),) * (sums.ndim - 1), (0, columns - sums.shape[-1])))


def _pad_both(sums: Array, columns: int) -> Array:
    missing = columns - sums.shape[-1]
    return jnp.pad(sums, (*((0, 0),) * (sums.ndim - 2), (0, missing), (0, missing)))


def _emission_statistics(params: ParamsLGSSM, moments: Moments, data: _Data) -> RowStatistics | PatternStatistics:
    r"""The regression of $y_t$ on $[x_t; u_t; 1]$."""
    summarise = _row_emission_statistics if is_diagonal(params.emissions.cov) else _correlated_emission_statistics
    rows = over_time(params.emissions.weights, data.emissions.shape[1])
    return summarise(params, rows, moments.smoothed_means, moments.smoothed_covs, data)


def _row_emission_statistics(
    params: ParamsLGSSM, rows: Array, states: Array, state_covs: Array, data: _Data
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
        total = jnp.einsum("gtr,gtij->tij", pattern_weights, state_covs)
        loaded = rows @ total  # R_t P_t, summed over trials
        spread = jnp.einsum("tni,tni->n", loaded, rows)
        cross_covs = loaded.sum(axis=0)
    else:
        by_row = jnp.einsum("gtn,gtij->tnij", pattern_weights, state_covs)
        loaded = jnp.einsum("tni,tnij->tnj", rows, by_row)
        spread, cross_covs = jnp.einsum("tni,tni->n", loaded, rows), loaded.sum(axis=0)

    def add(residuals: Array, regressors: Array, weights: Array) -> tuple[Array, Array]:
        weighted = residuals * weights
        return weighted.T @ regressors, (weighted * residuals).sum(axis=0)

    regressors = _with_inputs(states, data.inputs)
    cross, second = _sum_over_trials(params, states, regressors, data, add, weights)
    return RowStatistics(
        gram=_gram(regressors, state_covs, weights, pattern_weights),
        cross=cross - _pad(cross_covs, regressors.shape[-1]),
        second=second + spread,
        count=jnp.broadcast_to(weights.sum(axis=(0, 1)), second.shape),
    )


def _correlated_emission_statistics(
    params: ParamsLGSSM, rows: Array, states: Array, state_covs: Array, data: _Data
) -> PatternStatistics:
    r"""Missing entries are filled in given the observed ones and the states: $e \to K_o e_o$, $K_o = R_{:,o} R_{oo}^{-1}$.

    They are part of the complete data, so that the M step is that of a complete regression. A step with nothing observed
    is left out.
    """
    cov, (num_trials, num_timesteps, emission_dim) = params.emissions.cov, data.emissions.shape
    cross_covs = rows[None] @ state_covs
    second_covs = cross_covs @ jnp.swapaxes(rows, 1, 2)[None]
    used = jnp.ones((num_trials, num_timesteps, 1), data.dtype)
    pattern_used = jnp.ones(state_covs.shape[:2], data.dtype)
    gains = None
    if data.observed is not None:
        observed = data.observed[data.trials.representatives]
        used = data.observed.any(axis=2, keepdims=True).astype(data.dtype)
        pattern_used = observed.any(axis=2).astype(data.dtype)
        gains, unexplained = _fill_in(over_time(cov, num_timesteps)[None], observed)
        second_covs = gains @ second_covs @ jnp.swapaxes(gains, 2, 3) + unexplained
        cross_covs = gains @ cross_covs
    pattern_weights = pattern_used * data.pattern_count[:, None]

    def add(residuals: Array, regressors: Array, used: Array, pattern: Array) -> tuple[Array, Array]:
        if gains is not None:
            own_gains = lax.dynamic_index_in_dim(gains, pattern, keepdims=False)
            residuals = jnp.einsum("tnm,tm->tn", own_gains, residuals)
        weighted = residuals * used
        return weighted.T @ regressors, weighted.T @ residuals

    regressors = _with_inputs(states, data.inputs)
    pattern = data.trials.spread(jnp.arange(data.num_patterns))
    cross, second = _sum_over_trials(params, states, regressors, data, add, used, pattern)
    total = lambda covs: jnp.einsum("gt,gtij->ij", pattern_weights, covs)  # noqa: E731
    return PatternStatistics(
        free=jnp.ones((1, emission_dim), bool),
        gram=_gram(regressors, state_covs, used, pattern_weights[:, :, None]),
        cross=(cross - _pad(total(cross_covs), regressors.shape[-1]))[None],
        second=(second + total(second_covs))[None],
        count=used.sum()[None],
        complete=True,
    )


def _sum_over_trials(
    params: ParamsLGSSM, states: Array, regressors: Array, data: _Data, add: Callable[..., Any], *others: Array
) -> Any:
    """Sum of `add(residuals, regressors, *others)`, trial by trial: residuals of all trials would be another copy of Y."""

    def one(at: tuple[Array, ...]) -> Any:
        emissions, states, inputs, regressors, *others = at
        residuals = emissions - apply_weights(params.emissions.weights, states) - emission_offsets(params, inputs)
        if data.observed is not None:
            residuals = jnp.where(jnp.isnan(emissions), 0.0, residuals)
        return add(residuals, regressors, *others)

    trials = (data.emissions, states, data.inputs, regressors, *others)
    first, rest = jax.tree.map(lambda leaf: leaf[0], trials), jax.tree.map(lambda leaf: leaf[1:], trials)
    step = lambda sums, at: (jax.tree.map(jnp.add, sums, one(at)), None)  # noqa: E731
    return lax.scan(step, one(first), rest)[0]


def _fill_in(cov: Array, observed: Array) -> tuple[Array, Array]:
    r"""$K_o$ (zero in the columns of missing entries) and $R - K_o R_{o,:}$ for every pattern and step."""
    both = observed[..., :, None] & observed[..., None, :]
    eye = jnp.eye(cov.shape[-1], dtype=cov.dtype)[None, None]
    factors = jnp.linalg.cholesky(jnp.where(both, cov, eye))
    seen = jnp.where(observed[..., :, None], cov, 0.0)
    gains = jnp.swapaxes(jax.scipy.linalg.cho_solve((factors, True), seen), -1, -2)
    gains = jnp.where(observed[..., None, :], gains, 0.0)
    return gains, cov - gains @ seen


def _with_inputs(states: Array, inputs: Array) -> Array:
    """$[x; u; 1]$ at each step."""
    return jnp.concatenate([states, inputs, jnp.ones((*states.shape[:-1], 1), states.dtype)], axis=-1)


def _flat(array: Array) -> Array:
    """Trials and steps as one axis."""
    return array.reshape(-1, array.shape[-1])
