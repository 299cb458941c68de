r"""The rollout stage: the deterministic path between clamps, $x_t = (1-c_t) \odot (A x_{t-1} + B u_t + b) + c_t \odot v_t$.

Nonlinear dynamics have their map in the place of A and b.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from issm.fitting.free import from_free, keep_frozen, learning_rates, split, to_free
from issm.fitting.stage import AdamState, Data, Loop, ascend, run_stage, start_adam
from issm.models.nonlinear import NonlinearDynamics, follow, no_noise
from issm.models.ssm import SSM, companion
from issm.models.transitions import lgssm_transitions
from issm.models.trials import Plan, Trials


def rollout_states(model: SSM, plan: Plan) -> Float[Array, "num_timesteps state_dim"]:
    """The path of one sequence without noise; clamps hold their values."""
    if isinstance(model.dynamics, NonlinearDynamics):
        none = no_noise(plan.intervention)
        return follow(model.initial.mean, model.dynamics, plan.inputs, plan.intervention, none)
    into = lgssm_transitions(companion(model), plan.inputs, plan.intervention)

    def step(state: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        weights, shift = at
        state = (weights * state[None, :]).sum(axis=-1) + shift
        return state, state

    return lax.scan(step, jnp.zeros_like(into.shift[0]), (into.weights, into.shift))[1]


def rollout_log_probs(model: SSM, trials: Trials) -> Float[Array, " num_trials"]:
    r"""$\sum_t \log p(y_t \mid f(x_t))$ of every trial along its deterministic path."""

    def one(emissions: Array, plan: Plan) -> Array:
        states = rollout_states(model, plan)
        return model.emission.log_prob(emissions, model.emission.predictors(states, plan.inputs)).sum()

    return jax.vmap(one, in_axes=(0, trials.plan.axes))(trials.emissions, trials.plan)


class RolloutStep(eqx.Module):
    """One step of Adam on the log-likelihood of the deterministic path."""

    trials: Trials
    data: Data
    like: SSM
    rest: Any
    masks: Any
    rates: Any
    num_iters: int = eqx.field(static=True)

    def __call__(self, arrays: Any, carry: AdamState, index: Array) -> tuple[Array, Any, AdamState]:
        """Objective of every trial, new parameters, new state."""

        def objective(arrays: Any) -> tuple[Array, Array]:
            per_trial = rollout_log_probs(from_free(eqx.combine(arrays, self.rest), self.like), self.trials)
            return self.data.mean(per_trial), per_trial

        gradient, per_trial = jax.grad(objective, has_aux=True)(arrays)
        how = {"masks": self.masks, "rates": self.rates, "num_iters": self.num_iters}
        return per_trial, *ascend(gradient, carry, arrays, index, **how)


def fit_rollout(
    model: SSM, trials: Trials, data: Data, trainable: Any, *,
    num_iters: int, dynamics_rate: float, emission_rate: float, patience: int | None, bar: bool,
) -> tuple[SSM, Loop]:  # fmt: skip
    """Maximise the likelihood of the deterministic paths; process noise and initial covariance stay as they are."""
    _, _, masks = split(model, trainable)
    arrays, rest = eqx.partition(to_free(model), eqx.is_inexact_array)
    rates = learning_rates(arrays, dynamics_rate, emission_rate)
    step = RolloutStep(trials, data, model, rest, masks, rates, num_iters)
    carry = start_adam(arrays, jax.random.key(0))
    loop = run_stage(
        step, arrays, carry, data, num_iters=num_iters, patience=patience, tol=-1.0, label="rollout", bar=bar
    )
    found = loop.good if patience is None else loop.best
    return keep_frozen(masks, from_free(eqx.combine(found, rest), model), model), loop
