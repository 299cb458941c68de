"""What a plan will do, and what it changes, for models without closed forms: by draws."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from issm._check import check_key
from issm._host import to_device
from issm._types import PRNGKey
from issm.causal.curved import draw_worlds
from issm.causal.draws import (
    GAUSS_NEWTON_STEPS,
    SampledPrediction,
    check_num_draws,
    pool_draws,
    predictors_of,
    simulate,
)
from issm.causal.estimates import EffectEstimate
from issm.causal.history import History, Scenario, arrive, as_scenario, at_steps, check_average, named
from issm.causal.model_draws import as_model_draws, over_models, summarise_worlds
from issm.causal.predict import quantile_of_level
from issm.causal.readout import Readout, as_readout, as_window, read
from issm.causal.twin import twin_transitions
from issm.inference.laplace import Problem, approximation, expand
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.nonlinear import NonlinearDynamics
from issm.models.ssm import SSM, check_model, companion
from issm.models.transitions import lgssm_transitions


class SampledEffect(EffectEstimate):
    """Result of `sample_effect`: that of `causal_effect`, from draws.

    Attributes:
        per_step: At every step of the plan, `(num_timesteps, num_outputs)`.
        cumulative: Summed from the start of the window up to every step, `(num_timesteps, num_outputs)`.
        average: Averaged over the window, `(num_outputs,)`.
        relative: The average effect over the average outcome drawn under the reference, `(num_outputs,)`; NaN where that is zero.
        level: Level of the intervals.
        num_draws: Number of draws, under all parameters together.

    All arrays have a leading trial axis if the plan, the reference, the history or the inputs have one and trials are not
    averaged.

    References:
        `docs/how-to/other-emissions.md`.

    Examples:
        >>> import jax, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[1.0]], [0.5])
        >>> plan = issm.do({0: 4.0}, num_timesteps=3, state_dim=1)
        >>> effect = issm.sample_effect(jax.random.key(0), issm.ssm_from_lgssm(linear), plan, num_draws=100)
        >>> effect.per_step.mean.shape, effect.monte_carlo_error.shape
        ((3, 1), (3, 1))
    """

    num_draws: int = eqx.field(static=True)

    @property
    def monte_carlo_error(self) -> Float[Array, "*trials num_timesteps num_outputs"]:
        """Standard error of the effect at every step for having drawn so few, given the parameters."""
        return self.per_step.trial.sd / self.num_draws**0.5


def sample_prediction(
    key: PRNGKey,
    model: SSM,
    plan: Intervention,
    *,
    history: History | None = None,
    inputs: Any = None,
    parameters: Any = None,
    num_draws: int = 1000,
) -> SampledPrediction:
    r"""Draw states and emissions under a plan, $p(x_{t_0+1:}, y_{t_0+1:} \mid do(\pi), h)$, for any emission model.

    The state at the end of a history is drawn from Laplace's approximation to its posterior; the rest is the model itself.
    For a linear Gaussian model `interventional_prediction` has the closed form.

    Args:
        key: JAX random key.
        model: The model. A `TimeVarying` field of the dynamics has one entry for each step of the history and then of the plan.
        plan: Clamps over the horizon, `(num_timesteps, state_dim)` or with a leading trial axis.
        history: The past of the trials. None: the plan starts from the initial distribution.
        inputs: Soft inputs over the horizon, `(num_timesteps, input_dim)` or with a leading trial axis. Needed if the model
            has inputs.
        parameters: What is known of the parameters: an `SSM` of draws, every array with one leading axis, all equally probable
            (bootstrap refits, posterior draws, seeds). None: those of `model`, known exactly.
        num_draws: Number of draws under each of the parameters, at least 2.

    Returns:
        Draws of states and emissions, with their moments and Monte-Carlo errors, noise of trials and uncertainty of the
        parameters apart and together.

    Raises:
        ValueError: If shapes, lengths or numbers of trials disagree, draws are not those of a model like `model`, or the
            emission model gives the history no probability; the message names the argument.

    References:
        Pearl (2009), *Causality*, sec. 3.2; Nejatbakhsh & Wang (2025), sec. 2; Tierney & Kadane (1986).

    Examples:
        >>> import jax, numpy as np, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> model = issm.SSM(linear.initial, linear.dynamics, issm.PoissonEmission(issm.LinearMap([[1.0], [2.0]])))
        >>> plan, past = issm.do({0: 3.0}, num_timesteps=4, state_dim=1), issm.History(np.ones((10, 2)))
        >>> ahead = issm.sample_prediction(jax.random.key(0), model, plan, history=past, num_draws=50)
        >>> ahead.states.mean.tolist(), ahead.emissions.interval(0.9)[0].shape
        ([[3.0], [3.0], [3.0], [3.0]], (4, 2))
    """
    scenario = _check(key, model, plan, None, history, inputs, num_draws)
    return _predict(key, model, as_model_draws(model, parameters), scenario, num_draws)


def sample_effect(
    key: PRNGKey,
    model: SSM,
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
    num_draws: int = 1000,
) -> SampledEffect:
    r"""Effect of one plan against another for any emission model, $\tau_t = E[y_t \mid do(\pi_1), h] - E[y_t \mid do(\pi_0), h]$.

    Each draw is one trial in two worlds that share the initial state and all noise of the states; its effect is the difference of
    the expected emissions given the states, $E[y \mid \eta'_t] - E[y \mid \eta_t]$. Equal plans have no effect. Under
    draws of the parameters, each has draws of trials of its own; the Monte-Carlo error of these is taken out of `parameter`,
    which is zero where nothing else can be seen.

    Args:
        key: JAX random key.
        model: The model.
        plan: $\pi_1$, clamps over the horizon, `(num_timesteps, state_dim)` or with a leading trial axis.
        reference: $\pi_0$, the plan it is compared with. None: no clamps.
        history: The past of the trials; None: both plans start from the initial distribution.
        inputs: Soft inputs over the horizon, the same under both plans. Needed if the model has inputs.
        of: "emissions", "states", or a `Readout` of either.
        parameters: What is known of the parameters: an `SSM` of draws, every array with one leading axis, all equally probable
            (bootstrap refits, posterior draws, seeds). None: those of `model`, known exactly.
        window: Steps that `cumulative`, `average` and `relative` run over, as in `causal_effect`. None: all.
        level: Level of the intervals, above 0 and below 1.
        average_trials: Whether to average the effect over the trials, as in `causal_effect`.
        num_draws: Number of draws under each of the parameters, at least 2.

    Returns:
        The effect per step, cumulative, average and relative, each with its spread from trial to trial and the uncertainty of
        the parameters apart and together.

    Raises:
        ValueError: If shapes, lengths or numbers of trials disagree, draws are not those of a model like `model`, or a window is
            empty; the message names the argument.

    References:
        Pearl (2009), *Causality*, sec. 7.1 (one unit in two worlds); Brodersen et al. (2015), sec. 2.3.

    Examples:
        >>> import jax, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[1.0]], [0.5])
        >>> model = issm.SSM(linear.initial, linear.dynamics, issm.PoissonEmission(issm.LinearMap([[1.0]]), link="exp"))
        >>> plan = issm.do({0: 2.0}, num_timesteps=4, state_dim=1, stop=2)
        >>> effect = issm.sample_effect(jax.random.key(0), model, plan, window="on", num_draws=200)
        >>> bool(effect.average.mean[0] > 3 * effect.average.sd[0] / 200**0.5)
        True
    """
    scenario = _check(key, model, plan, reference, history, inputs, num_draws)
    readout, steps = as_readout(companion(model), of), as_window(scenario, window)
    check_average(
        average_trials,
        any(leaf.ndim == 3 for leaf in jax.tree.leaves(scenario)),
        "a plan, reference, history or inputs with a trial axis",
    )
    draws, dtype = as_model_draws(model, parameters), model.initial.mean.dtype
    z = quantile_of_level(level, dtype)
    level = to_device(level, dtype)
    return _effect(key, model, draws, scenario, readout, steps, z, level, num_draws, bool(average_trials))


def _check(
    key: Any, model: Any, plan: Any, reference: Any, history: History | None, inputs: Any, num_draws: Any
) -> Scenario:
    check_key(key)
    check_model(model)
    check_num_draws(num_draws)
    scenario = as_scenario(companion(model), plan, reference=reference, history=history, inputs=inputs)
    if scenario.past is not None:
        with named("history"):
            model.emission.check(scenario.past)
    return scenario


def _map_trials(key: PRNGKey, scenario: Scenario, kernel: Callable[..., Any]) -> Any:
    """`kernel(key, scenario)` of every trial, with a key of its own for each."""
    num_trials = next((leaf.shape[0] for leaf in jax.tree.leaves(scenario) if leaf.ndim == 3), None)
    if num_trials is None:
        return kernel(key, scenario)
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim == 3 else None, scenario)
    return jax.vmap(kernel, in_axes=(0, axes))(jax.random.split(key, num_trials), scenario)


@eqx.filter_jit
def _predict(key: PRNGKey, model: SSM, draws: SSM | None, scenario: Scenario, num_draws: int) -> SampledPrediction:
    def of_model(key: PRNGKey, model: SSM) -> tuple[Array, Array]:
        def one(key: PRNGKey, scenario: Scenario) -> tuple[Array, Array]:
            path_key, noise_key = jax.random.split(key)
            inputs, plan = scenario.plan.inputs, scenario.plan.intervention
            if isinstance(model.dynamics, NonlinearDynamics):
                (states,) = draw_worlds(path_key, model, scenario, (plan,), num_draws)
            else:
                states = simulate(path_key, lgssm_transitions(_horizon(model, scenario), inputs, plan), num_draws)
            return states, model.emission.sample(noise_key, predictors_of(model, states, inputs))

        return _map_trials(key, scenario, one)

    states, emissions = over_models(key, model, draws, of_model)
    return SampledPrediction(pool_draws(states), pool_draws(emissions))


@eqx.filter_jit
def _effect(
    key: PRNGKey,
    model: SSM,
    draws: SSM | None,
    scenario: Scenario,
    readout: Readout,
    window: Bool[Array, "*trials num_timesteps 1"],
    z: Float[Array, ""],
    level: Float[Array, ""],
    num_draws: int,
    average_trials: bool,
) -> SampledEffect:
    def of_model(key: PRNGKey, model: SSM) -> tuple[Array, Array]:
        def one(key: PRNGKey, scenario: Scenario) -> tuple[Array, Array]:
            inputs, plan = scenario.plan.inputs, scenario.plan.intervention
            if isinstance(model.dynamics, NonlinearDynamics):
                worlds = draw_worlds(key, model, scenario, (scenario.reference, plan), num_draws)
            else:
                into = twin_transitions(_horizon(model, scenario), inputs, scenario.reference, plan)
                before, change = jnp.split(simulate(key, into, num_draws), 2, axis=-1)
                worlds = (before, before + change)
            without, under = (_outcomes(model, readout, states, inputs) for states in worlds)
            return without, under

        return _map_trials(key, scenario, one)

    without, under = over_models(key, model, draws, of_model)
    found = summarise_worlds(without, under, window, z, known=draws is None, average_trials=average_trials)
    return SampledEffect(
        found.per_step, found.cumulative, found.average, found.relative, level, without.shape[0] * num_draws
    )


def _horizon(model: SSM, scenario: Scenario) -> ParamsLGSSM:
    """The dynamics over the horizon, after the state that Laplace's approximation sees at the end of the past."""
    params = companion(model)
    if scenario.past is None or scenario.past_plan is None:
        return params
    past, before = scenario.past_plan, at_steps(params, 0, scenario.past.shape[0])
    into = lgssm_transitions(before, past.inputs, past.intervention)
    problem = Problem(model, scenario.past, past.inputs, past.intervention, into)
    found = approximation(*expand(problem, GAUSS_NEWTON_STEPS))
    return arrive(params, scenario, found.smoothed_means[-1], found.smoothed_covariances[-1])


def _outcomes(model: SSM, readout: Readout, states: Array, inputs: Array) -> Array:
    """What the effect is on, for every draw."""
    found = states if readout.of == "states" else model.emission.mean(predictors_of(model, states, inputs))
    return read(readout, found)
