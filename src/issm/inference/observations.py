r"""What the emissions of one sequence say about its states, in as few numbers as possible.

Emissions are whitened and their missing entries become zero rows, so that $y_t \mid x_t$ is $z_t = U_t x_t + N(0, I)$.
With fewer emissions than states the filter works on these rows; with more, on the potential
$\exp(-\tfrac12 x^\top J_t x + h_t^\top x)$ with $J_t = U_t^\top U_t,\ h_t = U_t^\top z_t$, which has the size of the state.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from issm.models.fields import TimeVarying, apply_weights, is_diagonal, over_time, values_of
from issm.models.lgssm import ParamsLGSSM, ParamsLGSSMEmissions
from issm.models.transitions import emission_offsets


class Rows(eqx.Module):
    r"""$z_t = U_t x_t + N(0, I)$: `weights` U `(num_timesteps, rows, state_dim)`, `values` z `(num_timesteps, rows)`."""

    weights: Float[Array, "num_timesteps rows state_dim"]
    values: Float[Array, "num_timesteps rows"]


class Potential(eqx.Module):
    r"""$\exp(-\tfrac12 x^\top J_t x + h_t^\top x)$: `precision` J `(num_timesteps, state_dim, state_dim)`, `shift` h."""

    precision: Float[Array, "num_timesteps state_dim state_dim"]
    shift: Float[Array, "num_timesteps state_dim"]


class WhitenedEmissions(eqx.Module):
    r"""Emissions of one sequence in units of their noise.

    Attributes:
        weights: $U = R^{-1/2} C$ with zero rows where an entry is missing, `(emission_dim, state_dim)`, with a leading time
            axis inside `TimeVarying` if it varies.
        values: $z_t = R^{-1/2}(y_t - D u_t - d)$, zero where missing, `(num_timesteps, emission_dim)`.
        log_norm: $-\tfrac12 (N_{obs} \log 2\pi + \log |R_{obs}|)$, `(num_timesteps,)`.
    """

    weights: Float[Array, "emission_dim state_dim"] | TimeVarying
    values: Float[Array, "num_timesteps emission_dim"]
    log_norm: Float[Array, " num_timesteps"]

    def reduce(self) -> Rows | Potential:
        """The form with fewer numbers."""
        num_timesteps, emission_dim = self.values.shape
        if emission_dim <= values_of(self.weights).shape[-1]:
            return Rows(over_time(self.weights, num_timesteps), self.values)
        if isinstance(self.weights, TimeVarying):
            rows = self.weights.values
            return Potential(jnp.einsum("tni,tnj->tij", rows, rows), jnp.einsum("tni,tn->ti", rows, self.values))
        return Potential(over_time(self.weights.T @ self.weights, num_timesteps), self.values @ self.weights)

    def residuals(self, states: Float[Array, "num_timesteps state_dim"]) -> Float[Array, "num_timesteps emission_dim"]:
        """$z_t - U_t x_t$, zero where missing."""
        return self.values - apply_weights(self.weights, states)


def whiten(
    params: ParamsLGSSM,
    emissions: Float[Array, "num_timesteps emission_dim"],
    inputs: Float[Array, "num_timesteps input_dim"],
    *,
    may_miss: bool,
) -> WhitenedEmissions:
    """Whiten the emissions of one sequence; `may_miss` is false when no entry can be NaN."""
    num_timesteps = emissions.shape[0]
    observed = ~jnp.isnan(emissions) if may_miss else None
    residuals = emissions - emission_offsets(params, inputs)
    if observed is not None:
        residuals = jnp.where(observed, residuals, 0.0)
    if is_diagonal(params.emissions.cov):
        weights, values, log_det = _whiten_diagonal(params.emissions, residuals, observed)
    else:
        weights, values, log_det = _whiten_full(params.emissions, residuals, observed)
    count = jnp.full(num_timesteps, emissions.shape[1]) if observed is None else observed.sum(axis=1)
    log_norm = -(count.astype(emissions.dtype) * jnp.log(2 * jnp.pi).astype(emissions.dtype) + log_det) / 2
    return WhitenedEmissions(weights, values, log_norm)


def _whiten_diagonal(
    emissions: ParamsLGSSMEmissions, residuals: Array, observed: Bool[Array, "..."] | None
) -> tuple[Array | TimeVarying, Array, Array]:
    num_timesteps = residuals.shape[0]
    variances = over_time(emissions.cov, num_timesteps)
    values = residuals / jnp.sqrt(variances)
    if (
        observed is None
        and not isinstance(emissions.cov, TimeVarying)
        and not isinstance(emissions.weights, TimeVarying)
    ):
        log_det = jnp.broadcast_to(jnp.log(emissions.cov).sum(), (num_timesteps,))
        return emissions.weights / jnp.sqrt(emissions.cov)[:, None], values, log_det
    weights = over_time(emissions.weights, num_timesteps) / jnp.sqrt(variances)[:, :, None]
    log_variances = jnp.log(variances)
    if observed is not None:
        weights = jnp.where(observed[:, :, None], weights, 0.0)
        log_variances = jnp.where(observed, log_variances, 0.0)
    return TimeVarying(weights), values, log_variances.sum(axis=1)


def _whiten_full(
    emissions: ParamsLGSSMEmissions, residuals: Array, observed: Bool[Array, "..."] | None
) -> tuple[Array | TimeVarying, Array, Array]:
    num_timesteps, emission_dim = residuals.shape
    if observed is None and not isinstance(emissions.cov, TimeVarying):
        factor = jnp.linalg.cholesky(values_of(emissions.cov))
        values = jax.scipy.linalg.solve_triangular(factor, residuals.T, lower=True).T
        log_det = jnp.broadcast_to(_log_det(factor), (num_timesteps,))
        if isinstance(emissions.weights, TimeVarying):
            solve = jax.vmap(lambda rows: jax.scipy.linalg.solve_triangular(factor, rows, lower=True))
            return TimeVarying(solve(emissions.weights.values)), values, log_det
        return jax.scipy.linalg.solve_triangular(factor, emissions.weights, lower=True), values, log_det
    cov, rows = over_time(emissions.cov, num_timesteps), over_time(emissions.weights, num_timesteps)
    if observed is not None:  # a missing entry becomes an independent one of unit variance that depends on no state
        eye = jnp.eye(emission_dim, dtype=cov.dtype)
        cov = jnp.where(observed[:, :, None] & observed[:, None, :], cov, eye[None])
        rows = jnp.where(observed[:, :, None], rows, 0.0)
    factors = jnp.linalg.cholesky(cov)
    solved = jax.scipy.linalg.solve_triangular(
        factors, jnp.concatenate([rows, residuals[:, :, None]], axis=2), lower=True
    )
    return TimeVarying(solved[:, :, :-1]), solved[:, :, -1], jax.vmap(_log_det)(factors)


def _log_det(factor: Array) -> Array:
    return 2 * jnp.log(jnp.diagonal(factor)).sum()
