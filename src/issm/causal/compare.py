"""Which of several fitted models predicts interventions that none of them has seen."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from issm._check import as_float_array, check_key, common_float_dtype, fail
from issm._compile import jit_quickly
from issm._host import to_device
from issm._tables import format_table
from issm._types import PRNGKey
from issm.causal.history import check_plan
from issm.causal.predict import check_level
from issm.causal.stimulation import roll_out, stimulation_as
from issm.inference.kalman import lgssm_filter
from issm.interventions import Intervention
from issm.models.fields import apply_weights
from issm.models.lgssm import ParamsLGSSM, check_params
from issm.models.transitions import emission_offsets
from issm.models.trials import as_trials


class Forecast(eqx.Module):
    r"""What one model says about held-out trials.

    Attributes:
        log_probs: $\log p(y \mid stimulation)$ of every trial, `(num_trials,)`.
        one_step: $E[y_t \mid y_{0:t-1}, stimulation]$, `(num_trials, num_timesteps, emission_dim)`.
        rollout: Mean of everything after the first steps (the `history` of `compare`) given these and the stimulation,
            `(num_trials, num_timesteps - history, emission_dim)`.

    References:
        Nejatbakhsh & Wang (2025), sec. 4.

    Examples:
        >>> import jax.numpy as jnp, issm
        >>> issm.Forecast(jnp.zeros(2), jnp.zeros((2, 5, 1)), jnp.zeros((2, 3, 1))).rollout.shape
        (2, 3, 1)
    """

    log_probs: Float[Array, " num_trials"]
    one_step: Float[Array, "num_trials num_timesteps emission_dim"]
    rollout: Float[Array, "num_trials num_future_steps emission_dim"]


class Score(eqx.Module):
    """Numbers with bootstrap intervals over trials, all of one shape.

    Attributes:
        value: On the trials as they are.
        lower: Lower end of the interval.
        upper: Upper end.

    References:
        Efron & Tibshirani (1993), *An Introduction to the Bootstrap*, sec. 13.3 (percentile intervals).

    Examples:
        >>> import jax.numpy as jnp, issm
        >>> issm.Score(jnp.array(0.5), jnp.array(0.4), jnp.array(0.6)).value.item()
        0.5
    """

    value: Float[Array, "*shape"]
    lower: Float[Array, "*shape"]
    upper: Float[Array, "*shape"]


class Comparison(eqx.Module):
    """Result of `compare`; the first axis of every array is that of `names`.

    Attributes:
        log_likelihood: Held-out log-likelihood, nats for each observed number, `(num_models,)`.
        one_step_r2: R² of the prediction of every step from all before it, `(num_models,)`.
        rollout_r2: R² of the prediction from the first steps and the stimulation alone, `(num_models,)`.
        log_likelihood_differences: Model i less model j, paired over trials, `(num_models, num_models)`.
        rollout_r2_differences: The same for the rollouts.
        best: Index of the model with the highest held-out log-likelihood.
        decided: Whether the intervals of its lead over every other model leave out zero.
        names: The models' names.

    References:
        Nejatbakhsh & Wang (2025), sec. 4.

    Examples:
        >>> import jax.numpy as jnp, issm
        >>> score = issm.Score(jnp.array([-1.0]), jnp.array([-1.1]), jnp.array([-0.9]))
        >>> zero = issm.Score(*[jnp.zeros((1, 1))] * 3)
        >>> result = issm.Comparison(score, score, score, zero, zero, jnp.array(0), jnp.array(True), ("iSSM",))
        >>> result.names[int(result.best)]
        'iSSM'
    """

    log_likelihood: Score
    one_step_r2: Score
    rollout_r2: Score
    log_likelihood_differences: Score
    rollout_r2_differences: Score
    best: Int[Array, ""]
    decided: Bool[Array, ""]
    names: tuple[str, ...] = eqx.field(static=True)

    def summary(self) -> str:
        """A table of the models, and which of them the held-out trials prefer.

        Returns:
            Several lines.
        """
        scores = (self.log_likelihood, self.one_step_r2, self.rollout_r2)
        rows = [[name, *(_with_interval(score, i) for score in scores)] for i, name in enumerate(self.names)]
        heads = ["model", "log-likelihood (nats a number)", "one-step R²", "rollout R²"]
        table = format_table(heads, rows, title="Held-out trials, with bootstrap intervals over trials")
        best = int(self.best)
        if len(self.names) == 1:
            return table
        if not self.decided:
            return f"{table}\n{self.names[best]} is ahead, but not of every other model beyond the interval"
        others = [i for i in range(len(self.names)) if i != best]
        lead = self.log_likelihood_differences
        second = min(others, key=lambda i: float(lead.value[best, i]))
        return (
            f"{table}\nthe trials prefer {self.names[best]}, by {_with_interval(lead, (best, second))} nats a number over"
            f" {self.names[second]}"
        )


Model = tuple[ParamsLGSSM, str] | Callable[..., Forecast]


def compare(
    key: PRNGKey,
    models: Mapping[str, Model],
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention,
    history: int = 0,
    num_bootstrap: int = 1000,
    level: Any = 0.95,
) -> Comparison:
    r"""Compare fitted models on held-out trials with interventions of their own.

    By the log-likelihood, and by $R^2 = 1 - \sum (y - \hat y)^2 / \sum (y - \bar y)^2$ of one-step predictions and of rollouts,
    pooled over channels. Intervals are percentiles over resampled trials; differences are resampled in pairs. Which model is
    right is not assumed: where stimulation adds and does not clamp, the additive model will be ahead.

    Args:
        key: JAX random key for the bootstrap.
        models: Name to model: `(params, seen_as)`, with `seen_as` as in `stimulation_as`, or any function
            `(emissions, inputs, interventions, history)` that returns a `Forecast`.
        emissions: Held-out trials, `(num_trials, num_timesteps, emission_dim)`, at least two; NaN is missing.
        inputs: Soft inputs of these trials, shared or one for each.
        interventions: Clamps of these trials, shared or one for each.
        history: Number of first steps that a rollout is given. Zero: it starts from the initial distribution.
        num_bootstrap: Number of resamplings, at least 2.
        level: Level of the intervals.

    Returns:
        Scores and differences with intervals; `summary()` prints them.

    Raises:
        ValueError: If there are fewer than two trials, a model is neither kind, or an argument has the wrong shape, type or
            values.

    References:
        Nejatbakhsh & Wang (2025), sec. 4; Efron & Tibshirani (1993), *An Introduction to the Bootstrap*, ch. 13.

    Examples:
        >>> import jax, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> plan = issm.do({0: 3.0}, num_timesteps=20, state_dim=1, start=5, stop=9)
        >>> trials = jax.tree.map(lambda leaf: leaf[None].repeat(4, 0), plan)
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), params, 20, interventions=trials)
        >>> models = {"iSSM": (params, "clamps"), "observational SSM": (params, "ignored")}
        >>> result = issm.compare(jax.random.key(1), models, emissions, interventions=trials)
        >>> bool(result.decided)
        True
    """
    check_key(key)
    check_level(level)
    check_count("num_bootstrap", num_bootstrap, 2)
    emissions = as_float_array("emissions", emissions, common_float_dtype(emissions, models))
    if emissions.ndim != 3 or emissions.shape[0] < 2:
        fail(
            "emissions",
            got=f"shape {tuple(emissions.shape)}",
            expected="(num_trials, num_timesteps, emission_dim) with at least two trials",
            remedy="Intervals come from the differences between trials; cut a long recording into several.",
        )
    check_plan("interventions", interventions)
    if not isinstance(models, Mapping) or not models:
        fail("models", got=repr(models), expected="names and models", remedy="Pass {name: (params, 'clamps')}.")
    check_count("history", history, 0, emissions.shape[1] - 1)
    for name, model in models.items():
        _check_model(name, model, emissions, inputs, interventions)
    forecasts = [_ask(name, model, emissions, inputs, interventions, history) for name, model in models.items()]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *forecasts)
    scores = _compare(key, stacked, emissions, to_device(level, emissions.dtype), int(history), int(num_bootstrap))
    return Comparison(*scores, names=tuple(models))


def forecast(
    params: ParamsLGSSM, emissions: Array, inputs: Any, interventions: Intervention | None, history: int
) -> Forecast:
    """What a linear Gaussian model says about trials, given its view of their stimulation."""
    posterior = lgssm_filter(params, emissions, inputs, interventions=interventions)
    num_trials, num_timesteps, _ = emissions.shape
    if inputs is None:
        inputs_of_all = jnp.zeros((num_trials, num_timesteps, 0), emissions.dtype)
    else:
        inputs_of_all = jnp.broadcast_to(inputs, (num_trials, *jnp.shape(inputs)[-2:]))
    one_step = jax.vmap(lambda mean, u: apply_weights(params.emissions.weights, mean) + emission_offsets(params, u))(
        posterior.predicted_means, inputs_of_all
    )
    rollout = roll_out(params, emissions, inputs, interventions, history)
    return Forecast(posterior.marginal_loglik, one_step, rollout.emissions.mean)


def bootstrap_counts(key: PRNGKey, num_trials: int, num_bootstrap: int, dtype: Any) -> Float[Array, "samples trials"]:
    """How often each trial is in each sample; the first sample is the trials as they are."""
    drawn = jax.random.randint(key, (num_bootstrap, num_trials), 0, num_trials)
    rows = jnp.arange(num_bootstrap)[:, None]
    counts = jnp.zeros((num_bootstrap, num_trials), dtype).at[rows, drawn].add(1.0)
    return jnp.concatenate([jnp.ones((1, num_trials), dtype), counts])


def score_of_samples(samples: Float[Array, "samples *shape"], level: Array) -> Score:
    """The first sample with percentiles of the others."""
    lower, upper = jnp.quantile(samples[1:], jnp.stack([(1 - level) / 2, (1 + level) / 2]), axis=0)
    return Score(samples[0], lower, upper)


@partial(jit_quickly, static_argnames=("history", "num_bootstrap"))
def _compare(
    key: PRNGKey, forecasts: Forecast, emissions: Array, level: Array, history: int, num_bootstrap: int
) -> tuple:
    counts = bootstrap_counts(key, emissions.shape[0], num_bootstrap, emissions.dtype)
    observed = (~jnp.isnan(emissions)).astype(emissions.dtype)
    log_likelihood = counts @ forecasts.log_probs.T / (counts @ observed.sum(axis=(1, 2)))[:, None]
    one_step = jax.vmap(lambda mean: _r2_samples(counts, emissions, mean), out_axes=1)(forecasts.one_step)
    rollout = jax.vmap(lambda mean: _r2_samples(counts, emissions[:, history:], mean), out_axes=1)(forecasts.rollout)
    differences = [samples[:, :, None] - samples[:, None, :] for samples in (log_likelihood, rollout)]
    scores = [score_of_samples(samples, level) for samples in (log_likelihood, one_step, rollout, *differences)]
    best = jnp.argmax(scores[0].value)
    others = jnp.arange(scores[0].value.shape[0]) != best
    decided = (jnp.where(others, scores[3].lower[best], jnp.inf) > 0).all()
    return (*scores, best, decided)


def _r2_samples(counts: Array, truth: Array, prediction: Array) -> Float[Array, " samples"]:
    seen = ~jnp.isnan(truth)
    center = jnp.where(seen, truth, 0.0).sum(axis=(0, 1)) / jnp.maximum(seen.sum(axis=(0, 1)), 1).astype(truth.dtype)
    centered = jnp.where(seen, truth - center[None, None], 0.0)
    residuals = jnp.where(seen, truth - prediction, 0.0)
    number, total, square, error = (
        counts @ each.sum(axis=1) for each in (seen.astype(truth.dtype), centered, centered**2, residuals**2)
    )
    variation = (square - total**2 / jnp.maximum(number, 1.0)).sum(axis=1)
    return jnp.where(variation > 0, 1 - error.sum(axis=1) / jnp.where(variation > 0, variation, 1.0), jnp.nan)


def _ask(name: str, model: Model, emissions: Array, inputs: Any, interventions: Intervention, history: int) -> Forecast:
    if isinstance(model, tuple):
        params, seen_as = model
        return forecast(params, emissions, history=history, **stimulation_as(seen_as, interventions, inputs))
    found = model(emissions, inputs, interventions, history)
    num_trials, num_timesteps, emission_dim = emissions.shape
    shapes = [(num_trials,), emissions.shape, (num_trials, num_timesteps - history, emission_dim)]
    if not isinstance(found, Forecast) or [jnp.shape(leaf) for leaf in jax.tree.leaves(found)] != shapes:
        fail(
            f"models[{name!r}]",
            got=f"{type(found).__name__} with shapes {[jnp.shape(leaf) for leaf in jax.tree.leaves(found)]}",
            expected=f"a Forecast with shapes {shapes}",
            remedy="Return log_probs, one_step and rollout of all trials.",
        )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, emissions.dtype), found)


def _check_model(name: Any, model: Any, emissions: Array, inputs: Any, interventions: Intervention) -> None:
    argument = f"models[{name!r}]"
    if not isinstance(name, str):
        fail("models", got=f"the name {name!r}", expected="a string", remedy="Names stand in the table.")
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], ParamsLGSSM):
        try:
            check_params(model[0])
            seen = stimulation_as(model[1], interventions, inputs)
            as_trials(model[0], emissions, seen["inputs"], seen["interventions"])
        except ValueError as error:
            raise ValueError(f"{argument}.{error}") from None
    elif not callable(model):
        fail(
            argument,
            got=f"a {type(model).__name__}",
            expected="(params, seen_as), or a function that returns a Forecast",
            remedy="Say how the model sees the stimulation: (params, 'clamps').",
        )


def check_count(argument: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number between two bounds."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bound = f"an integer of at least {least}" + ("" if most is None else f" and at most {most}")
        fail(argument, got=repr(value), expected=bound, remedy="Give a whole number.")


def _with_interval(score: Score, at: Any) -> str:
    value, lower, upper = (float(part[at]) for part in (score.value, score.lower, score.upper))
    return f"{value:.3f} [{lower:.3f}, {upper:.3f}]"
