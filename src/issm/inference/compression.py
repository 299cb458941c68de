r"""Many emissions, few states: whitened emissions as at most state_dim pseudo-observations with unit noise.

$z_t = H_t x_t + N(0, I)$. Y is read once for z and once for the residuals of the filtered means, whose squares enter the likelihood;
everything between has the size of the state.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from issm.inference import lanes
from issm.inference.observations import whiten
from issm.models.lgssm import ParamsLGSSM, TimeVarying, is_diagonal, values_of
from issm.models.transitions import emission_offsets
from issm.models.trials import Trials


class Compressed(eqx.Module):
    r"""Emissions of all trials as few rows, in the layout of `lanes`.

    Attributes:
        weights: $H_t$, `(num_timesteps or 1, rows, state_dim, num_patterns or 1)`.
        values: $z_t$, `(num_timesteps, rows, num_trials)`.
        log_norm: $-\tfrac12 (N_{obs} \log 2\pi + \log |R_{obs}|)$, `(num_trials or 1, num_timesteps)`.
    """

    weights: Float[Array, "num_timesteps_or_1 rows state_dim patterns"]
    values: Float[Array, "num_timesteps rows num_trials"]
    log_norm: Float[Array, "num_trials_or_1 num_timesteps"]


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


def squared_residuals(params: ParamsLGSSM, trials: Trials, states: Array) -> Array:
    r"""$\|R^{-1/2}(y_t - C x_t - D u_t - d)\|^2$ over the observed entries, `(num_trials, num_timesteps)`."""
    shared_inputs = trials.plan.inputs.ndim == 2
    factored_once = not (trials.may_miss or _varies(params) or is_diagonal(params.emissions.cov))
    whitener = _whitener(params)[0] if factored_once else None

    def one(at: tuple) -> Array:  # trial by trial: no copy of Y
        emissions, states, *own_inputs = at
        inputs = trials.plan.inputs if shared_inputs else own_inputs[0]
        if whitener is None:
            whitened = whiten(params, emissions, inputs, may_miss=trials.may_miss).residuals(states)
        else:
            predicted = states @ values_of(params.emissions.weights).T + emission_offsets(params, inputs)
            whitened = (emissions - predicted) @ whitener.T
        return (whitened**2).sum(axis=-1)

    return lax.map(one, (trials.emissions, states, *(() if shared_inputs else (trials.plan.inputs,))))


def _varies(params: ParamsLGSSM) -> bool:
    """Whether the emission map or its noise varies in time."""
    return any(isinstance(field, TimeVarying) for field in (params.emissions.weights, params.emissions.cov))


def _whitener(params: ParamsLGSSM) -> tuple[Array, Array]:
    r"""$R^{-1/2}$ and $\log |R|$, of a covariance that is the same at all steps."""
    cov = values_of(params.emissions.cov)
    if is_diagonal(params.emissions.cov):
        return jnp.diag(1 / jnp.sqrt(cov)), jnp.log(cov).sum()
    factor = jnp.linalg.cholesky(cov)
    whitener = jax.scipy.linalg.solve_triangular(factor, jnp.eye(cov.shape[0], dtype=cov.dtype), lower=True)
    return whitener, 2 * jnp.log(jnp.diagonal(factor)).sum()


def _offsets(params: ParamsLGSSM, inputs: Array) -> Array:
    """$D u_t + d$, `(num_trials or 1, num_timesteps, emission_dim)`."""
    if inputs.ndim == 2:
        return emission_offsets(params, inputs)[None]
    return jax.vmap(emission_offsets, in_axes=(None, 0))(params, inputs)


def _compress_complete(params: ParamsLGSSM, trials: Trials) -> Compressed:
    """Constant emissions, nothing missing: one QR, one product with Y."""
    weights = values_of(params.emissions.weights)
    emission_dim, state_dim = weights.shape
    whitener, log_det = _whitener(params)
    rows = whitener @ weights
    log_norm = -(emission_dim * jnp.log(2 * jnp.pi).astype(log_det.dtype) + log_det) / 2
    log_norm = jnp.broadcast_to(log_norm, (1, trials.emissions.shape[1]))
    projection = whitener.T
    if emission_dim > state_dim:
        rotation, rows = jnp.linalg.qr(rows)
        projection = projection @ rotation
    # The offsets are subtracted after the product: a centred copy of Y would cost more, and rounding is that of Y itself.
    values = trials.emissions @ projection - _offsets(params, trials.plan.inputs) @ projection
    return Compressed(rows[None, :, :, None], jnp.transpose(values, (1, 2, 0)), log_norm)


def _compress_diagonal(params: ParamsLGSSM, trials: Trials) -> Compressed:
    """Missing entries with diagonal R: the products with C run over all steps of all trials at once."""
    weights, cov = values_of(params.emissions.weights), values_of(params.emissions.cov)
    emission_dim, state_dim = weights.shape
    observed = ~jnp.isnan(trials.emissions)
    scale = 1 / jnp.sqrt(cov)
    weights = weights * scale[:, None]
    whitened = jnp.where(observed, residuals(params, trials) * scale[None, None], 0.0)
    counts = jnp.log(2 * jnp.pi * cov)
    log_norm = -(observed.astype(scale.dtype) @ counts) / 2
    observed_of_patterns = observed[trials.representatives]
    if emission_dim <= state_dim:
        rows = jnp.where(observed_of_patterns[..., None], weights[None, None], 0.0)
        return Compressed(jnp.transpose(rows, (1, 2, 3, 0)), jnp.transpose(whitened, (1, 2, 0)), log_norm)
    squared = (weights[:, :, None] * weights[:, None, :]).reshape(emission_dim, state_dim**2)
    precisions = (observed_of_patterns.astype(scale.dtype) @ squared).reshape(
        *observed_of_patterns.shape[:2], state_dim, state_dim
    )
    return _from_potentials(trials, precisions, whitened @ weights, log_norm)


def _compress_general(params: ParamsLGSSM, trials: Trials) -> Compressed:
    """Anything else: full R with missing entries, or an emission map that varies in time."""
    plan = trials.plan
    one = jax.vmap(lambda y, u: whiten(params, y, u, may_miss=trials.may_miss), in_axes=(0, plan.axes.inputs))
    whitened = one(trials.emissions, plan.inputs)
    weights = values_of(whitened.weights)  # with a time axis: missing entries and varying fields both give one
    weights_of_patterns = weights[trials.representatives]
    if params.emission_dim <= params.state_dim:
        rows, values = jnp.transpose(weights_of_patterns, (1, 2, 3, 0)), jnp.transpose(whitened.values, (1, 2, 0))
        return Compressed(rows, values, whitened.log_norm)
    precisions = jnp.einsum("gtni,gtnj->gtij", weights_of_patterns, weights_of_patterns)
    shifts = jnp.einsum("ktni,ktn->kti", weights, whitened.values)
    return _from_potentials(trials, precisions, shifts, whitened.log_norm)


def _from_potentials(trials: Trials, precisions: Array, shifts: Array, log_norm: Array) -> Compressed:
    r"""Rows from $J = H^\top H$ and $h = H^\top z$; J may be singular."""
    factors = lanes.cholesky(jnp.transpose(precisions, (1, 2, 3, 0)))
    whiteners = trials.spread(lanes.invert_lower(factors), axis=-1)
    values = lanes.matvec(whiteners, jnp.transpose(shifts, (1, 2, 0)))
    return Compressed(lanes.transpose(factors), values, log_norm)
