r"""The smoother of the clamped linear Gaussian model.

Written with the adjoints of the predicted moments (Bryson-Frazier, Durbin-Koopman), which divide by no predicted covariance
and are therefore exact for perfect clamps, singular Q and a known start.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from issm._linalg import symmetrize
from issm.inference.kalman import FilterPass, check_method, filtered_posterior, run_filter
from issm.inference.observations import whiten
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import Transitions, lgssm_transitions
from issm.models.trials import Trials, as_trials


class PosteriorGSSMSmoothed(eqx.Module):
    r"""Result of `lgssm_smoother`; every field has the leading trial axis of the data, if they have one.

    Attributes:
        marginal_loglik: $\log p(y_{0:T-1} \mid do(\cdot), u)$, `()`.
        filtered_means: $E[x_t \mid y_{0:t}]$, `(num_timesteps, state_dim)`.
        filtered_covariances: $Cov[x_t \mid y_{0:t}]$, `(num_timesteps, state_dim, state_dim)`.
        predicted_means: $E[x_t \mid y_{0:t-1}]$; at t = 0 the (clamped) initial distribution.
        predicted_covariances: $Cov[x_t \mid y_{0:t-1}]$.
        logliks: $\log p(y_t \mid y_{0:t-1})$, `(num_timesteps,)`.
        smoothed_means: $E[x_t \mid y_{0:T-1}]$, `(num_timesteps, state_dim)`.
        smoothed_covariances: $Cov[x_t \mid y_{0:T-1}]$, `(num_timesteps, state_dim, state_dim)`.
        smoothed_cross_covariances: $Cov[x_t, x_{t+1} \mid y_{0:T-1}]$, `(num_timesteps - 1, state_dim, state_dim)`.

    References:
        Durbin & Koopman (2012), sec. 4.4; Särkkä & Svensson (2023), theorem 12.2.

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> issm.lgssm_smoother(params, np.zeros((4, 1))).smoothed_cross_covariances.shape
        (3, 1, 1)
    """

    marginal_loglik: Float[Array, "*trials"]
    filtered_means: Float[Array, "*trials num_timesteps state_dim"]
    filtered_covariances: Float[Array, "*trials num_timesteps state_dim state_dim"]
    predicted_means: Float[Array, "*trials num_timesteps state_dim"]
    predicted_covariances: Float[Array, "*trials num_timesteps state_dim state_dim"]
    logliks: Float[Array, "*trials num_timesteps"]
    smoothed_means: Float[Array, "*trials num_timesteps state_dim"]
    smoothed_covariances: Float[Array, "*trials num_timesteps state_dim state_dim"]
    smoothed_cross_covariances: Float[Array, "*trials num_timesteps_minus_1 state_dim state_dim"]


def lgssm_smoother(
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    method: str = "auto",
) -> PosteriorGSSMSmoothed:
    r"""Exact smoothing under clamps: $p(x_t, x_{t+1} \mid y_{0:T-1}, do(\cdot), u)$.

    With the filter's $q_t, F_t, V_t$ (see the concepts page), backwards from $r_{T} = 0, N_{T} = 0$:
    $r_t = q_t + V_t^\top A_{t+1}^\top r_{t+1}$, $N_t = F_t + V_t^\top A_{t+1}^\top N_{t+1} A_{t+1} V_t$, and then
    $m_t^s = m_t + P_t A_{t+1}^\top r_{t+1}$, $P_t^s = P_t - P_t A_{t+1}^\top N_{t+1} A_{t+1} P_t$,
    $Cov[x_t, x_{t+1} \mid y] = P_t A_{t+1}^\top (I - N_{t+1} P_{t+1}^-)$. The rows of $A_{t+1}$ that belong to clamped states
    are zero: a clamped state sends no information backwards.

    Args:
        params: Model parameters.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, `(num_timesteps, input_dim)`, or one such array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        method: "sequential" (a scan over time) or "auto", which chooses.

    Returns:
        Filtered and smoothed moments, with the leading axes of `emissions`.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Durbin & Koopman (2012), sec. 4.4 and 4.7; Nejatbakhsh & Wang (2025), sec. 2 for the clamps.

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> plan = issm.do({0: 2.0}, num_timesteps=4, state_dim=1, start=2, stop=3)
        >>> posterior = issm.lgssm_smoother(params, np.zeros((4, 1)), interventions=plan)
        >>> posterior.smoothed_means[2].tolist(), posterior.smoothed_covariances[2].tolist()
        ([2.0], [[0.0]])
    """
    check_method(method)
    return _smoother(params, as_trials(params, emissions, inputs, interventions))


@jax.jit
def _smoother(params: ParamsLGSSM, trials: Trials) -> PosteriorGSSMSmoothed:
    def one(emissions: Array, inputs: Array, intervention: Intervention) -> PosteriorGSSMSmoothed:
        return smooth_sequence(params, emissions, inputs, intervention, may_miss=trials.may_miss)

    return trials.map(one)


def smooth_sequence(
    params: ParamsLGSSM,
    emissions: Float[Array, "num_timesteps emission_dim"],
    inputs: Float[Array, "num_timesteps input_dim"],
    intervention: Intervention,
    *,
    may_miss: bool,
) -> PosteriorGSSMSmoothed:
    """Filter and smooth one sequence; `may_miss` is false when no emission can be NaN."""
    transitions = lgssm_transitions(params, inputs, intervention)
    whitened = whiten(params, emissions, inputs, may_miss=may_miss)
    steps = run_filter(transitions, whitened.reduce())
    filtered = filtered_posterior(steps, whitened)
    means, covs, cross_covs = run_smoother(transitions, steps)
    return PosteriorGSSMSmoothed(
        **vars(filtered), smoothed_means=means, smoothed_covariances=covs, smoothed_cross_covariances=cross_covs
    )


def run_smoother(transitions: Transitions, steps: FilterPass) -> tuple[Array, Array, Array]:
    """The backward recursion over one sequence: smoothed means, covariances and cross covariances."""
    state_dim, dtype = transitions.shift.shape[-1], transitions.shift.dtype

    def step(
        carry: tuple[Array, Array, Array], at: tuple
    ) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
        adjoint, information, next_weights_and_predicted = carry
        next_weights, next_predicted_cov = next_weights_and_predicted
        here, weights = at
        cov_next = here.covs @ next_weights.T  # Cov[x_t, x_{t+1} | y_{0:t}]
        mean = here.means + cov_next @ adjoint
        cov = symmetrize(here.covs - cov_next @ information @ cov_next.T)
        cross_cov = cov_next - cov_next @ information @ next_predicted_cov
        propagated = next_weights @ here.retained
        adjoint = here.score + propagated.T @ adjoint
        information = symmetrize(here.information + propagated.T @ information @ propagated)
        return (adjoint, information, (weights, here.predicted_covs)), (mean, cov, cross_cov)

    zeros = jnp.zeros((state_dim, state_dim), dtype)
    end = (jnp.zeros(state_dim, dtype), zeros, (zeros, zeros))
    _, (means, covs, cross_covs) = lax.scan(step, end, (steps, transitions.weights), reverse=True)
    return means, covs, cross_covs[:-1]
