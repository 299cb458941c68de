"""The smoother of the clamped linear Gaussian model."""

from functools import partial
from typing import Any

from jaxtyping import Array, Float

from issm._compile import QUICKER, jit_quickly
from issm.inference.kalman import PosteriorGSSMFiltered
from issm.inference.methods import check_method, choose_method, filter_and_smooth
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials, as_trials


class PosteriorGSSMSmoothed(PosteriorGSSMFiltered):
    r"""Result of `lgssm_smoother`: that of `lgssm_filter`, and the smoothed moments.

    Every field has the leading trial axis of the data, if they have one.

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
        filtered_covariances_by_pattern: The covariances as they are held, see `PosteriorGSSMFiltered`.
        predicted_covariances_by_pattern: The same for the predicted ones.
        smoothed_covariances_by_pattern: The same for the smoothed ones.
        smoothed_cross_covariances_by_pattern: The same for the smoothed cross-covariances.
        pattern: The pattern of each trial, or None, see `PosteriorGSSMFiltered`.

    References:
        Durbin & Koopman (2012), sec. 4.4; Särkkä & Svensson (2023), theorem 12.2.

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> issm.lgssm_smoother(params, np.zeros((4, 1))).smoothed_cross_covariances.shape
        (3, 1, 1)
    """

    smoothed_means: Float[Array, "*trials num_timesteps state_dim"]
    smoothed_covariances_by_pattern: Float[Array, "*patterns num_timesteps state_dim state_dim"]
    smoothed_cross_covariances_by_pattern: Float[Array, "*patterns num_timesteps_minus_1 state_dim state_dim"]

    @property
    def smoothed_covariances(self) -> Float[Array, "*trials num_timesteps state_dim state_dim"]:
        """$Cov[x_t | y_{0:T-1}]$ of every trial."""
        return self._of_trials(self.smoothed_covariances_by_pattern)

    @property
    def smoothed_cross_covariances(self) -> Float[Array, "*trials num_timesteps_minus_1 state_dim state_dim"]:
        """$Cov[x_t, x_{t+1} | y_{0:T-1}]$ of every trial."""
        return self._of_trials(self.smoothed_cross_covariances_by_pattern)


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
        method: "sequential" (a scan over time), "parallel" (scans of logarithmic depth, for accelerators), "sqrt" (square roots
            in place of covariances, exact where noise is tiny or a prior wide, and in single precision), or "auto", which chooses.

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
    trials = as_trials(params, emissions, inputs, interventions)
    return _smoother(params, trials, choose_method(method, params, trials))


@partial(jit_quickly, static_argnames="method", options=QUICKER)
def _smoother(params: ParamsLGSSM, trials: Trials, method: str) -> PosteriorGSSMSmoothed:
    moments = filter_and_smooth(params, trials, method)
    return trials.like_user(
        PosteriorGSSMSmoothed(
            marginal_loglik=moments.logliks.sum(axis=1),
            filtered_means=moments.filtered_means,
            predicted_means=moments.predicted_means,
            logliks=moments.logliks,
            filtered_covariances_by_pattern=moments.filtered_covs,
            predicted_covariances_by_pattern=moments.predicted_covs,
            pattern=trials.pattern,
            smoothed_means=moments.smoothed_means,
            smoothed_covariances_by_pattern=moments.smoothed_covs,
            smoothed_cross_covariances_by_pattern=moments.smoothed_cross_covs,
        )
    )
