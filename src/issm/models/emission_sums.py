r"""Sums over the data alone, made once for all iterations of a fit.

With $\sum y y^\top$ at hand an iteration reads the data for the few directions of the states only. What is learned from them is then a
difference of sums, which loses digits where a state explains nearly all of an emission: who uses them asks `keeps_digits` first.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from issm.models.fields import TimeVarying, is_diagonal
from issm.models.lgssm import ParamsLGSSM

SMALLEST_SHARE = {"float64": 1e-6, "float32": 1e-2}
"""Share of a sum of squares that a difference may leave and still be trusted, to about ten and five digits."""


class EmissionSums(eqx.Module):
    r"""Sums over all trials and steps, with $v_t = [u_t; 1]$.

    Attributes:
        second: $\sum y y^\top$, or its diagonal where R is diagonal.
        cross: $\sum y v^\top$.
        gram: $\sum v v^\top$.
    """

    second: Float[Array, "emission_dim *columns"]
    cross: Float[Array, "emission_dim known"]
    gram: Float[Array, "known known"]

    def less_offsets(self, params: ParamsLGSSM) -> Float[Array, "emission_dim *columns"]:
        """`second` of $y_t - D u_t - d$."""
        block = params.emissions
        offsets = jnp.concatenate([block.input_weights, block.bias[:, None]], axis=1)  # type: ignore[list-item]
        return self.less(offsets, self.cross, self.cross - offsets @ self.gram)

    def less(self, coefficients: Array, cross: Array, cross_after: Array) -> Float[Array, "emission_dim *columns"]:
        r"""`second` of the residuals $e = y - Θ z$, from $\sum y z^\top$ and $\sum e z^\top$."""
        if self.second.ndim == 1:
            return self.second - (coefficients * (cross + cross_after)).sum(axis=1)
        change = coefficients @ cross.T
        return self.second - (change + change.T + cross_after @ coefficients.T + coefficients @ cross_after.T) / 2


def sum_emissions(params: ParamsLGSSM, emissions: Array, inputs: Array) -> EmissionSums | None:
    """The sums, or None where they would not help: an emission map or noise that varies in time."""
    if any(isinstance(field, TimeVarying) for field in vars(params.emissions).values()):
        return None
    num_trials, num_timesteps, _ = emissions.shape
    known = jnp.concatenate([inputs, jnp.ones((*inputs.shape[:-1], 1), inputs.dtype)], axis=-1)
    known = jnp.broadcast_to(known, (num_trials, num_timesteps, known.shape[-1]))
    rows = jnp.swapaxes(known, 1, 2)  # few rows by many columns: the quicker way round
    cross, gram = (rows @ emissions).sum(axis=0).T, (rows @ known).sum(axis=0)
    if is_diagonal(params.emissions.cov):
        return EmissionSums((emissions**2).sum(axis=(0, 1)), cross, gram)
    flat = emissions.reshape(num_trials * num_timesteps, -1)
    return EmissionSums(flat.T @ flat, cross, gram)


def keeps_digits(difference: Array, total: Array) -> Bool[Array, ""]:
    """Whether every difference is a large enough share of the sum of squares that it was taken from."""
    return (difference > SMALLEST_SHARE[difference.dtype.name] * total).all()
