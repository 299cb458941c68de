"""Draws of states and emissions from the linear Gaussian model under an intervention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from issm._check import as_array, check_key, fail
from issm._linalg import noise_factor, safe_sqrt
from issm._types import PRNGKey
from issm.interventions import Intervention
from issm.models.fields import TimeVarying, apply_weights, is_diagonal, values_of
from issm.models.lgssm import ParamsLGSSM, check_params
from issm.models.transitions import emission_offsets, free_transitions
from issm.models.trials import Plan, as_plan


def lgssm_sample(
    key: PRNGKey,
    params: ParamsLGSSM,
    num_timesteps: int,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
) -> tuple[Float[Array, "*trials num_timesteps state_dim"], Float[Array, "*trials num_timesteps emission_dim"]]:
    r"""Draw states and emissions under $do(\cdot)$.

    $$x_t = (1-c_t) \odot (A x_{t-1} + B u_t + b + w_t) + c_t \odot (v_t + \sqrt{s}\,\varepsilon_t), \quad
    y_t = C x_t + D u_t + d + r_t$$

    Args:
        key: JAX random key.
        params: Model parameters.
        num_timesteps: Number of steps T, at least 1.
        inputs: Soft inputs $u_t$, `(num_timesteps, input_dim)`, or with a leading trial axis. Needed if the model has inputs.
        interventions: Clamps, `(num_timesteps, state_dim)`, or with a leading trial axis. None: no clamps.

    Returns:
        States `(num_timesteps, state_dim)` and emissions `(num_timesteps, emission_dim)`; with a leading trial axis if the
        inputs or the interventions have one, every trial drawn with noise of its own.

    Raises:
        ValueError: If shapes disagree or `num_timesteps` is below 1.

    References:
        Nejatbakhsh & Wang (2025), sec. 2; `docs/concepts.md`, "The model".

    Examples:
        >>> import jax, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> plan = issm.do({0: 2.0}, num_timesteps=20, state_dim=1, start=5, stop=10)
        >>> states, emissions = issm.lgssm_sample(jax.random.key(0), params, 20, interventions=plan)
        >>> states[5:10, 0].tolist()
        [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    check_key(key)
    check_params(params)
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, (int, np.integer)) or num_timesteps < 1:
        fail(
            "num_timesteps",
            got=repr(num_timesteps),
            expected="an integer of at least 1",
            remedy="Give the number of steps to draw.",
        )
    num_trials = num_trials_of(inputs, interventions)
    plan = as_plan(params, inputs, interventions, num_timesteps=num_timesteps, num_trials=num_trials)
    return _sample(key, params, plan, num_trials)


@jax.jit(static_argnames="num_trials")
def _sample(key: PRNGKey, params: ParamsLGSSM, plan: Plan, num_trials: int | None) -> tuple[Array, Array]:
    if num_trials is None:
        return sample_sequence(key, params, plan.inputs, plan.intervention)
    axes = plan.axes
    draw = jax.vmap(sample_sequence, in_axes=(0, None, axes.inputs, axes.intervention))
    return draw(jax.random.split(key, num_trials), params, plan.inputs, plan.intervention)


def sample_sequence(
    key: PRNGKey, params: ParamsLGSSM, inputs: Float[Array, "num_timesteps input_dim"], intervention: Intervention
) -> tuple[Float[Array, "num_timesteps state_dim"], Float[Array, "num_timesteps emission_dim"]]:
    """Draw one sequence (model.md, section 1)."""
    num_timesteps, state_dim = intervention.mask.shape
    dtype = params.initial.mean.dtype
    process_key, clamp_key, emission_key = jax.random.split(key, 3)
    free = free_transitions(params, inputs)
    noise = process_noise(params, jax.random.normal(process_key, (num_timesteps, state_dim), dtype))
    clamp_noise = safe_sqrt(intervention.variance) * jax.random.normal(clamp_key, (num_timesteps, state_dim), dtype)

    def step(state: Array, at: tuple) -> tuple[Array, Array]:
        weights, drive, clamped, clamp_value = at
        state = jnp.where(clamped, clamp_value, weights @ state + drive)
        return state, state

    steps = (free.weights, free.shift + noise, intervention.mask, intervention.value + clamp_noise)
    _, states = lax.scan(step, jnp.zeros(state_dim, dtype), steps)
    white = jax.random.normal(emission_key, (num_timesteps, params.emission_dim), dtype)
    emissions = emission_means(params, states, inputs) + _apply_factor(params.emissions.cov, white)
    return states, emissions


def process_noise(
    params: ParamsLGSSM, white: Float[Array, "num_timesteps state_dim"]
) -> Float[Array, "num_timesteps state_dim"]:
    """Colour white noise with S at the first step and with Q at all others."""
    first = noise_factor(params.initial.cov, diagonal=is_diagonal(params.initial.cov)) @ white[0]
    return _apply_factor(params.dynamics.cov, white).at[0].set(first)


def emission_means(
    params: ParamsLGSSM,
    states: Float[Array, "num_timesteps state_dim"],
    inputs: Float[Array, "num_timesteps input_dim"],
) -> Float[Array, "num_timesteps emission_dim"]:
    r"""$C x_t + D u_t + d$ at every step."""
    return apply_weights(params.emissions.weights, states) + emission_offsets(params, inputs)


def _apply_factor(cov: Array | TimeVarying, white: Array) -> Array:
    factor = noise_factor(values_of(cov), diagonal=is_diagonal(cov))
    return apply_weights(TimeVarying(factor) if isinstance(cov, TimeVarying) else factor, white)


def num_trials_of(inputs: Any, interventions: Any) -> int | None:
    """The length of the trial axis that inputs or interventions have; None without one."""
    for given in (
        None if inputs is None else as_array("inputs", inputs).shape,
        getattr(getattr(interventions, "mask", None), "shape", None),
    ):
        if given is not None and len(given) == 3:
            return given[0]
    return None
