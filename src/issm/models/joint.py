"""Draws from a general state-space model under an intervention, and its log joint density."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from issm._check import as_float_array, check_finite, check_key, check_shape, fail
from issm._types import PRNGKey
from issm.interventions import Intervention
from issm.models.emissions import LOG_TWO_PI
from issm.models.nonlinear import NonlinearDynamics, draw_noise, follow
from issm.models.sampling import num_trials_of, sample_sequence
from issm.models.ssm import SSM, as_model_plan, as_model_trials, check_model, companion, transitions_at
from issm.models.trials import Plan, Trials


def sample(
    key: PRNGKey,
    model: SSM,
    num_timesteps: int,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
) -> tuple[Float[Array, "*trials num_timesteps state_dim"], Float[Array, "*trials num_timesteps emission_dim"]]:
    r"""Draw states and emissions under $do(\cdot)$.

    $$x_t = (1-c_t) \odot (A x_{t-1} + B u_t + b + w_t) + c_t \odot (v_t + \sqrt{s}\,\varepsilon_t), \quad
    y_t \sim p(y \mid f(x_t) + D u_t)$$

    Args:
        key: JAX random key.
        model: The model.
        num_timesteps: Number of steps T, at least 1.
        inputs: Soft inputs $u_t$, `(num_timesteps, input_dim)`, or with a leading trial axis. Needed if the model has inputs.
        interventions: Clamps, `(num_timesteps, state_dim)`, or with a leading trial axis. None: no clamps.

    Returns:
        States `(num_timesteps, state_dim)` and emissions `(num_timesteps, emission_dim)`; with a leading trial axis if the
        inputs or the interventions have one, every trial drawn with noise of its own. Counts are floating-point numbers.

    Raises:
        ValueError: If shapes disagree or `num_timesteps` is below 1.

    References:
        Nejatbakhsh & Wang (2025), sec. 2.

    Examples:
        >>> import jax, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> spikes = issm.PoissonEmission(issm.LinearMap([[1.0], [-1.0]]))
        >>> model = issm.SSM(linear.initial, linear.dynamics, spikes)
        >>> states, counts = issm.sample(jax.random.key(0), model, 20)
        >>> counts.shape, bool((counts == counts.round()).all())
        ((20, 2), True)
    """
    check_key(key)
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, (int, np.integer)) or num_timesteps < 1:
        fail(
            "num_timesteps",
            got=repr(num_timesteps),
            expected="an integer of at least 1",
            remedy="Give the number of steps to draw.",
        )
    check_model(model)
    num_trials = num_trials_of(inputs, interventions)
    plan = as_model_plan(model, inputs, interventions, num_timesteps, num_trials)
    return _sample(key, model, plan, num_trials)


def log_joint(
    model: SSM,
    states: Any,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
) -> Float[Array, "*trials"]:
    r"""Log density of states and emissions together, $\log p(x, y \mid do(\cdot), u)$.

    $$\log p(x_0) + \sum_{t \ge 1} \log p(x_t \mid x_{t-1}) + \sum_t \log p(y_t \mid x_t)$$

    A state without noise on its way into a step (a perfect clamp, or a variance of exactly zero) contributes no density: it
    must have the value that it is sent to, up to rounding, or the result is $-\infty$. The density is one over the other
    states. Where clamps meet correlated noise, the free states keep their own marginal noise.

    Args:
        model: The model.
        states: $x_t$, `(num_timesteps, state_dim)`, or with the leading trial axis of `emissions`.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs, shared or one array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.

    Returns:
        One number in nats for each trial.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, or the emission model gives the data no probability.

    References:
        Särkkä & Svensson (2023), eq. 4.2; Nejatbakhsh & Wang (2025), sec. 2.

    Examples:
        >>> import numpy as np, issm
        >>> model = issm.ssm_from_lgssm(issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5]))
        >>> round(float(issm.log_joint(model, np.zeros((1, 1)), np.zeros((1, 1)))), 4)
        -1.4913
    """
    trials = as_model_trials(model, emissions, inputs, interventions)
    states = as_float_array("states", states, model.initial.mean.dtype)
    wanted = (*trials.emissions.shape[1 if trials.one_sequence else 0 : -1], model.state_dim)
    axes = ("num_timesteps", "state_dim") if trials.one_sequence else ("num_trials", "num_timesteps", "state_dim")
    check_shape("states", states, wanted, axes, "One state for each step of the emissions.")
    check_finite("states", states)
    return _log_joint(model, states, trials)


@eqx.filter_jit
def _sample(key: PRNGKey, model: SSM, plan: Plan, num_trials: int | None) -> tuple[Array, Array]:
    def one(key: PRNGKey, plan: Plan) -> tuple[Array, Array]:
        state_key, emission_key = jax.random.split(key)
        if isinstance(model.dynamics, NonlinearDynamics):
            noise = draw_noise(state_key, model.initial, model.dynamics, plan.intervention)
            states = follow(model.initial.mean, model.dynamics, plan.inputs, plan.intervention, noise)
        else:
            states, _ = sample_sequence(state_key, companion(model), plan.inputs, plan.intervention)
        return states, model.emission.sample(emission_key, model.emission.predictors(states, plan.inputs))

    if num_trials is None:
        return one(key, plan)
    return jax.vmap(one, in_axes=(0, plan.axes))(jax.random.split(key, num_trials), plan)


@eqx.filter_jit
def _log_joint(model: SSM, states: Array, trials: Trials) -> Array:
    def one(states: Array, emissions: Array, plan: Plan) -> Array:
        predictors = model.emission.predictors(states, plan.inputs)
        return state_log_prob(model, states, plan) + model.emission.log_prob(emissions, predictors).sum()

    if trials.one_sequence:
        return one(states, trials.emissions[0], trials.plan)
    return jax.vmap(one, in_axes=(0, 0, trials.plan.axes))(states, trials.emissions, trials.plan)


def state_log_prob(model: SSM, states: Float[Array, "num_timesteps state_dim"], plan: Plan) -> Float[Array, ""]:
    r"""$\log p(x_{0:T-1} \mid do(\cdot), u)$ of one sequence."""
    into = transitions_at(model, states, plan.inputs, plan.intervention)
    previous = jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])
    residuals = states - (into.weights * previous[:, None, :]).sum(axis=-1) - into.shift
    known = jnp.diagonal(into.cov, axis1=1, axis2=2) == 0
    eye = jnp.eye(states.shape[-1], dtype=states.dtype)
    factors = jnp.linalg.cholesky(jnp.where(known[:, :, None], eye[None], into.cov))
    free = jnp.where(known, 0.0, residuals)
    white = jax.scipy.linalg.solve_triangular(factors, free[..., None], lower=True)[..., 0]
    log_det = 2 * jnp.log(jnp.diagonal(factors, axis1=1, axis2=2)).sum(axis=-1)
    count = (~known).sum(axis=-1).astype(states.dtype)
    densities = -((white**2).sum(axis=-1) + log_det + count * LOG_TWO_PI) / 2
    tolerance = jnp.sqrt(jnp.finfo(states.dtype).eps) * jnp.maximum(1.0, jnp.abs(states))
    elsewhere = (known & (jnp.abs(residuals) > tolerance)).any()
    return jnp.where(elsewhere, -jnp.inf, densities.sum())
