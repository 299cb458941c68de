r"""What happened to an observed series after a date: what was seen, less what the past and the regressors let expect.

The counterfactual is the forecast $p(y_{t_0:} \mid y_{0:t_0-1}, u)$: a model of the series had nothing happened.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from issm._check import fail
from issm._compile import jit_quickly
from issm._host import is_concrete, to_device
from issm._linalg import symmetrize
from issm.causal.estimates import Effect
from issm.causal.history import History, Scenario, as_scenario, plan_params
from issm.causal.predict import Moments, quantile_of_level
from issm.causal.propagate import Normal, Summaries, effects_of
from issm.causal.readout import as_window
from issm.causal.summaries import effect_table
from issm.causal.uncertainty import Directions, as_uncertain_parameters
from issm.inference.kalman import lgssm_filter
from issm.interventions import no_intervention
from issm.models.fields import as_matrix, over_time
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import emission_offsets, lgssm_transitions
from issm.models.trials import as_trials


class SeriesEffect(eqx.Module):
    """Result of `observed_effect`. `start` divides the past from what came after, of `num_after` steps.

    Attributes:
        per_step: Observed less expected at every step after, `(num_after, emission_dim)`; NaN where nothing was observed. What
            `trial` spreads is the forecast: what would have been is not known even if the parameters are.
        cumulative: Summed up to every step, over the steps of the window that were observed, same shape.
        average: Averaged over them, `(emission_dim,)`.
        relative: The average effect over the average forecast, `(emission_dim,)`.
        level: Level of the intervals.
        expected: Moments of the emissions at all steps: one-step predictions before the date, the forecast after it,
            `(num_timesteps, emission_dim)`, parameters taken as known.
        emissions: What was observed, same shape.
        start: First step after the date.

    References:
        Brodersen et al. (2015), *Annals of Applied Statistics* 9, sec. 2.3.

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params(0.0, 1.0, 1.0, 0.0, 1.0, 1.0)  # a constant level
        >>> series = np.concatenate([np.zeros(50), np.full(5, 3.0)])[:, None]
        >>> effect = issm.observed_effect(params, series, start=50)
        >>> effect.average.mean.round(3).tolist(), effect.cumulative.mean[-1].round(3).tolist()
        ([3.0], [15.0])
    """

    per_step: Effect
    cumulative: Effect
    average: Effect
    relative: Effect
    level: Float[Array, ""]
    expected: Moments
    emissions: Float[Array, "num_timesteps emission_dim"]
    start: int = eqx.field(static=True)

    def summary(self) -> str:
        """Average, cumulative and relative effect with their intervals and tail probabilities.

        Returns:
            A table.
        """
        end = jax.tree.map(lambda leaf: leaf[-1], self.cumulative)
        parts = {"average": self.average, "cumulative": end, "relative": self.relative}
        title = f"Observed less expected from step {self.start} on, {float(self.level):.0%} intervals"
        return effect_table(parts, title=title)


def observed_effect(
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any = None,
    *,
    start: int,
    parameters: Any = None,
    window: Any = None,
    level: Any = 0.95,
) -> SeriesEffect:
    r"""Effect of what happened before step `start` on what was observed from there on, $y_t - E[y_t \mid y_{0:t_0-1}, u]$.

    The model, fitted to the past alone, forecasts the series as if nothing had happened; regressors that were not touched carry
    the forecast. Mean and variance are closed form, those of sums with the covariance of the forecast errors over time.

    Args:
        params: Parameters fitted to the steps before `start`, such as those of a `structural_model`.
        emissions: The whole series, `(num_timesteps, emission_dim)`; NaN is missing.
        inputs: Regressors of the whole series, `(num_timesteps, input_dim)`; what happened must not have touched them.
        start: First step that may be affected, at least 1 and below num_timesteps.
        parameters: What is known of the parameters, draws or a covariance, as for `causal_effect`. None: known exactly.
        window: Steps, counted from `start`, that `cumulative`, `average` and `relative` run over: `(first, stop)` or a Boolean array
            `(num_after,)`. None: all.
        level: Level of the intervals.

    Returns:
        Effect per step, cumulative, average and relative, uncertainty of the forecast and of the parameters apart and together.

    Raises:
        ValueError: If `start` leaves the series, or an argument has the wrong shape, type or values.

    References:
        Brodersen et al. (2015), *Annals of Applied Statistics* 9, sec. 2.3; Harvey (1989), *Forecasting, Structural Time Series
        Models and the Kalman Filter*, sec. 7.6 (intervention analysis).

    Examples:
        >>> import numpy as np, issm
        >>> rng = np.random.default_rng(0)
        >>> driver = np.cumsum(rng.normal(size=(80, 1)), axis=0)
        >>> series = 2 * driver + rng.normal(size=(80, 1))
        >>> series[60:] += 5.0
        >>> params = issm.make_lgssm_params(  # in earnest, `fit_em` of a `structural_model`
        ...     0.0, 1.0, 1.0, 0.01, 1.0, 1.0, dynamics_input_weights=[[0.0]], emissions_input_weights=[[2.0]])
        >>> effect = issm.observed_effect(params, series, driver, start=60)
        >>> bool(effect.average.lower[0] < 5.0 < effect.average.upper[0])
        True
    """
    trials = as_trials(params, emissions, inputs, None)
    if not trials.one_sequence:
        fail(
            "emissions",
            got=f"shape {tuple(trials.emissions.shape)}",
            expected="(num_timesteps, emission_dim), one sequence",
            remedy="Map over series with `jax.vmap`.",
        )
    emissions, inputs = trials.emissions[0], trials.plan.inputs
    num_timesteps = emissions.shape[0]
    whole = isinstance(start, (int, np.integer)) and not isinstance(start, bool)
    if not whole or not 1 <= start < num_timesteps:
        fail(
            "start",
            got=repr(start),
            expected=f"an integer in 1 ... {num_timesteps - 1}",
            remedy="Steps are counted from 0; the past needs at least one.",
        )
    start = int(start)
    if is_concrete(emissions) and np.isnan(np.asarray(emissions[start:])).all():
        fail(
            "emissions",
            got=f"nothing but missing entries from step {start} on",
            expected="something observed after the event",
            remedy="Without it, use `interventional_prediction` with the past as `history`.",
        )
    past = History(emissions[:start], inputs[:start] if params.input_dim else None)
    free = no_intervention(num_timesteps - start, params.state_dim)
    scenario = as_scenario(params, free, history=past, inputs=inputs[start:] if params.input_dim else None)
    steps = as_window(scenario, window)
    uncertain = as_uncertain_parameters(params, parameters)
    dtype = params.initial.mean.dtype
    z = quantile_of_level(level, dtype)
    effects = _observed_effect(params, scenario, emissions[start:], steps, uncertain, z)
    unaffected = emissions.at[start:].set(jnp.nan)
    filtered = lgssm_filter(params, unaffected, inputs if params.input_dim else None)
    expected = _emission_moments(params, filtered.predicted_means, filtered.predicted_covariances, inputs)
    return SeriesEffect(
        effects.per_step, effects.cumulative, effects.average, effects.relative,
        to_device(level, dtype), expected, emissions, start,
    )  # fmt: skip


def placebo_effects(
    fit: Callable[[Any, Any], ParamsLGSSM],
    emissions: Any,
    inputs: Any = None,
    *,
    starts: Sequence[int],
    num_timesteps: int,
    level: Any = 0.95,
) -> Effect:
    r"""Effects at dates at which nothing happened: how often would the method have found one?

    For each date the model is fitted to what came before it and asked for the average effect over the steps after it. The
    series must end before anything did happen. Intervals that leave out zero much more often than one minus `level` say that the
    model does not forecast this series.

    Args:
        fit: Function `(emissions, inputs)` of the past that returns fitted parameters; `inputs` is None where there are none.
        emissions: The series before anything happened, `(num_timesteps, emission_dim)`.
        inputs: Its regressors.
        starts: Dates, steps of the series; each leaves at least `num_timesteps` steps after it.
        num_timesteps: Number of steps after each date.
        level: Level of the intervals.

    Returns:
        The average effects, with a leading axis of dates: `(num_dates, emission_dim)`.

    Raises:
        ValueError: If a date leaves fewer steps than asked for, or an argument has the wrong shape, type or values.

    References:
        Abadie, Diamond & Hainmueller (2010), *Journal of the American Statistical Association* 105, sec. 2.4 (placebo tests).

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params(0.0, 1.0, 1.0, 0.1, 1.0, 1.0)
        >>> series = np.random.default_rng(0).normal(size=(40, 1))
        >>> placebos = issm.placebo_effects(lambda y, u: params, series, starts=[30], num_timesteps=10)
        >>> (placebos.total.p_value > 0.05).all().item()
        True
    """
    if not isinstance(starts, (list, tuple, range, np.ndarray)) or len(starts) == 0:
        fail("starts", got=repr(starts), expected="a list of steps", remedy="Pass the dates to pretend at.")
    length = len(emissions)
    found = []
    for start in starts:
        start = int(start)
        if not 1 <= start <= length - num_timesteps:
            fail(
                "starts",
                got=f"step {start}",
                expected=f"steps in 1 ... {length - num_timesteps}",
                remedy="Each date needs a past, and `num_timesteps` steps after it.",
            )
        until = slice(None, start + num_timesteps)
        params = fit(emissions[:start], None if inputs is None else inputs[:start])
        effect = observed_effect(
            params, emissions[until], None if inputs is None else inputs[until], start=start, level=level
        )
        found.append(effect.average)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


@jit_quickly
def _observed_effect(
    params: ParamsLGSSM,
    scenario: Scenario,
    observed: Float[Array, "num_after emission_dim"],
    window: Array,
    uncertain: ParamsLGSSM | Directions | None,
    z: Array,
) -> Any:
    """The summaries, with an effect in the place of every normal distribution."""
    return effects_of(lambda params: _summaries(params, scenario, observed, window), params, uncertain, z)


def _summaries(params: ParamsLGSSM, scenario: Scenario, observed: Array, window: Array) -> Summaries:
    ahead, inputs = plan_params(params, scenario), scenario.plan.inputs
    num_after, emission_dim = observed.shape
    rows = over_time(ahead.emissions.weights, num_after)
    noise = jnp.diagonal(over_time(as_matrix(ahead.emissions.cov), num_after), axis1=1, axis2=2)
    seen = ~jnp.isnan(observed)
    counted = (seen & window).astype(rows.dtype)

    def step(carry: tuple[Array, ...], at: tuple) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        mean, cov, cross_cov, variance = carry
        transition, row, noise, weight = at
        mean = transition.weights @ mean + transition.shift
        cov = symmetrize(transition.weights @ cov @ transition.weights.T + transition.cov)
        forecast_cov = row @ cov  # Cov[forecast error, state]
        own = (forecast_cov * row).sum(axis=1) + noise
        cross_cov = cross_cov @ transition.weights.T  # Cov[sum of errors so far, state]
        variance = variance + weight * (2 * (cross_cov * row).sum(axis=1) + own)
        cross_cov = cross_cov + weight[:, None] * forecast_cov
        return (mean, cov, cross_cov, variance), (row @ mean, own, variance)

    zeros = jnp.zeros((emission_dim, params.state_dim), rows.dtype)
    start = (zeros[0], jnp.zeros_like(zeros, shape=(params.state_dim,) * 2), zeros, zeros[:, 0])
    transitions = lgssm_transitions(ahead, inputs, scenario.plan.intervention)
    _, (forecast, variances, summed) = lax.scan(step, start, (transitions, rows, noise, counted))
    forecast = forecast + emission_offsets(ahead, inputs)
    effects = observed - forecast
    totals = jnp.cumsum(jnp.where(counted > 0, effects, 0.0), axis=0)
    length = counted.sum(axis=0)
    length = jnp.where(length > 0, length, jnp.nan)
    average = Normal(totals[-1] / length, summed[-1] / length**2)
    expected = (forecast * counted).sum(axis=0) / length
    scale = jnp.where(expected == 0, jnp.nan, expected)
    return Summaries(
        Normal(effects, jnp.where(seen, variances, jnp.nan)),
        Normal(totals, summed),
        average,
        Normal(average.mean / scale, average.variance / scale**2),
    )


@jit_quickly
def _emission_moments(params: ParamsLGSSM, means: Array, covs: Array, inputs: Array) -> Moments:
    num_timesteps = means.shape[0]
    rows = over_time(params.emissions.weights, num_timesteps)
    noise = over_time(as_matrix(params.emissions.cov), num_timesteps)
    mean = jnp.einsum("tni,ti->tn", rows, means) + emission_offsets(params, inputs)
    return Moments(mean, symmetrize(jnp.einsum("tni,tij,tmj->tnm", rows, covs, rows)) + noise)
