r"""What would have been on the very trials that were seen, for models without closed forms: by draws."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from issm._check import check_key
from issm._types import PRNGKey
from issm.causal.counterfactual import as_twin_scenario
from issm.causal.curved import draw_curved_twins
from issm.causal.draws import (
    GAUSS_NEWTON_STEPS,
    SampledPrediction,
    check_num_draws,
    draw_deviations,
    pool_draws,
    predictors_of,
)
from issm.causal.history import Scenario
from issm.causal.model_draws import as_model_draws, over_models
from issm.causal.twin import twin_transitions
from issm.inference.laplace import expand, make_problem, toward_mean
from issm.interventions import Intervention
from issm.models.couplings import couple
from issm.models.nonlinear import NonlinearDynamics
from issm.models.ssm import SSM, as_model_trials, companion
from issm.models.transitions import Transitions
from issm.models.trials import Plan, Trials


def sample_counterfactual(
    key: PRNGKey,
    model: SSM,
    emissions: Any,
    plan: Intervention,
    *,
    interventions: Intervention | None = None,
    inputs: Any = None,
    parameters: Any = None,
    num_draws: int = 1000,
) -> SampledPrediction:
    r"""What these trials would have been under another plan, $p(x', y' \mid y, do(\pi), \pi')$, for any emission model.

    Abduction, action, prediction, as in `counterfactual`: initial state, process noise and the noise of clamps are drawn given the
    data, by Laplace's approximation, and shared by both worlds. So is the noise of the emissions: Gaussian residuals are the
    same; of counts, events are kept with probability $\mu' / \mu$ or added at the rate $\mu' - \mu$ (thinning of one Poisson
    process, given its gamma factor for the negative binomial); a Bernoulli compares one uniform number with both probabilities.
    Under equal plans the answer is the trial itself. Data do not decide how discrete noise is shared; this is the coupling
    that changes as few events as possible.

    Args:
        key: JAX random key.
        model: The model.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or with a leading trial axis; NaN is missing.
        plan: $\pi'$, the clamps that might have been, `(num_timesteps, state_dim)` or with a leading trial axis.
        interventions: $\pi$, the clamps that were in force. None: no clamps.
        inputs: Soft inputs, the same in both worlds. Needed if the model has inputs.
        parameters: What is known of the parameters: an `SSM` of draws, every array with one leading axis, all equally probable
            (bootstrap refits, posterior draws, seeds); each infers the noise of the trials anew. None: those of `model`.
        num_draws: Number of draws under each of the parameters, at least 2.

    Returns:
        Draws of the counterfactual states and emissions, with the leading axes of `emissions` before the draws. Averages over
        steps and trials, and their difference to what was, are in `sample_counterfactual_effect`.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, or the emission model is one of the user's own, for which
            no coupling is known, or draws are not those of a model like `model`; the message names it.

    References:
        Pearl (2009), *Causality*, theorem 7.1.7; Lewis & Shedler (1979), *Naval Research Logistics* 26 (thinning).

    Examples:
        >>> import jax, numpy as np, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[1.0]], [0.5])
        >>> model = issm.SSM(linear.initial, linear.dynamics, issm.PoissonEmission(issm.LinearMap([[1.0]])))
        >>> counts = np.array([[1.0], [4.0], [2.0]])
        >>> plan = issm.do({0: 3.0}, num_timesteps=3, state_dim=1, start=1)
        >>> same = issm.sample_counterfactual(jax.random.key(0), model, counts, plan, interventions=plan, num_draws=20)
        >>> same.emissions.mean.tolist() == counts.tolist()
        True
    """
    trials, scenario = check_question(key, model, emissions, plan, interventions, inputs, num_draws)
    return _counterfactual(key, model, as_model_draws(model, parameters), trials, scenario, num_draws)


def check_question(
    key: Any, model: SSM, emissions: Any, plan: Any, interventions: Intervention | None, inputs: Any, num_draws: Any
) -> tuple[Trials, Scenario]:
    """Check what is asked, and give it the form of `counterfactual_effect`."""
    check_key(key)
    check_num_draws(num_draws)
    trials = as_model_trials(model, emissions, inputs, interventions)
    return trials, as_twin_scenario(companion(model), trials, plan)


@eqx.filter_jit
def _counterfactual(
    key: PRNGKey, model: SSM, draws: SSM | None, trials: Trials, scenario: Scenario, num_draws: int
) -> SampledPrediction:
    def of_model(key: PRNGKey, model: SSM) -> tuple[Array, Array]:
        _, others, _, counterfactual = draw_both_worlds(key, model, trials, scenario, num_draws)
        return others, counterfactual

    states, emissions = over_models(key, model, draws, of_model)
    return SampledPrediction(pool_draws(states), pool_draws(emissions))


def draw_both_worlds(
    key: PRNGKey, model: SSM, trials: Trials, scenario: Scenario, num_draws: int
) -> tuple[Array, Array, Array, Array]:
    """States of every trial as it was and as it would have been, and its emissions likewise; `(*trials, num_draws, ...)`.

    What was missing of the emissions is drawn given the states and the rest of its step.
    """

    def one(key: PRNGKey, scenario: Scenario, emissions: Array) -> tuple[Array, Array, Array, Array]:
        path_key, noise_key = jax.random.split(key)
        plan = Plan(scenario.plan.inputs, scenario.reference)
        twins = draw_curved_twins if isinstance(model.dynamics, NonlinearDynamics) else _draw_twins
        states, others = twins(path_key, model, emissions, plan, scenario.plan.intervention, num_draws)

        def share(key: PRNGKey, eta: Array, other_eta: Array) -> tuple[Array, Array]:
            fill_key, key = jax.random.split(key)
            own = couple(model.emission, fill_key, emissions, eta, eta) if trials.may_miss else emissions
            return own, couple(model.emission, key, own, eta, other_eta)

        predictors = (predictors_of(model, each, plan.inputs) for each in (states, others))
        own, counterfactual = jax.vmap(share)(jax.random.split(noise_key, num_draws), *predictors)
        return states, others, own, counterfactual

    if trials.one_sequence:
        return one(key, scenario, trials.emissions[0])
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim == 3 else None, scenario)
    keys = jax.random.split(key, trials.num_trials)
    return jax.vmap(one, in_axes=(0, axes, 0))(keys, scenario, trials.emissions)


def _draw_twins(
    key: PRNGKey, model: SSM, emissions: Array, plan: Plan, other: Intervention, num_draws: int
) -> tuple[Array, Array]:
    r"""Paths of both worlds given the data: the twin network smoothed through the potentials of Laplace's approximation.

    They are drawn as $[x - \hat x; \delta]$ around the most probable path $\hat x$, with the mean of the posterior.
    """
    params = companion(model)
    problem = make_problem(model, emissions, plan.inputs, plan.intervention)
    problem, _, path, potential = expand(problem, GAUSS_NEWTON_STEPS)
    pull, precision = toward_mean(problem, path, potential)
    state_dim = path.shape[-1]
    twins = twin_transitions(params, plan.inputs, plan.intervention, other)
    around = jnp.concatenate([path, jnp.zeros_like(path)], axis=1)
    before = jnp.concatenate([jnp.zeros_like(around[:1]), around[:-1]])
    shift = jnp.einsum("tij,tj->ti", twins.weights, before) + twins.shift - around
    seen = lambda leaf: jnp.pad(leaf, ((0, 0), *((0, state_dim),) * (leaf.ndim - 1)))  # noqa: E731
    drawn = draw_deviations(key, Transitions(twins.weights, shift, twins.cov), seen(precision), seen(pull), num_draws)
    states = path[None] + drawn[..., :state_dim]
    return states, states + drawn[..., state_dim:]
