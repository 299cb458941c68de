"""Paths of nonlinear dynamics under plans: worlds that share the initial state and all noise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from issm._linalg import psd_cholesky, safe_sqrt
from issm._types import PRNGKey
from issm.causal.draws import GAUSS_NEWTON_STEPS, draw_deviations
from issm.causal.history import Scenario
from issm.inference.laplace import approximation, expand, make_problem, toward_mean
from issm.interventions import Intervention
from issm.models.fields import as_matrix, values_of
from issm.models.nonlinear import Noise, NonlinearDynamics, draw_noise, follow
from issm.models.ssm import SSM
from issm.models.transitions import Transitions
from issm.models.trials import Plan

Paths = Float[Array, "num_draws num_timesteps state_dim"]


def draw_worlds(
    key: PRNGKey, model: SSM, scenario: Scenario, plans: tuple[Intervention, ...], num_draws: int
) -> tuple[Paths, ...]:
    """Paths under every plan; draw by draw they share the state at the end of the past, and all noise."""
    dynamics, inputs = model.dynamics, scenario.plan.inputs
    assert isinstance(dynamics, NonlinearDynamics)
    past = _end_of_past(model, scenario)

    def one(key: PRNGKey) -> tuple[Array, ...]:
        past_key, noise_key = jax.random.split(key)
        start, initial = model.initial.mean, model.initial
        if past is not None:
            last = past[0] + past[1] @ jax.random.normal(past_key, start.shape, start.dtype)
            start, initial = dynamics.map(last) + dynamics.input_weights @ inputs[0], None
        return tuple(
            follow(start, dynamics, inputs, plan, draw_noise(noise_key, initial, dynamics, plan)) for plan in plans
        )

    return jax.vmap(one)(jax.random.split(key, num_draws))


def _end_of_past(model: SSM, scenario: Scenario) -> tuple[Array, Array] | None:
    """Mean and factor of the last state of the past, by Laplace's approximation."""
    if scenario.past is None or scenario.past_plan is None:
        return None
    before = scenario.past_plan
    problem = make_problem(model, scenario.past, before.inputs, before.intervention)
    found = approximation(*expand(problem, GAUSS_NEWTON_STEPS))
    return found.smoothed_means[-1], psd_cholesky(found.smoothed_covariances[-1])


def draw_curved_twins(
    key: PRNGKey, model: SSM, emissions: Array, plan: Plan, other: Intervention, num_draws: int
) -> tuple[Paths, Paths]:
    """Paths given the data, by Laplace's approximation, and what the same noise makes of them under other clamps.

    Noise that clamps have kept from acting is drawn: the data say nothing of it.
    """
    path_key, fresh_key = jax.random.split(key)
    states = _draw_states(path_key, model, emissions, plan, num_draws)

    def twin(key: PRNGKey, states: Array) -> Array:
        assert isinstance(model.dynamics, NonlinearDynamics)
        noise = _noise_of(key, states, model, plan, other)
        return follow(model.initial.mean, model.dynamics, plan.inputs, other, noise)

    return states, jax.vmap(twin)(jax.random.split(fresh_key, num_draws), states)


def _draw_states(key: PRNGKey, model: SSM, emissions: Array, plan: Plan, num_draws: int) -> Paths:
    """Draws from Laplace's approximation."""
    problem = make_problem(model, emissions, plan.inputs, plan.intervention)
    problem, _, path, potential = expand(problem, GAUSS_NEWTON_STEPS)
    pull, precision = toward_mean(problem, path, potential)
    into = problem.into
    before = jnp.concatenate([jnp.zeros_like(path[:1]), path[:-1]])
    shift = jnp.einsum("tij,tj->ti", into.weights, before) + into.shift - path
    return path[None] + draw_deviations(key, Transitions(into.weights, shift, into.cov), precision, pull, num_draws)


def _noise_of(key: PRNGKey, states: Array, model: SSM, plan: Plan, other: Intervention) -> Noise:
    """The noise that made a path under `plan`, and fresh noise where clamps hid it; for clamps in the units of `other`."""
    dynamics, factual = model.dynamics, plan.intervention
    assert isinstance(dynamics, NonlinearDynamics)
    expected = jax.vmap(dynamics.map)(states[:-1]) + plan.inputs[1:] @ dynamics.input_weights.T
    acted = states - jnp.concatenate([model.initial.mean[None], expected])
    fresh = draw_noise(key, model.initial, dynamics, other)
    hidden = factual.mask
    process = jnp.where(hidden, fresh.process, acted)
    process = process.at[0].set(_given(values_of(as_matrix(model.initial.cov)), ~hidden[0], acted[0], fresh.process[0]))
    spread, sd = safe_sqrt(factual.variance), safe_sqrt(other.variance)
    seen = hidden & (spread > 0)
    kept = sd * (states - factual.value) / jnp.where(seen, spread, 1.0)
    return Noise(process, jnp.where(seen, kept, fresh.clamps))


def _given(cov: Array, known: Array, values: Array, draw: Array) -> Array:
    """A draw from N(0, cov) turned into one given some of its entries."""
    both = known[:, None] & known[None, :]
    eye = jnp.eye(len(cov), dtype=cov.dtype)
    without_noise = jnp.diag(jnp.where(jnp.diagonal(cov) > 0, 0.0, 1.0))
    missing = jnp.where(known, values - draw, 0.0)
    gain = cov @ jnp.linalg.solve(jnp.where(both, cov + without_noise, eye), missing)
    return jnp.where(known, values, draw + gain)
