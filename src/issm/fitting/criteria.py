"""Akaike's and Schwarz's criteria, with a parameter count that leaves out what no data can tell."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from issm._check import fail
from issm._host import is_concrete
from issm.inference.kalman import marginal_log_prob
from issm.interventions import Intervention
from issm.models.fields import TimeVarying, is_diagonal
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import as_trials


class InformationCriteria(eqx.Module):
    r"""Fit and size of a model; the smaller a criterion, the better.

    Attributes:
        log_prob: $\log p(y \mid do(\cdot), u)$ over all trials, nats.
        num_params: Number p of parameters that the data can tell apart.
        num_steps: Number n of steps with an observed entry, over all trials.
        aic: $2 p - 2 \log p(y)$.
        bic: $p \log n - 2 \log p(y)$.

    References:
        Akaike (1974); Schwarz (1978).

    Examples:
        >>> import numpy as np, issm
        >>> level = issm.make_lgssm_params(0.0, 1.0, 1.0, 1.0, 1.0, 1.0)
        >>> issm.information_criteria(level, np.zeros((10, 1))).num_steps
        10
    """

    log_prob: Float[Array, ""]
    num_params: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    aic: Float[Array, ""]
    bic: Float[Array, ""]


def information_criteria(
    params: ParamsLGSSM, emissions: Any, inputs: Any = None, *, interventions: Intervention | None = None
) -> InformationCriteria:
    r"""AIC and BIC of a model fitted to these data by maximum likelihood.

    The count p leaves out the coordinates of the states: any invertible map of the states that are never clamped, and any shift
    of them, gives the same likelihood ($D^2 + D$ parameters without clamps and with full covariances; with a diagonal Q or S
    fewer, because part of that freedom has been used up). A state that is only ever held at one value keeps one such freedom
    (scale about that value), one held at two values none. Fields that are `TimeVarying` are taken as known.

    Args:
        params: The fitted model.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or with a leading trial axis; NaN is missing.
        inputs: Soft inputs, shared or one array for each trial.
        interventions: Clamps, shared or one for each trial.

    Returns:
        The criteria, with the log-likelihood and the counts behind them.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, or the data or clamps are traced by JAX.

    References:
        Akaike (1974); Schwarz (1978); Durbin & Koopman (2012), sec. 7.4.

    Examples:
        >>> import numpy as np, issm
        >>> full = np.eye(2)
        >>> params = issm.make_lgssm_params(np.zeros(2), full, 0.5 * full, full, np.ones((3, 2)), np.ones(3))
        >>> issm.information_criteria(params, np.zeros((10, 3))).num_params  # 2+3 + 4+2+3 + 6+3+3 - (4+2)
        20
    """
    trials = as_trials(params, emissions, inputs, interventions)
    mask = trials.plan.intervention.mask
    if not (is_concrete(mask) and is_concrete(trials.emissions)):
        fail(
            "emissions, interventions",
            got="arrays that JAX traces",
            expected="concrete ones",
            remedy="Count outside `jit`.",
        )
    log_prob = jnp.sum(marginal_log_prob(params, emissions, inputs, interventions=interventions))
    num_params = count_params(params, trials.plan.intervention)
    num_steps = int((~np.isnan(np.asarray(trials.emissions))).any(axis=2).sum())
    bic = num_params * float(np.log(num_steps)) - 2 * log_prob
    return InformationCriteria(log_prob, num_params, num_steps, 2 * num_params - 2 * log_prob, bic)


def count_params(params: ParamsLGSSM, interventions: Intervention) -> int:
    """Free parameters less those that only choose coordinates."""
    mask = np.asarray(interventions.mask).reshape(-1, interventions.num_timesteps, params.state_dim)
    started = int((~mask[:, 0]).any(axis=0).sum())  # states that are free at the first step of some trial
    moved = int((~mask[:, 1:]).any(axis=(0, 1)).sum())
    initial, dynamics, emissions = params.initial, params.dynamics, params.emissions
    state_dim, emission_dim, input_dim = params.state_dim, params.emission_dim, params.input_dim
    free = [
        (initial.mean, started),
        (initial.cov, _cov_size(initial.cov, started)),
        (dynamics.weights, moved * state_dim),
        (dynamics.bias, moved),
        (dynamics.input_weights, moved * input_dim),
        (dynamics.cov, _cov_size(dynamics.cov, moved)),
        (emissions.weights, emission_dim * state_dim),
        (emissions.bias, emission_dim),
        (emissions.input_weights, emission_dim * input_dim),
        (emissions.cov, _cov_size(emissions.cov, emission_dim)),
    ]
    total = sum(size for field, size in free if not isinstance(field, TimeVarying))
    known = (dynamics.weights, dynamics.bias, dynamics.input_weights, dynamics.cov, emissions.weights, emissions.bias)
    if any(isinstance(field, TimeVarying) for field in known):
        return total
    return total - _num_invariances(interventions, is_diagonal(initial.cov), is_diagonal(dynamics.cov))


def _cov_size(cov: Array | TimeVarying, dim: int) -> int:
    return dim if is_diagonal(cov) else dim * (dim + 1) // 2


def _num_invariances(interventions: Intervention, initial_diagonal: bool, dynamics_diagonal: bool) -> int:
    """Dimension of the group of coordinate changes that keep the clamps and the form of the covariances."""
    mask, value, variance = (np.asarray(a) for a in (interventions.mask, interventions.value, interventions.variance))
    levels = [len(np.unique(value[..., i][mask[..., i]])) for i in range(mask.shape[-1])]
    noisy = [bool((variance[..., i][mask[..., i]] > 0).any()) for i in range(mask.shape[-1])]
    never = levels.count(0)
    once = sum(count == 1 and not noise for count, noise in zip(levels, noisy, strict=True))
    # Diagonal covariances: whitening one leaves rotations, and a second diagonal one leaves none of them.
    rotations = never * (never - 1) // 2
    diagonal = initial_diagonal + dynamics_diagonal
    return never**2 - rotations * diagonal + never + once
