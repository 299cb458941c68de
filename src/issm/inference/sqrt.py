r"""Square-root filter and smoother: exact to single precision where covariances cannot be.

Nothing here forms a covariance before the end. With factors $P = L L^\top$ of covariances and $\Phi = \Upsilon \Upsilon^\top$ of
informations, both directions of time are built from the same two operations, each one QR:

- a sum of squares, `tria`: $[A_t L,\ Q_t^{1/2}]$ is the predicted covariance, $[\Upsilon^b,\ H_t^\top]$ the information of an
  observation added to that of the future;
- an update, `condition`: $L (I + L^\top H^\top H L)^{-1} L^\top$, which is the filter's update with rows $z = H x + N(0, I)$, the
  backward step $\Upsilon^b_{t-1} = A_t^\top \mathrm{condition}(\Upsilon_t, Q_t^{\top/2})$ of the information that the future has on
  $x_{t-1}$, the smoothed covariance $P^s_t = \mathrm{condition}(L_t, \Upsilon^{b\top}_t)$ and the adjoint
  $N_t = \mathrm{condition}(\Upsilon_t, L^{-\top}_t)$.

The smoothed covariance is thus a product of factors in the two-filter form $L (I + L^\top \Upsilon^b \Upsilon^{b\top} L)^{-1} L^\top$.
The form of the covariance kernels, $P - P A^\top N A P$, is a difference: where smoothing shrinks a variance of 1e6 to 1e-6 it
leaves nothing in single precision. Only I + (something positive) is ever inverted, so that a clamp, a known start or a
singular Q is an exact zero in a factor.

Means are refined once, as in the solution of linear equations: the filtered means of a first pass are subtracted from data
and dynamics in twice the working precision, and what is left, of the size of the noise, is filtered again.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm._linalg import noise_factor, safe_sqrt
from issm.inference.exact import exact_residual
from issm.inference.means import (
    Gains,
    Means,
    apply,
    following,
    over_trials,
    run_means,
    scan_recursion,
    spread,
    swap,
    transpose,
)
from issm.inference.moments import Moments
from issm.inference.observations import whiten
from issm.interventions import Intervention
from issm.models.fields import TimeVarying, is_diagonal, over_time, values_of
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import lgssm_transitions
from issm.models.trials import Trials

NUMBERS_AT_ONCE = 2**18
"""Emissions that are read together: their residuals in twice the precision are several times as large as they."""


def sqrt_moments(params: ParamsLGSSM, trials: Trials) -> Moments:
    """Filter and smooth all trials with factors in place of covariances."""
    patterns = trials.of_patterns()
    weights = over_trials(lambda inputs, plan: lgssm_transitions(params, inputs, plan).weights, patterns.plan)
    noise = over_trials(lambda _, plan: _noise_factors(params, plan), patterns.plan)
    rows, rotation = _rows(params, patterns)

    filtering = _filter(weights, noise, rows, trials.num_patterns)
    informing = _inform(weights, noise, rows, trials.num_patterns)
    smoothed_covs = _square(condition(filtering.factors, transpose(informing.beyond)).factor)
    adjoint_factors = condition(informing.factors, transpose(filtering.predicted_factors)).factor
    cross_covs = _cross_covs(weights, noise, filtering.factors, informing.factors)

    means, reference, leftover = _refined_means(params, trials, weights, filtering.gains, rotation)
    onward = _square(filtering.factors) @ transpose(following(weights))  # Cov[x_t, x_{t+1} | y_{0:t}]
    hindsight = apply(onward, following(means.adjoints), trials.pattern)
    quadratic = (means.innovations**2).sum(axis=-1) + leftover.squares
    return Moments(
        logliks=leftover.log_norm - (trials.spread(filtering.log_det.T) + quadratic.T) / 2,
        filtered_means=swap(reference + means.filtered),
        filtered_covs=swap(_square(filtering.factors)),
        predicted_means=swap(reference + means.predicted),
        predicted_covs=swap(_square(filtering.predicted_factors)),
        adjoints=swap(means.adjoints),
        informations=swap(_square(adjoint_factors)),
        smoothed_means=swap(reference + (means.filtered + hindsight)),
        smoothed_covs=swap(smoothed_covs),
        smoothed_cross_covs=swap(cross_covs),
    )


def tria(matrix: Array) -> Array:
    r"""A lower triangular factor of $M M^\top$; the sign of its columns is free."""
    return transpose(jnp.linalg.qr(transpose(matrix), mode="r"))


class Conditioned(eqx.Module):
    r"""What conditioning on rows H gives, with $S = I + H P H^\top$.

    Attributes:
        spread: $S^{\top/2}$, upper triangular.
        gains: $S^{-1/2} H P$.
        factor: A factor of $P - P H^\top S^{-1} H P$.
    """

    spread: Array
    gains: Array
    factor: Array


def condition(factor: Array, rows: Array) -> Conditioned:
    r"""Update $P = L L^\top$ with rows of unit noise, by one QR of $[L^\top H^\top, L^\top;\ I, 0]$.

    The rows of the identity come last: Householder reflections keep the digits of small rows below large ones, and here
    $L^\top H^\top$ is large.
    """
    num_rows = rows.shape[-2]
    batch = jnp.broadcast_shapes(factor.shape[:-2], rows.shape[:-2])
    above = jnp.concatenate(
        [_expand(transpose(rows @ factor), batch), _expand(transpose(factor), batch)],
        axis=-1,
    )
    below = jnp.eye(num_rows, above.shape[-1], dtype=factor.dtype)
    triangle = jnp.linalg.qr(jnp.concatenate([above, _expand(below, batch)], axis=-2), mode="r")
    spread = triangle[..., :num_rows, :num_rows]
    return Conditioned(spread, triangle[..., :num_rows, num_rows:], transpose(triangle[..., num_rows:, num_rows:]))


class _Filtering(eqx.Module):
    """Factors of predicted and filtered covariances, and what they do to means."""

    predicted_factors: Array
    factors: Array
    gains: Gains
    log_det: Array


def _filter(weights: Array, noise: Array, rows: Array, num_patterns: int) -> _Filtering:
    """Forwards."""
    rows = jnp.broadcast_to(rows, (weights.shape[0], *rows.shape[1:]))
    start = jnp.zeros((num_patterns, *weights.shape[2:]), weights.dtype)

    def step(factor: Array, at: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Conditioned]]:
        weights, noise, rows = at
        predicted = tria(jnp.concatenate([weights @ factor, _expand(noise, factor.shape[:-2])], axis=-1))
        done = condition(predicted, rows)
        return done.factor, (predicted, done)

    _, (predicted, done) = lax.scan(step, start, (weights, noise, rows))
    eye = jnp.broadcast_to(jnp.eye(rows.shape[-2], dtype=rows.dtype), done.spread.shape)
    whitener = jax.scipy.linalg.solve_triangular(transpose(done.spread), eye, lower=True)
    log_det = 2 * jnp.log(jnp.abs(jnp.diagonal(done.spread, axis1=-2, axis2=-1))).sum(axis=-1)
    return _Filtering(predicted, done.factor, Gains(whitener, whitener @ rows, done.gains), log_det)


class _Informing(eqx.Module):
    r"""Factors of the information on $x_t$ in $y_{t:T-1}$, and `beyond`, in $y_{t+1:T-1}$."""

    factors: Array
    beyond: Array


def _inform(weights: Array, noise: Array, rows: Array, num_patterns: int) -> _Informing:
    """Backwards."""
    rows = jnp.broadcast_to(rows, (weights.shape[0], *rows.shape[1:]))
    end = jnp.zeros((num_patterns, *weights.shape[2:]), weights.dtype)

    def step(beyond: Array, at: tuple[Array, Array, Array]) -> tuple[Array, _Informing]:
        weights, noise, rows = at
        factor = tria(jnp.concatenate([beyond, _expand(transpose(rows), beyond.shape[:-2])], axis=-1))
        before = transpose(weights) @ condition(factor, transpose(noise)).factor
        return before, _Informing(factor, beyond)

    return lax.scan(step, end, (weights, noise, rows), reverse=True)[1]


def _cross_covs(weights: Array, noise: Array, factors: Array, informing: Array) -> Array:
    """Cov[x_t, x_{t+1} | y], a block of the joint covariance of the two states, conditioned on what comes after."""
    here, weights, noise, future = factors[:-1], weights[1:], noise[1:], transpose(informing[1:])
    noise = _expand(noise, here.shape[:-2])
    above = jnp.concatenate([here, jnp.zeros_like(here)], axis=-1)
    below = jnp.concatenate([weights @ here, noise], axis=-1)
    rows = jnp.concatenate([jnp.zeros_like(future), future], axis=-1)
    joint = condition(jnp.concatenate([above, below], axis=-2), rows).factor
    state_dim = here.shape[-1]
    return joint[..., :state_dim, :] @ transpose(joint[..., state_dim:, :])


def _noise_factors(params: ParamsLGSSM, intervention: Intervention) -> Array:
    """A factor of the clamped covariance of every step, the first being that of the initial state."""
    mask, variance = intervention.mask, intervention.variance
    cov, initial = params.dynamics.cov, params.initial.cov
    free = over_time(jax.tree.map(lambda values: noise_factor(values, diagonal=is_diagonal(cov)), cov), mask.shape[0])
    free = free.at[0].set(noise_factor(initial, diagonal=is_diagonal(initial)))
    clamped = safe_sqrt(jnp.where(mask, variance, 0.0))[:, :, None] * jnp.eye(mask.shape[1], dtype=free.dtype)[None]
    kept = jnp.where(mask[:, :, None], 0.0, free)
    if is_diagonal(cov) and is_diagonal(initial):
        return kept + clamped
    return tria(jnp.concatenate([kept, clamped], axis=-1))


def _rows(params: ParamsLGSSM, patterns: Trials) -> tuple[Array, Array | None]:
    r"""Whitened emission weights as at most state_dim rows, $U = W H$, and the rotation W if there were more."""
    one = lambda emissions, inputs: whiten(params, emissions, inputs, may_miss=patterns.may_miss).weights  # noqa: E731
    weights = jax.vmap(one, in_axes=(0, patterns.plan.axes.inputs))(patterns.emissions, patterns.plan.inputs)
    rows = swap(weights.values) if isinstance(weights, TimeVarying) else weights[None, :1]
    if rows.shape[-2] <= rows.shape[-1]:
        return rows, None
    rotation, rows = jnp.linalg.qr(rows)
    return rows, rotation


class _Leftover(eqx.Module):
    """What of the log-likelihood no state can change: the squares of the emissions off the rows, and the norming constant."""

    squares: Array
    log_norm: Array


def _refined_means(
    params: ParamsLGSSM, trials: Trials, weights: Array, gains: Gains, rotation: Array | None
) -> tuple[Means, Array, _Leftover]:
    """Means of all trials as a reference path and the deviations from it, and the leftover."""
    shifts = over_trials(lambda inputs, plan: lgssm_transitions(params, inputs, plan).shift, trials.plan)
    of_trials = weights if weights.shape[1] == 1 else spread(weights, trials.pattern)

    def deviations(reference: Array) -> tuple[Means, _Leftover]:
        remaining = -exact_residual((reference, -shifts), of_trials, _previous(reference))
        values, leftover = _read_data(params, trials, reference, rotation)
        return run_means(weights, remaining, gains, values, trials.pattern, scan_recursion), leftover

    num_trials, num_timesteps, _ = trials.emissions.shape
    nothing = jnp.zeros((num_timesteps, num_trials, params.state_dim), trials.emissions.dtype)
    reference = deviations(nothing)[0].filtered
    means, leftover = deviations(reference)
    return means, reference, leftover


def _read_data(
    params: ParamsLGSSM, trials: Trials, reference: Array, rotation: Array | None
) -> tuple[Array, _Leftover]:
    """What is left of the emissions beside a path, whitened and as few rows as the states have; some trials at a time."""
    num_trials, num_timesteps, emission_dim = trials.emissions.shape
    maps, bias = _emission_map(params)
    where = lambda p: (p.emissions.bias, p.emissions.input_weights)  # noqa: E731
    none = jnp.zeros((num_timesteps, 0), trials.emissions.dtype)
    bare = eqx.tree_at(where, params, (jnp.zeros(emission_dim, none.dtype), jnp.zeros((emission_dim, 0), none.dtype)))
    shared = trials.plan.inputs.ndim == 2
    pattern = trials.spread(jnp.arange(trials.num_patterns))

    def one(at: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        emissions, path, pattern, *inputs = at
        regressors = jnp.concatenate([path, trials.plan.inputs if shared else inputs[0]], axis=-1)
        residuals = exact_residual((emissions, -bias), maps, regressors)
        whitened = whiten(bare, residuals, none, may_miss=trials.may_miss)
        values, squares = whitened.values, jnp.zeros_like(whitened.log_norm)
        if rotation is not None:
            here = lax.dynamic_index_in_dim(rotation, jnp.minimum(pattern, rotation.shape[1] - 1), axis=1)
            rows = apply(transpose(here), values[:, None], None)
            squares = ((values[:, None] - apply(here, rows, None)) ** 2).sum(axis=(1, 2))
            values = rows[:, 0]
        return values, squares, whitened.log_norm

    data = (trials.emissions, swap(reference), pattern, *(() if shared else (trials.plan.inputs,)))
    most = max(NUMBERS_AT_ONCE // (num_timesteps * emission_dim), 1)
    together = max(size for size in range(1, min(most, num_trials) + 1) if num_trials % size == 0)
    values, squares, log_norm = lax.map(one, data, batch_size=together)
    return swap(values), _Leftover(swap(squares), log_norm)


def _emission_map(params: ParamsLGSSM) -> tuple[Array, Array]:
    """[C D] and d with a leading time axis."""
    fields = (params.emissions.weights, params.emissions.input_weights)
    varying = [field.values.shape[0] for field in fields if isinstance(field, TimeVarying)]
    length = varying[0] if varying else 1
    maps = jnp.concatenate([over_time(field, length) for field in fields], axis=-1)
    bias = values_of(params.emissions.bias)
    return maps, bias[None] if bias.ndim == 1 else bias


def _previous(array: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(array[:1]), array[:-1]])


def _square(factor: Array) -> Array:
    return factor @ transpose(factor)


def _expand(array: Array, batch: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(array, (*batch, *array.shape[-2:]))
