r"""Many emissions, few states: whitened emissions as at most state_dim pseudo-observations with unit noise.

$z_t = H_t x_t + N(0, I)$. Y is read once, for z and for the squares of what no state can explain, $\|R^{-1/2} y_t\|^2 - \|z_t\|^2$ as a sum
of squared residuals; everything after that has the size of the state.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from issm.inference import lanes
from issm.inference.observations import whiten
from issm.models.emission_sums import keeps_digits
from issm.models.fields import TimeVarying, is_diagonal, values_of
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import emission_offsets
from issm.models.trials import Trials


class Compressed(eqx.Module):
    r"""Emissions of all trials as few rows.

    Attributes:
        weights: $H_t$, `(num_timesteps or 1, rows, state_dim, num_patterns or 1)`, in the layout of `lanes`.
        values: $z_t$ before `offsets` are subtracted, `(num_trials, num_timesteps, rows)`, in the layout of the data.
        offsets: `(num_trials or 1, num_timesteps or 1, rows)`.
        log_norm: $-\tfrac12 (N_{obs} \log 2\pi + \log |R_{obs}|)$, `(num_trials or 1, num_timesteps)`.
        unexplained: $\min_x \|R^{-1/2} (y_t - C x - D u_t - d)\|^2$, `(num_trials or 1, num_timesteps)`; the same for all
            where `trials.sums` tell what they sum to.
    """

    weights: Float[Array, "num_timesteps_or_1 rows state_dim patterns"]
    values: Float[Array, "num_trials num_timesteps rows"]
    offsets: Float[Array, "offset_trials offset_timesteps rows"]
    log_norm: Float[Array, "num_trials_or_1 num_timesteps"]
    unexplained: Float[Array, "trials_or_1 num_timesteps"]


def compress(params: ParamsLGSSM, trials: Trials) -> Compressed:
    """Whiten, drop missing rows, and keep at most state_dim rows."""
    if not trials.may_miss and not _varies(params):
        return _compress_complete(params, trials)
    if is_diagonal(params.emissions.cov) and not _varies(params):
        return _compress_diagonal(params, trials)
    return _compress_general(params, trials)


def residuals(params: ParamsLGSSM, trials: Trials) -> Array:
    """$y_t - D u_t - d$, `(num_trials, num_timesteps, emission_dim)`; NaN where missing."""
    return trials.emissions - _offsets(params, trials.plan.inputs)


def squares_by_emission(params: ParamsLGSSM, trials: Trials) -> Array:
    r"""$\sum_t (y_{tn} - D_n u_t - d_n)^2$ of complete data, `(num_trials, emission_dim)`."""
    if trials.plan.inputs.ndim == 2:
        return (residuals(params, trials) ** 2).sum(axis=1)
    return _by_trial(lambda emissions, offsets: ((emissions - offsets) ** 2).sum(axis=0), params, trials)


def _varies(params: ParamsLGSSM) -> bool:
    """Whether the emission map or its noise varies in time."""
    return any(isinstance(field, TimeVarying) for field in (params.emissions.weights, params.emissions.cov))


def _whitener(params: ParamsLGSSM) -> tuple[Array, Array]:
    r"""$R^{-1/2}$, one axis where it is diagonal, and $\log |R|$, of a covariance that is the same at all steps."""
    cov = values_of(params.emissions.cov)
    if is_diagonal(params.emissions.cov):
        return 1 / jnp.sqrt(cov), jnp.log(cov).sum()
    factor = jnp.linalg.cholesky(cov)
    whitener = jax.scipy.linalg.solve_triangular(factor, jnp.eye(cov.shape[0], dtype=cov.dtype), lower=True)
    return whitener, 2 * jnp.log(jnp.diagonal(factor)).sum()


def _offsets(params: ParamsLGSSM, inputs: Array) -> Array:
    """$D u_t + d$, `(num_trials or 1, num_timesteps or 1, emission_dim)`."""
    bias = params.emissions.bias
    if params.input_dim == 0 and not isinstance(bias, TimeVarying):
        return bias[None, None]
    if inputs.ndim == 2:
        return emission_offsets(params, inputs)[None]
    return jax.vmap(emission_offsets, in_axes=(None, 0))(params, inputs)


def _compress_complete(params: ParamsLGSSM, trials: Trials) -> Compressed:
    """Constant emissions, nothing missing: one QR for all steps."""
    weights = values_of(params.emissions.weights)
    emission_dim, state_dim = weights.shape
    whitener, log_det = _whitener(params)
    rows = _apply(whitener, weights.T).T
    log_norm = -(emission_dim * jnp.log(2 * jnp.pi).astype(log_det.dtype) + log_det) / 2
    log_norm = jnp.broadcast_to(log_norm, (1, trials.emissions.shape[1]))
    if emission_dim <= state_dim:
        values = _apply(whitener, residuals(params, trials))
        return _centred(rows[None, :, :, None], values, log_norm, jnp.zeros_like(log_norm))
    rotation, rows = jnp.linalg.qr(rows)
    rows = rows[None, :, :, None]
    from_residuals = lambda y, offsets: _project(_apply(whitener, y - offsets), rotation)  # noqa: E731
    inputs, emissions = trials.plan.inputs, trials.emissions
    if trials.sums is None and inputs.ndim == 3:  # offsets of every trial would be another copy of Y
        values, unexplained = _by_trial(from_residuals, params, trials)
        return _centred(rows, values, log_norm, unexplained)

    projection = whitener[:, None] * rotation if whitener.ndim == 1 else whitener.T @ rotation
    values, offsets = emissions @ projection, _projected_offsets(params, inputs, projection)
    explained = ((values - offsets) ** 2).sum(axis=-1)
    if trials.sums is None:
        enough, left = _unexplained(params, trials, whitener, explained)

        def again(emissions: Array, offsets: Array) -> tuple[Array, Array]:
            values, squares = from_residuals(emissions, offsets)
            return values, _like(left[0], squares)

        values, left = _replace_unless(enough, again, params, trials, values, left)
        left = jnp.broadcast_to(left * (left.shape[1] / explained.shape[1]), explained.shape)
        return Compressed(rows, values, jnp.where(enough, offsets, 0.0), log_norm, left)
    second = trials.sums.less_offsets(params)
    whitened = second * whitener**2 if second.ndim == 1 else (whitener @ second) * whitener
    total = whitened.sum()
    left = total - explained.sum()
    in_all = lambda: _by_trial(from_residuals, params, trials)[1].sum()  # noqa: E731
    unexplained = lax.cond(keeps_digits(left, total), lambda: left, in_all)
    return Compressed(rows, values, offsets, log_norm, jnp.full_like(log_norm, unexplained / explained.size))


def _unexplained(params: ParamsLGSSM, trials: Trials, whitener: Array, explained: Array) -> tuple[Array, Array]:
    """Whether differences of squares keep their digits, and what no state explains: of every step or of every trial."""
    whitened_offsets = _apply(whitener, _offsets(params, trials.plan.inputs))
    of_offsets = jnp.broadcast_to((whitened_offsets**2).sum(axis=-1), (1, explained.shape[1]))
    if whitener.ndim == 2:  # XLA sums squares of a product without keeping it, but not of a product less its offsets
        along_offsets = (trials.emissions * (whitened_offsets @ whitener)).sum(axis=-1)
        total = (_apply(whitener, trials.emissions) ** 2).sum(axis=-1) - 2 * along_offsets + of_offsets
    elif trials.by_step:
        total = ((_apply(whitener, trials.emissions) - whitened_offsets) ** 2).sum(axis=-1)
    else:
        total = (squares_by_emission(params, trials) @ whitener**2)[:, None]
    of_offsets, explained = (_like(total[:1], x) for x in (of_offsets, explained))
    left = total - explained
    expected = left + trials.emissions[0].size / total.shape[1]
    enough = keeps_digits(expected, total + of_offsets)
    if whitener.ndim == 2:  # offsets that leave squares take twice the digits
        enough = enough & keeps_digits(expected**2, of_offsets**2)
    return enough, left


def _like(total: Array, by_step: Array) -> Array:
    """Squares of steps, or their sum where the total has one entry on its last axis."""
    return by_step if total.shape[-1] == by_step.shape[-1] else by_step.sum(axis=-1, keepdims=True)


def _centred(rows: Array, values: Array, log_norm: Array, unexplained: Array) -> Compressed:
    return Compressed(rows, values, jnp.zeros((1, 1, values.shape[-1]), values.dtype), log_norm, unexplained)


def _replace_unless(
    enough: Array, kernel: Callable[..., Any], params: ParamsLGSSM, trials: Trials, *found: Array
) -> tuple[Array, ...]:
    """`found`, or what `kernel` gives for each trial in its place; a loop of no steps, unlike a condition, copies nothing."""
    offsets = emission_offsets(params, trials.plan.inputs)

    def replace(trial: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        emissions = lax.dynamic_index_in_dim(trials.emissions, trial, keepdims=False)
        results = kernel(emissions, offsets)
        return tuple(lax.dynamic_update_index_in_dim(*pair, trial, axis=0) for pair in zip(found, results, strict=True))

    return lax.fori_loop(0, jnp.where(enough, 0, trials.num_trials), replace, found)


def _project(whitened: Array, rotation: Array) -> tuple[Array, Array]:
    """The few rows z, and the squares of what they leave."""
    values = whitened @ rotation
    return values, ((whitened - values @ rotation.T) ** 2).sum(axis=-1)


def _projected_offsets(params: ParamsLGSSM, inputs: Array, projection: Array) -> Array:
    """What $D u_t + d$ adds to z, without an array of the size of the data."""
    if inputs.ndim == 2:
        return _offsets(params, inputs) @ projection
    weights, bias = (values_of(field) for field in (params.emissions.input_weights, params.emissions.bias))
    return inputs @ (weights.T @ projection) + (bias @ projection)[None, None]


def _compress_diagonal(params: ParamsLGSSM, trials: Trials) -> Compressed:
    """Missing entries with diagonal R: the products with C run over all steps of all trials at once."""
    weights, cov = values_of(params.emissions.weights), values_of(params.emissions.cov)
    emission_dim, state_dim = weights.shape
    observed = ~jnp.isnan(trials.emissions)
    scale = 1 / jnp.sqrt(cov)
    weights = weights * scale[:, None]
    whitened = jnp.where(observed, _apply(scale, residuals(params, trials)), 0.0)
    counts = jnp.log(2 * jnp.pi * cov)
    log_norm = -(observed.astype(scale.dtype) @ counts) / 2
    observed_of_patterns = observed[trials.representatives]
    if emission_dim <= state_dim:
        rows = jnp.where(observed_of_patterns[..., None], weights[None, None], 0.0)
        return _centred(jnp.transpose(rows, (1, 2, 3, 0)), whitened, log_norm, jnp.zeros_like(log_norm))
    squared = (weights[:, :, None] * weights[:, None, :]).reshape(emission_dim, state_dim**2)
    precisions = (observed_of_patterns.astype(scale.dtype) @ squared).reshape(
        *observed_of_patterns.shape[:2], state_dim, state_dim
    )
    rows, values, states = _from_potentials(trials, precisions, whitened @ weights)

    def one(emissions: Array, offsets: Array, states: Array) -> Array:
        left = _apply(scale, emissions - offsets) - states @ weights.T
        return (jnp.where(jnp.isnan(emissions), 0.0, left) ** 2).sum(axis=-1)

    return _centred(rows, values, log_norm, _by_trial(one, params, trials, states))


def _compress_general(params: ParamsLGSSM, trials: Trials) -> Compressed:
    """Anything else: full R with missing entries, or an emission map that varies in time."""
    plan = trials.plan
    one = jax.vmap(lambda y, u: whiten(params, y, u, may_miss=trials.may_miss), in_axes=(0, plan.axes.inputs))
    whitened = one(trials.emissions, plan.inputs)
    weights = values_of(whitened.weights)  # with a time axis: missing entries and varying fields both give one
    weights_of_patterns = weights[trials.representatives]
    if params.emission_dim <= params.state_dim:
        rows = jnp.transpose(weights_of_patterns, (1, 2, 3, 0))
        return _centred(rows, whitened.values, whitened.log_norm, jnp.zeros_like(whitened.log_norm))
    precisions = jnp.einsum("gtni,gtnj->gtij", weights_of_patterns, weights_of_patterns)
    shifts = jnp.einsum("ktni,ktn->kti", weights, whitened.values)
    rows, values, states = _from_potentials(trials, precisions, shifts)
    unexplained = ((whitened.values - jnp.einsum("ktni,kti->ktn", weights, states)) ** 2).sum(axis=-1)
    return _centred(rows, values, whitened.log_norm, unexplained)


def _from_potentials(trials: Trials, precisions: Array, shifts: Array) -> tuple[Array, Array, Array]:
    r"""Rows and values from $J = H^\top H$ and $h = H^\top z$, and states with $J x = h$; J may be singular."""
    factors = lanes.cholesky(jnp.transpose(precisions, (1, 2, 3, 0)))
    whiteners = trials.spread(lanes.invert_lower(factors), axis=-1)
    values = lanes.matvec(whiteners, jnp.transpose(shifts, (1, 2, 0)))
    states = lanes.matvec(lanes.transpose(whiteners), values)
    values, states = (jnp.transpose(x, (2, 0, 1)) for x in (values, states))
    return lanes.transpose(factors), values, states


def _by_trial(kernel: Callable[..., Any], params: ParamsLGSSM, trials: Trials, *others: Array) -> Any:
    """`kernel(emissions, offsets, *others)` of every trial, one after the other: no copy of Y, and each is read once."""
    inputs = trials.plan.inputs
    if inputs.ndim == 2:
        offsets = emission_offsets(params, inputs)
        return lax.map(lambda at: kernel(at[0], offsets, *at[1:]), (trials.emissions, *others))
    one = lambda at: kernel(at[0], emission_offsets(params, at[1]), *at[2:])  # noqa: E731
    return lax.map(one, (trials.emissions, inputs, *others))


def _apply(whitener: Array, vectors: Array) -> Array:
    """$W v$ for vectors in the last axis; a diagonal W has one axis."""
    if whitener.ndim == 1:
        return vectors * jnp.broadcast_to(whitener, vectors.shape)
    return vectors @ whitener.T
