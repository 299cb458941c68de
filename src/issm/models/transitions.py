r"""The transition into every step of one sequence, before and after the clamps of an intervention.

The first step is a transition like the others: $x_0 = 0 \cdot x_{-1} + m + w_0$ with $w_0 \sim N(0, S)$.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from issm.interventions import Intervention
from issm.models.fields import apply_weights, as_matrix, over_time, values_of
from issm.models.lgssm import ParamsLGSSM


class Transitions(eqx.Module):
    r"""$x_t = A_t x_{t-1} + a_t + w_t,\ w_t \sim N(0, Q_t)$ for t = 0 ... T-1, where $A_0 = 0$.

    Attributes:
        weights: $A_t$, `(num_timesteps, state_dim, state_dim)`.
        shift: $a_t$, `(num_timesteps, state_dim)`.
        cov: $Q_t$, `(num_timesteps, state_dim, state_dim)`; may be singular.
    """

    weights: Float[Array, "num_timesteps state_dim state_dim"]
    shift: Float[Array, "num_timesteps state_dim"]
    cov: Float[Array, "num_timesteps state_dim state_dim"]


def free_transitions(params: ParamsLGSSM, inputs: Float[Array, "num_timesteps input_dim"]) -> Transitions:
    """The transitions while nothing is clamped (model.md, section 1); soft inputs act on the arrival."""
    num_timesteps = inputs.shape[0]
    weights = over_time(params.dynamics.weights, num_timesteps)
    bias = over_time(params.dynamics.bias, num_timesteps)
    drive = apply_weights(params.dynamics.input_weights, inputs)
    cov = over_time(as_matrix(params.dynamics.cov), num_timesteps)
    return Transitions(
        weights=weights.at[0].set(0.0),
        shift=(drive + bias).at[0].set(params.initial.mean),
        cov=cov.at[0].set(values_of(as_matrix(params.initial.cov))),
    )


def clamped_transitions(free: Transitions, intervention: Intervention) -> Transitions:
    r"""Cut what drives the clamped states: $M A$, $M a + c \odot v$, $M Q M + s\,\mathrm{diag}(c)$ with $M = \mathrm{diag}(1 - c)$."""
    clamped = intervention.mask
    kept = ~clamped[:, :, None] & ~clamped[:, None, :]
    eye = jnp.eye(clamped.shape[-1], dtype=bool)
    return Transitions(
        weights=jnp.where(clamped[:, :, None], 0.0, free.weights),
        shift=jnp.where(clamped, intervention.value, free.shift),
        cov=jnp.where(kept, free.cov, jnp.where(eye[None], intervention.variance[:, :, None], 0.0)),
    )


def lgssm_transitions(
    params: ParamsLGSSM, inputs: Float[Array, "num_timesteps input_dim"], intervention: Intervention
) -> Transitions:
    """The transitions of one sequence under its inputs and clamps."""
    return clamped_transitions(free_transitions(params, inputs), intervention)


def emission_offsets(
    params: ParamsLGSSM, inputs: Float[Array, "num_timesteps input_dim"]
) -> Float[Array, "num_timesteps emission_dim"]:
    r"""$D u_t + d$ at every step."""
    return apply_weights(params.emissions.input_weights, inputs) + over_time(params.emissions.bias, inputs.shape[0])
