r"""What a plan changes: $E[y_t \mid do(\pi_1), h] - E[y_t \mid do(\pi_0), h]$, with its uncertainty."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from issm._compile import jit_quickly
from issm._host import to_device
from issm._linalg import symmetrize
from issm.causal.estimates import EffectEstimate
from issm.causal.history import History, Scenario, as_scenario, check_average, plan_params
from issm.causal.predict import quantile_of_level
from issm.causal.propagate import Normal, Summaries, effects_of, over_trials
from issm.causal.readout import Readout, as_readout, as_window
from issm.causal.twin import twin_transitions
from issm.causal.uncertainty import Directions, as_uncertain_parameters
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM


def causal_effect(
    params: ParamsLGSSM,
    plan: Intervention,
    *,
    reference: Intervention | None = None,
    history: History | None = None,
    inputs: Any = None,
    of: str | Readout = "emissions",
    parameters: Any = None,
    window: Any = None,
    level: Any = 0.95,
    average_trials: bool = False,
) -> EffectEstimate:
    r"""Effect of one plan against another, $\tau_t = E[y_t \mid do(\pi_1), h] - E[y_t \mid do(\pi_0), h]$.

    Mean and trial noise are closed form: the difference $\delta_t = x_t^{(1)} - x_t^{(0)}$ between two worlds that share the
    initial state (or the state at the end of the history), w and r is linear Gaussian, $\tau_t = C E[\delta_t]$ and its
    variance over trials is $C\, Var[\delta_t]\, C^\top$. The emission noise cancels. Two *different* trials, one under each
    plan, differ by more than that: by the sum of both predictions' variances (`interventional_prediction`).

    Args:
        params: Model parameters.
        plan: $\pi_1$, clamps over the horizon, `(num_timesteps, state_dim)` or with a leading trial axis.
        reference: $\pi_0$, the plan it is compared with. None: no clamps.
        history: The past of the trials; None: both plans start from the initial distribution.
        inputs: Soft inputs over the horizon, the same under both plans. Needed if the model has inputs.
        of: "emissions", "states", or a `Readout` of either.
        parameters: What is known of the parameters. Draws: a `ParamsLGSSM` with one leading axis, all equally probable; the mean
            is then the mean over the draws. A covariance `(num_parameters, num_parameters)` in the order of
            `jax.flatten_util.ravel_pytree(params)`: propagated to first order (delta method). None: known exactly.
        window: Steps that `cumulative`, `average` and `relative` run over: "on" (the plans differ in a clamp), "off" (they do
            not), "after" (the last such step), `(start, stop)`, or a Boolean array `(num_timesteps,)`. None: all.
        level: Level of the intervals, above 0 and below 1.
        average_trials: Whether to average the effect over the trials. The noise of different trials is independent, the
            uncertainty of the parameters is common to all.

    Returns:
        The effect per step, cumulative, average and relative, each with trial noise and parameter uncertainty apart and
        together.

    Raises:
        ValueError: If shapes, lengths or numbers of trials disagree, draws are not those of a model like `params`, or a window
            is empty; the message names the argument.

    References:
        Pearl (2009), *Causality*, sec. 3.2.1 and 7.1 (shared noise: one unit in two worlds); Brodersen et al. (2015), sec. 2.3.

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[1.0]], [0.5])
        >>> plan = issm.do({0: 4.0}, num_timesteps=4, state_dim=1, stop=2)
        >>> effect = issm.causal_effect(params, plan, window="after")
        >>> effect.mean[:, 0].tolist(), effect.average.mean.tolist()
        ([4.0, 4.0, 2.0, 1.0], [1.5])
    """
    scenario = as_scenario(params, plan, reference=reference, history=history, inputs=inputs)
    readout = as_readout(params, of)
    steps = as_window(scenario, window)
    uncertain = as_uncertain_parameters(params, parameters)
    check_average(
        average_trials,
        any(leaf.ndim == 3 for leaf in jax.tree.leaves(scenario)),
        "a plan, reference, history or inputs with a trial axis",
    )
    dtype = params.initial.mean.dtype
    z = quantile_of_level(level, dtype)
    return _causal_effect(params, scenario, readout, steps, uncertain, z, to_device(level, dtype), bool(average_trials))


@partial(jit_quickly, static_argnames="average_trials")
def _causal_effect(
    params: ParamsLGSSM,
    scenario: Scenario,
    readout: Readout,
    window: Bool[Array, "*trials num_timesteps 1"],
    uncertain: ParamsLGSSM | Directions | None,
    z: Float[Array, ""],
    level: Float[Array, ""],
    average_trials: bool,
) -> EffectEstimate:
    def summaries(params: ParamsLGSSM) -> Summaries:
        return _summaries(params, scenario, readout, window, average_trials)

    effects = effects_of(summaries, params, uncertain, z)
    return EffectEstimate(effects.per_step, effects.cumulative, effects.average, effects.relative, level)


def _summaries(
    params: ParamsLGSSM, scenario: Scenario, readout: Readout, window: Array, average_trials: bool
) -> Summaries:
    def one(scenario: Scenario, window: Array) -> tuple[Normal, Normal, Normal, Array]:
        return effect_of_sequence(plan_params(params, scenario), scenario, readout, window)

    per_step, cumulative, average, expected = scenario.map(one, window)
    if average_trials:
        per_step, cumulative, average = (over_trials(each) for each in (per_step, cumulative, average))
        expected = expected.mean(axis=0)
    scale = jnp.where(expected == 0, jnp.nan, expected)
    return Summaries(per_step, cumulative, average, Normal(average.mean / scale, average.variance / scale**2))


def effect_of_sequence(
    params: ParamsLGSSM, scenario: Scenario, readout: Readout, window: Bool[Array, "num_timesteps 1"]
) -> tuple[Normal, Normal, Normal, Float[Array, " num_outputs"]]:
    """Effect of one sequence from the initial distribution of `params`: per step, cumulative, average over the window.

    The last result is the expected outcome under the reference, averaged over the window.
    """
    inputs = scenario.plan.inputs
    num_timesteps, state_dim = inputs.shape[0], params.state_dim
    transitions = twin_transitions(params, inputs, scenario.reference, scenario.plan.intervention)
    rows = readout.rows(params, num_timesteps)
    counted = window.astype(rows.dtype)

    def step(carry: tuple[Array, ...], at: tuple) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        mean, cov, total, cross_cov, variance = carry
        transition, row, weight = at
        mean = transition.weights @ mean + transition.shift
        cov = symmetrize(transition.weights @ cov @ transition.weights.T + transition.cov)
        effect, effect_cov = row @ mean[state_dim:], row @ cov[state_dim:]  # Cov[effect, (x, delta)]
        effect_variance = (effect_cov[:, state_dim:] * row).sum(axis=1)
        cross_cov = cross_cov @ transition.weights.T  # Cov[sum so far, (x, delta)]
        shared = (cross_cov[:, state_dim:] * row).sum(axis=1)
        total, variance = total + weight * effect, variance + weight * (2 * shared + effect_variance)
        cross_cov = cross_cov + weight * effect_cov
        carry = (mean, cov, total, cross_cov, variance)
        return carry, (effect, effect_variance, total, variance, row @ mean[:state_dim])

    num_outputs = rows.shape[1]
    zeros = jnp.zeros(num_outputs, rows.dtype)
    start = (
        jnp.zeros(2 * state_dim, rows.dtype),
        jnp.zeros((2 * state_dim, 2 * state_dim), rows.dtype),
        zeros,
        jnp.zeros((num_outputs, 2 * state_dim), rows.dtype),
        zeros,
    )
    _, (effects, variances, totals, total_variances, expected) = lax.scan(
        step, start, (transitions, rows, counted[:, 0])
    )
    length = counted.sum()
    expected = ((expected + readout.offsets(params, inputs)) * counted).sum(axis=0) / length
    return (
        Normal(effects, variances),
        Normal(totals, total_variances),
        Normal(totals[-1] / length, total_variances[-1] / length**2),
        expected,
    )
