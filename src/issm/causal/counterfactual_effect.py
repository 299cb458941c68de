r"""What another plan would have changed on the very trials that were seen, $y'_t - y_t$, summed and averaged."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from issm._compile import jit_quickly
from issm._host import to_device
from issm.causal.counterfactual import Twins, as_twin_scenario, own_emissions, smooth_twins
from issm.causal.estimates import Effect, EffectEstimate
from issm.causal.history import Scenario, check_average
from issm.causal.predict import quantile_of_level
from issm.causal.propagate import Normal, Summaries, effects_of, over_trials
from issm.causal.readout import Readout, as_readout, as_window
from issm.causal.summaries import effect_table
from issm.causal.uncertainty import Directions, as_uncertain_parameters
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials, as_trials


class CounterfactualEffect(EffectEstimate):
    """Result of `counterfactual_effect` and `sample_counterfactual_effect`: what would have been, less what was.

    `trial` of every effect is what remains unknown of these very trials, their parameters being known; it is zero where both plans
    were the same up to then.

    Attributes:
        per_step: At every step, `(num_timesteps, num_outputs)`.
        cumulative: Summed from the start of the window up to every step, `(num_timesteps, num_outputs)`.
        average: Averaged over the window, `(num_outputs,)`.
        relative: The average effect over the average of what was, `(num_outputs,)`; NaN where that is zero.
        level: Level of the intervals.
        outcome: What would have been at every step, `(num_timesteps, num_outputs)`; its tail probabilities are those of being
            above or below zero.
        average_outcome: The same averaged over the window, `(num_outputs,)`.

    All have a leading trial axis if the emissions have one and trials are not averaged.

    References:
        Pearl (2009), *Causality*, sec. 7.1; Brodersen et al. (2015), *Annals of Applied Statistics* 9, sec. 2.3.

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[1.0]], [0.5])
        >>> y, plan = np.ones((2, 3, 1)), issm.do({0: 4.0}, num_timesteps=3, state_dim=1, start=1)
        >>> effect = issm.counterfactual_effect(params, y, plan, average_trials=True)
        >>> effect.mean.shape, bool(np.allclose(effect.average_outcome.mean, 1.0 + effect.average.mean))
        ((3, 1), True)
    """

    outcome: Effect
    average_outcome: Effect

    def summary(self) -> str:
        """What would have been on average, and the average, cumulative and relative difference, of every output (and trial).

        Returns:
            A table.
        """
        end = jax.tree.map(lambda leaf: leaf[..., -1, :], self.cumulative)
        parts = {
            "outcome": self.average_outcome,
            "average": self.average,
            "cumulative": end,
            "relative": self.relative,
        }
        title = (
            f"What would have been over the window, and its difference to what was, {float(self.level):.0%} intervals"
        )
        return effect_table(parts, title=title)


def counterfactual_effect(
    params: ParamsLGSSM,
    emissions: Any,
    plan: Intervention,
    *,
    interventions: Intervention | None = None,
    inputs: Any = None,
    of: str | Readout = "emissions",
    parameters: Any = None,
    window: Any = None,
    level: Any = 0.95,
    average_trials: bool = False,
) -> CounterfactualEffect:
    r"""What another plan would have changed on these trials, $y'_t - y_t$ with $y' \sim p(y' \mid y, do(\pi), \pi')$.

    Abduction, action, prediction as in `counterfactual`, which has the same moments at every step. Sums and averages over a window
    need the covariance between steps as well: $\sum_t C \delta_t$ given y is Gaussian, and its variance follows from the
    smoothed twin network. The noise of different trials is independent given the parameters.

    `causal_effect` is about a new trial, or all of them; this is about those that were seen, whose noise is known in part.

    Args:
        params: Model parameters.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or with a leading trial axis; NaN is missing.
        plan: $\pi'$, the clamps that might have been, `(num_timesteps, state_dim)` or with a leading trial axis.
        interventions: $\pi$, the clamps that were in force. None: no clamps.
        inputs: Soft inputs, the same in both worlds. Needed if the model has inputs.
        of: "emissions", "states", or a `Readout` of either.
        parameters: What is known of the parameters, draws or a covariance, as for `causal_effect`. Every draw infers the noise
            of the trials anew. None: known exactly.
        window: Steps that `cumulative`, `average`, `relative` and `average_outcome` run over: "on" (the plans differ in a clamp),
            "off", "after", `(start, stop)` or a Boolean array `(num_timesteps,)`, as for `causal_effect`. None: all.
        level: Level of the intervals, above 0 and below 1.
        average_trials: Whether to average over the trials.

    Returns:
        The difference per step, cumulative, average and relative, and the counterfactual outcome itself, each with what remains
        unknown of the trials and the uncertainty of the parameters apart and together.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, draws are not those of a model like `params`, or a window
            is empty; the message names the argument.

    References:
        Pearl (2009), *Causality*, theorem 7.1.7 and sec. 7.1.4; Durbin & Koopman (2012), sec. 4.7 (covariances between steps).

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[1.0]], [0.5])
        >>> y, plan = np.array([[0.3], [0.1], [-0.4]]), issm.do({0: 4.0}, num_timesteps=3, state_dim=1, start=1, stop=2)
        >>> lifted = issm.counterfactual_effect(params, y, issm.no_intervention(3, 1), interventions=plan, window="on")
        >>> lifted.sd[0].tolist(), bool(lifted.average.upper[0] < 0)
        ([0.0], True)
    """
    trials = as_trials(params, emissions, inputs, interventions)
    scenario = as_twin_scenario(params, trials, plan)
    check_average(average_trials, not trials.one_sequence, "emissions with a trial axis")
    readout, steps = as_readout(params, of), as_window(scenario, window)
    uncertain = as_uncertain_parameters(params, parameters)
    dtype = params.initial.mean.dtype
    z = quantile_of_level(level, dtype)
    return _counterfactual_effect(
        params, trials, scenario, readout, steps, uncertain, z, to_device(level, dtype), bool(average_trials)
    )


class TrialSummaries(eqx.Module):
    """What a `CounterfactualEffect` holds, for known parameters."""

    effect: Summaries
    outcome: Normal
    average_outcome: Normal


@partial(jit_quickly, static_argnames="average_trials")
def _counterfactual_effect(
    params: ParamsLGSSM,
    trials: Trials,
    scenario: Scenario,
    readout: Readout,
    window: Bool[Array, "*trials num_timesteps 1"],
    uncertain: ParamsLGSSM | Directions | None,
    z: Float[Array, ""],
    level: Float[Array, ""],
    average_trials: bool,
) -> CounterfactualEffect:
    def summaries(params: ParamsLGSSM) -> TrialSummaries:
        def one(scenario: Scenario, window: Array, emissions: Array) -> tuple[Normal, ...]:
            return _effect_on_sequence(params, scenario, window, emissions, readout, trials.may_miss)

        emissions = trials.emissions[0] if trials.one_sequence else trials.emissions
        found = scenario.map(one, window, emissions)
        if average_trials:
            found = tuple(over_trials(each) for each in found)
        per_step, cumulative, average, outcome, average_outcome = found
        was = average_outcome.mean - average.mean
        scale = jnp.where(was == 0, jnp.nan, was)
        relative = Normal(average.mean / scale, average.variance / scale**2)
        return TrialSummaries(Summaries(per_step, cumulative, average, relative), outcome, average_outcome)

    found = effects_of(summaries, params, uncertain, z)
    effect = found.effect
    return CounterfactualEffect(
        effect.per_step, effect.cumulative, effect.average, effect.relative, level, found.outcome, found.average_outcome
    )


def _effect_on_sequence(
    params: ParamsLGSSM,
    scenario: Scenario,
    window: Bool[Array, "num_timesteps 1"],
    emissions: Float[Array, "num_timesteps emission_dim"],
    readout: Readout,
    may_miss: bool,
) -> tuple[Normal, ...]:
    """Difference per step, cumulative and average, then the outcome per step and average, of one sequence."""
    plan = eqx.tree_at(lambda p: p.intervention, scenario.plan, scenario.reference)
    twins = smooth_twins(params, emissions, plan, scenario.plan.intervention, may_miss=may_miss)
    rows = readout.rows(params, emissions.shape[0])
    if readout.of == "states":
        known, unknown, noise = jnp.zeros_like(rows[:, :, 0]), rows, jnp.zeros_like(rows[:, :, 0])
    else:
        own = own_emissions(params, emissions, plan.inputs, may_miss=may_miss)
        mix = jnp.eye(params.emission_dim, dtype=rows.dtype) if readout.weights is None else readout.weights
        known, unknown = own.known @ mix.T, mix[None] @ own.rows
        noise = jnp.einsum("ni,tij,nj->tn", mix, own.noise, mix)
    change = jnp.concatenate([jnp.zeros_like(rows), rows], axis=2)
    counted = window.astype(rows.dtype)
    length = counted.sum()

    def summed(rows: Array, offsets: Array, noise: Array) -> tuple[Normal, Normal, Normal]:
        means = jnp.einsum("tni,ti->tn", rows, twins.smoothed.means) + offsets
        variances, of_sums = _variances(twins, rows, noise, counted[:, 0])
        totals = jnp.cumsum(means * counted, axis=0)
        average = Normal(totals[-1] / length, of_sums[-1] / length**2)
        return Normal(means, variances), Normal(totals, of_sums), average

    nothing = jnp.zeros_like(noise)
    effects, totals, average = summed(change, nothing, nothing)
    outcomes, _, average_outcome = summed(jnp.concatenate([unknown, rows], axis=2), known, noise)
    return effects, totals, average, outcomes, average_outcome


def _variances(
    twins: Twins,
    rows: Float[Array, "num_timesteps num_outputs twin_dim"],
    noise: Float[Array, "num_timesteps num_outputs"],
    counted: Float[Array, " num_timesteps"],
) -> tuple[Float[Array, "num_timesteps num_outputs"], Float[Array, "num_timesteps num_outputs"]]:
    r"""Variances of $o_t = W_t z_t + e_t$ given the data, and of their sums over the counted steps so far.

    $Cov[z_s, z_t \mid y] = P_s^- L_s^\top \cdots L_{t-1}^\top (I - N_t P_t^-)$ for $s < t$, where $L_t = A_{t+1} V_t$ carries the
    error of a prediction to the next; no covariance is inverted.

    References:
        Durbin & Koopman (2012), sec. 4.7.
    """
    steps, smoothed = twins.steps, twins.smoothed
    onward = jnp.concatenate([twins.transitions.weights[1:], jnp.zeros_like(twins.transitions.weights[:1])])

    def step(carry: tuple[Array, Array], at: tuple) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        carried, variance = carry  # Cov[sum so far, error of the prediction of z_t | y_{0:t-1}]
        row, noise, weight, predicted_cov, information, cov, propagated = at
        own = ((row @ cov) * row).sum(axis=1) + noise
        shared = ((carried - carried @ information @ predicted_cov) * row).sum(axis=1)
        variance = variance + weight * (2 * shared + own)
        carried = (carried + weight * row @ predicted_cov) @ propagated.T
        return (carried, variance), (own, variance)

    start = (jnp.zeros_like(rows[0]), jnp.zeros_like(noise[0]))
    arguments = (
        rows, noise, counted, steps.predicted_covs, smoothed.informations, smoothed.covs, onward @ steps.retained,
    )  # fmt: skip
    return lax.scan(step, start, arguments)[1]
