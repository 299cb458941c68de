"""Joint draws of the states given the emissions."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from issm._check import check_key, fail
from issm._compile import jit_quickly
from issm._types import PRNGKey
from issm.inference.methods import choose_method, filter_and_smooth
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.sampling import sample_sequence
from issm.models.trials import Trials, as_trials


def posterior_sample(
    key: PRNGKey,
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    num_samples: int = 1,
) -> Float[Array, "*trials num_samples num_timesteps state_dim"]:
    r"""Draw whole state paths from $p(x_{0:T-1} \mid y_{0:T-1}, do(\cdot), u)$.

    Draws $(x^+, y^+)$ from the model with the data's missing entries, and corrects its mean:
    $x^+ + E[x - x^+ \mid y - y^+]$, differences following the model without its offsets. Exact, and no covariance is factorised.

    Args:
        key: JAX random key.
        params: Model parameters.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or with a leading trial axis; NaN is missing.
        inputs: Soft inputs, `(num_timesteps, input_dim)`, shared or one such array for each trial.
        interventions: Clamps, shared or one for each trial.
        num_samples: Number of draws for each trial, at least 1.

    Returns:
        Draws `(num_samples, num_timesteps, state_dim)`, with the leading trial axis of `emissions` before them if there is one.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Durbin & Koopman (2002), *Biometrika* 89, sec. 2.2 (simulation smoother).

    Examples:
        >>> import jax, numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> issm.posterior_sample(jax.random.key(0), params, np.zeros((2, 4, 1)), num_samples=3).shape
        (2, 3, 4, 1)
    """
    check_key(key)
    if isinstance(num_samples, bool) or not isinstance(num_samples, (int, np.integer)) or num_samples < 1:
        fail(
            "num_samples",
            got=repr(num_samples),
            expected="an integer of at least 1",
            remedy="Give the number of draws.",
        )
    trials = as_trials(params, emissions, inputs, interventions)
    return _posterior_sample(key, params, trials, num_samples, choose_method("auto", params, trials))


@partial(jit_quickly, static_argnames=("num_samples", "method"))
def _posterior_sample(key: PRNGKey, params: ParamsLGSSM, trials: Trials, num_samples: int, method: str) -> Array:
    draw = lambda key: draw_states(key, params, trials, method)  # noqa: E731
    return trials.like_user(jax.vmap(draw, out_axes=1)(jax.random.split(key, num_samples)))


def draw_states(
    key: PRNGKey, params: ParamsLGSSM, trials: Trials, method: str
) -> Float[Array, "num_trials num_timesteps state_dim"]:
    """One path for every trial."""
    axes = trials.plan.axes
    draw = jax.vmap(sample_sequence, in_axes=(0, None, axes.inputs, axes.intervention))
    keys = jax.random.split(key, trials.num_trials)
    states, emissions = draw(keys, params, trials.plan.inputs, trials.plan.intervention)
    differences = eqx.tree_at(
        lambda t: (t.emissions, t.plan.intervention.value),
        trials,
        (trials.emissions - emissions, jnp.zeros_like(trials.plan.intervention.value)),
    )
    return states + filter_and_smooth(_without_offsets(params), differences, method).smoothed_means


def _without_offsets(params: ParamsLGSSM) -> ParamsLGSSM:
    """The model of differences between two paths."""
    offsets = lambda p: (  # noqa: E731
        p.initial.mean,
        p.dynamics.bias,
        p.dynamics.input_weights,
        p.emissions.bias,
        p.emissions.input_weights,
    )
    return eqx.tree_at(offsets, params, jax.tree.map(jnp.zeros_like, offsets(params)))
