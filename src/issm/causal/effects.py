r"""What a plan changes: $E[y_t \mid do(\pi_1), h] - E[y_t \mid do(\pi_0), h]$, with its uncertainty."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from issm._check import fail
from issm._linalg import safe_sqrt, symmetrize
from issm.causal.history import History, Scenario, as_scenario, plan_params
from issm.causal.predict import quantile_of_level
from issm.causal.readout import Readout, as_readout, as_window
from issm.causal.summaries import effect_table
from issm.causal.twin import twin_transitions
from issm.causal.uncertainty import (
    Directions,
    Spread,
    as_uncertain_parameters,
    empirical_spread,
    mixture_spread,
    normal_spread,
)
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM

DRAWS_AT_ONCE = 32


class Effect(eqx.Module):
    """An effect with its uncertainty, source by source; all arrays have the shape of `mean`.

    Attributes:
        mean: The expected effect, in the units of what it is an effect on.
        trial: Spread of the effect from trial to trial, the parameters being known: the two worlds of a trial share its initial
            state, process noise and emission noise. Zero where the effect is the same in every trial.
        parameter: Uncertainty of the expected effect for want of knowledge of the parameters; None where they are taken as
            known.
        total: Both together: where the effect in one new trial may lie.

    References:
        `docs/concepts.md`, "Effects".

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> effect = issm.causal_effect(params, issm.do({0: 2.0}, num_timesteps=3, state_dim=1)).average
        >>> effect.mean.tolist(), effect.parameter is None
        ([2.0], True)
    """

    mean: Float[Array, "*shape"]
    trial: Spread
    parameter: Spread | None
    total: Spread

    @property
    def sd(self) -> Float[Array, "*shape"]:
        """Standard deviation, all sources together."""
        return self.total.sd

    @property
    def lower(self) -> Float[Array, "*shape"]:
        """Lower end of the interval, all sources together."""
        return self.total.lower

    @property
    def upper(self) -> Float[Array, "*shape"]:
        """Upper end of the interval, all sources together."""
        return self.total.upper


class EffectEstimate(eqx.Module):
    """Result of `causal_effect`: the effect at every step, and over the window that was asked for.

    `mean`, `sd`, `lower` and `upper` are those of `per_step`, all sources of uncertainty together.

    Attributes:
        per_step: At every step of the plan, `(num_timesteps, num_outputs)`.
        cumulative: Summed from the start of the window up to every step, `(num_timesteps, num_outputs)`.
        average: Averaged over the window, `(num_outputs,)`.
        relative: The average effect over the average expected outcome under the reference, `(num_outputs,)`; NaN where that is
            zero.
        level: Level of the intervals.

    All have a leading trial axis if the plan, the reference, the history or the inputs have one and trials are not averaged.

    References:
        Brodersen et al. (2015), *Annals of Applied Statistics* 9, sec. 2.3 (point, average, cumulative and relative effects).

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[1.0]], [0.5], emissions_bias=[10.0])
        >>> plan = issm.do({0: 4.0}, num_timesteps=3, state_dim=1, stop=1)
        >>> effect = issm.causal_effect(params, plan)
        >>> effect.mean[:, 0].tolist(), effect.cumulative.mean[:, 0].tolist()
        ([4.0, 2.0, 1.0], [4.0, 6.0, 7.0])
    """

    per_step: Effect
    cumulative: Effect
    average: Effect
    relative: Effect
    level: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, "*trials num_timesteps num_outputs"]:
        """The expected effect at every step."""
        return self.per_step.mean

    @property
    def sd(self) -> Float[Array, "*trials num_timesteps num_outputs"]:
        """Its standard deviation at every step, all sources together."""
        return self.per_step.sd

    @property
    def lower(self) -> Float[Array, "*trials num_timesteps num_outputs"]:
        """Lower end of the interval at every step."""
        return self.per_step.lower

    @property
    def upper(self) -> Float[Array, "*trials num_timesteps num_outputs"]:
        """Upper end of the interval at every step."""
        return self.per_step.upper

    def summary(self) -> str:
        """Average, cumulative and relative effect of every output (and trial), with interval and two-sided tail probability.

        Returns:
            A table.
        """
        end = jax.tree.map(lambda leaf: leaf[..., -1, :], self.cumulative)
        parts = {"average": self.average, "cumulative": end, "relative": self.relative}
        return effect_table(parts, title=f"Effect over the window, {float(self.level):.0%} intervals")


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
    if average_trials and not any(leaf.ndim == 3 for leaf in jax.tree.leaves(scenario)):
        fail(
            "average_trials",
            got="True for a single sequence",
            expected="a plan, reference, history or inputs with a trial axis",
            remedy="Leave it out.",
        )
    dtype = params.initial.mean.dtype
    z = quantile_of_level(level, dtype)
    return _causal_effect(
        params, scenario, readout, steps, uncertain, z, jnp.asarray(level, dtype), bool(average_trials)
    )


class Normal(eqx.Module):
    """Mean and variance of one number, over trials."""

    mean: Array
    variance: Array


class Summaries(eqx.Module):
    """The four quantities of an `EffectEstimate` for known parameters."""

    per_step: Normal
    cumulative: Normal
    average: Normal
    relative: Normal


@jax.jit(static_argnames="average_trials")
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


def effects_of(
    summaries: Callable[[ParamsLGSSM], Summaries],
    params: ParamsLGSSM,
    uncertain: ParamsLGSSM | Directions | None,
    z: Float[Array, ""],
) -> Any:
    """An `Effect` in the place of every `Normal` that `summaries` returns for some parameters."""
    is_normal = lambda node: isinstance(node, Normal)  # noqa: E731
    if uncertain is None:
        return jax.tree.map(lambda known: _effect(known, z), summaries(params), is_leaf=is_normal)
    if isinstance(uncertain, Directions):
        known, derivative = jax.linearize(summaries, params)
        changes = jax.vmap(derivative)(uncertain.columns)
        return jax.tree.map(lambda at, change: _effect_by_change(at, change, z), known, changes, is_leaf=is_normal)
    drawn = lax.map(summaries, uncertain, batch_size=DRAWS_AT_ONCE)
    return jax.tree.map(lambda draws: _effect_of_draws(draws, z), drawn, is_leaf=is_normal)


def _summaries(
    params: ParamsLGSSM, scenario: Scenario, readout: Readout, window: Array, average_trials: bool
) -> Summaries:
    def one(scenario: Scenario, window: Array) -> tuple[Normal, Normal, Normal, Array]:
        return effect_of_sequence(plan_params(params, scenario), scenario, readout, window)

    per_step, cumulative, average, expected = scenario.map(one, window)
    if average_trials:
        num_trials = expected.shape[0]
        per_step, cumulative, average = (
            Normal(each.mean.mean(axis=0), each.variance.mean(axis=0) / num_trials)
            for each in (per_step, cumulative, average)
        )
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


def _effect(known: Normal, z: Array) -> Effect:
    trial = normal_spread(known.mean, safe_sqrt(known.variance), z)
    return Effect(known.mean, trial, None, trial)


def _effect_by_change(known: Normal, change: Normal, z: Array) -> Effect:
    noise, ignorance = known.variance, (change.mean**2).sum(axis=0)
    return Effect(
        mean=known.mean,
        trial=normal_spread(known.mean, safe_sqrt(noise), z),
        parameter=normal_spread(known.mean, safe_sqrt(ignorance), z),
        total=normal_spread(known.mean, safe_sqrt(noise + ignorance), z),
    )


def _effect_of_draws(draws: Normal, z: Array) -> Effect:
    mean, noise = draws.mean.mean(axis=0), safe_sqrt(draws.variance)
    return Effect(
        mean=mean,
        trial=normal_spread(mean, safe_sqrt(draws.variance.mean(axis=0)), z),
        parameter=empirical_spread(draws.mean, z),
        total=mixture_spread(draws.mean, noise, z),
    )
