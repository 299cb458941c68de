r"""What another plan would have changed on the very trials that were seen, for models without closed forms: by draws."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from issm._host import to_device
from issm._types import PRNGKey
from issm.causal.counterfactual_effect import CounterfactualEffect
from issm.causal.history import Scenario, check_average
from issm.causal.model_draws import as_model_draws, over_models, summarise_worlds
from issm.causal.predict import quantile_of_level
from issm.causal.readout import Readout, as_readout, as_window, read
from issm.causal.sampled_counterfactual import check_question, draw_both_worlds
from issm.interventions import Intervention
from issm.models.ssm import SSM, companion
from issm.models.trials import Trials


def sample_counterfactual_effect(
    key: PRNGKey,
    model: SSM,
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
    num_draws: int = 1000,
) -> CounterfactualEffect:
    r"""What another plan would have changed on these trials, $y'_t - y_t$, for any emission model.

    The draws are those of `sample_counterfactual`, whose noise both worlds share; the difference is that of the emissions
    themselves, counts to counts. What was missing of y is drawn too. The standard error of a mean for having drawn so few is
    the `trial.sd` of it over the square root of the number of all draws.

    Args:
        key: JAX random key.
        model: The model.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or with a leading trial axis; NaN is missing.
        plan: $\pi'$, the clamps that might have been, `(num_timesteps, state_dim)` or with a leading trial axis.
        interventions: $\pi$, the clamps that were in force. None: no clamps.
        inputs: Soft inputs, the same in both worlds. Needed if the model has inputs.
        of: "emissions", "states", or a `Readout` of either.
        parameters: What is known of the parameters: an `SSM` of draws, as for `sample_effect`; each infers the noise of the trials
            anew. None: those of `model`, known exactly.
        window: Steps that `cumulative`, `average`, `relative` and `average_outcome` run over, as for `counterfactual_effect`.
            None: all.
        level: Level of the intervals, above 0 and below 1.
        average_trials: Whether to average over the trials.
        num_draws: Number of draws under each of the parameters, at least 2.

    Returns:
        The difference per step, cumulative, average and relative, and the counterfactual outcome itself, each with what remains
        unknown of the trials and the uncertainty of the parameters apart and together.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, draws are not those of a model like `model`, a window is
            empty, or no coupling is known for the emission model; the message names the argument.

    References:
        Pearl (2009), *Causality*, theorem 7.1.7; Lewis & Shedler (1979), *Naval Research Logistics* 26 (thinning).

    Examples:
        >>> import jax, numpy as np, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[1.0]], [0.5])
        >>> model = issm.SSM(linear.initial, linear.dynamics, issm.PoissonEmission(issm.LinearMap([[1.0]])))
        >>> counts = np.array([[1.0], [4.0], [2.0]])
        >>> plan = issm.do({0: 3.0}, num_timesteps=3, state_dim=1, start=1)
        >>> effect = issm.sample_counterfactual_effect(jax.random.key(0), model, counts, plan, num_draws=20)
        >>> effect.mean.shape, effect.mean[0].tolist()
        ((3, 1), [0.0])
    """
    trials, scenario = check_question(key, model, emissions, plan, interventions, inputs, num_draws)
    check_average(average_trials, not trials.one_sequence, "emissions with a trial axis")
    readout, steps = as_readout(companion(model), of), as_window(scenario, window)
    draws, dtype = as_model_draws(model, parameters), model.initial.mean.dtype
    z = quantile_of_level(level, dtype)
    level = to_device(level, dtype)
    return _effect(key, model, draws, trials, scenario, readout, steps, z, level, num_draws, bool(average_trials))


@eqx.filter_jit
def _effect(
    key: PRNGKey,
    model: SSM,
    draws: SSM | None,
    trials: Trials,
    scenario: Scenario,
    readout: Readout,
    window: Bool[Array, "*trials num_timesteps 1"],
    z: Float[Array, ""],
    level: Float[Array, ""],
    num_draws: int,
    average_trials: bool,
) -> CounterfactualEffect:
    def of_model(key: PRNGKey, model: SSM) -> tuple[Array, Array]:
        states, others, own, counterfactual = draw_both_worlds(key, model, trials, scenario, num_draws)
        was, would = (states, others) if readout.of == "states" else (own, counterfactual)
        shape = jnp.broadcast_shapes(was.shape, would.shape)
        return read(readout, jnp.broadcast_to(was, shape)), read(readout, would)

    was, would = over_models(key, model, draws, of_model)
    found = summarise_worlds(was, would, window, z, known=draws is None, average_trials=average_trials)
    return CounterfactualEffect(
        found.per_step, found.cumulative, found.average, found.relative, level, found.outcome, found.average_outcome
    )
