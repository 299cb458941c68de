"""The Kalman filter of the clamped linear Gaussian model, and its marginal likelihood."""

from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from issm._compile import QUICKER, jit_quickly
from issm.inference.likelihood import log_likelihoods
from issm.inference.methods import check_method, choose_method, filter_and_smooth
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials, as_trials


class PosteriorGSSMFiltered(eqx.Module):
    r"""Result of `lgssm_filter`; every field has the leading trial axis of the data, if they have one.

    Attributes:
        marginal_loglik: $\log p(y_{0:T-1} \mid do(\cdot), u)$, `()`.
        filtered_means: $E[x_t \mid y_{0:t}]$, `(num_timesteps, state_dim)`.
        filtered_covariances: $Cov[x_t \mid y_{0:t}]$, `(num_timesteps, state_dim, state_dim)`.
        predicted_means: $E[x_t \mid y_{0:t-1}]$; at t = 0 the (clamped) initial distribution.
        predicted_covariances: $Cov[x_t \mid y_{0:t-1}]$.
        logliks: $\log p(y_t \mid y_{0:t-1})$, `(num_timesteps,)`; zero where nothing was observed.
        filtered_covariances_by_pattern: The filtered covariances as they are held: trials with the same clamps and missing entries
            share theirs, `(num_patterns, num_timesteps, state_dim, state_dim)`, without the leading axis for one sequence.
            `filtered_covariances` is made from them when it is asked for.
        predicted_covariances_by_pattern: The same for the predicted covariances.
        pattern: The pattern of each trial, `(num_trials,)`; None where there is one pattern, or where each trial has its own.

    References:
        Särkkä & Svensson (2023), theorem 6.6.

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> type(issm.lgssm_filter(params, np.zeros((4, 1)))).__name__
        'PosteriorGSSMFiltered'
    """

    marginal_loglik: Float[Array, "*trials"]
    filtered_means: Float[Array, "*trials num_timesteps state_dim"]
    predicted_means: Float[Array, "*trials num_timesteps state_dim"]
    logliks: Float[Array, "*trials num_timesteps"]
    filtered_covariances_by_pattern: Float[Array, "*patterns num_timesteps state_dim state_dim"]
    predicted_covariances_by_pattern: Float[Array, "*patterns num_timesteps state_dim state_dim"]
    pattern: Int[Array, "*trials"] | None

    @property
    def filtered_covariances(self) -> Float[Array, "*trials num_timesteps state_dim state_dim"]:
        """$Cov[x_t | y_{0:t}]$ of every trial."""
        return self._of_trials(self.filtered_covariances_by_pattern)

    @property
    def predicted_covariances(self) -> Float[Array, "*trials num_timesteps state_dim state_dim"]:
        """$Cov[x_t | y_{0:t-1}]$ of every trial."""
        return self._of_trials(self.predicted_covariances_by_pattern)

    def _of_trials(self, covs: Array) -> Array:
        if self.pattern is not None:
            covs = jnp.take_along_axis(covs, self.pattern[..., None, None, None], axis=-4)
        return jnp.broadcast_to(covs, (*self.filtered_means.shape[:-2], *covs.shape[-3:]))


def lgssm_filter(
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    method: str = "auto",
) -> PosteriorGSSMFiltered:
    r"""Exact filtering under clamps: $p(x_t \mid y_{0:t}, do(\cdot), u)$.

    Predict: $m^- = A_t m + a_t,\ P^- = A_t P A_t^\top + Q_t$. Update with $J_t = C^\top R^{-1} C$ over the observed rows:
    $P = (I + P^- J)^{-1} P^-,\ m = m^- + P (h - J m^-)$. All of it holds for singular $P^-$.

    Args:
        params: Model parameters.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, `(num_timesteps, input_dim)`, or one such array for each trial. Entry t acts on the arrival
            in $x_t$ and on $y_t$.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        method: "sequential" (a scan over time), "parallel" (scans of logarithmic depth, for accelerators), "sqrt" (square roots
            in place of covariances, exact where noise is tiny or a prior wide, and in single precision), or "auto", which chooses.

    Returns:
        Filtered and predicted moments, and the log-likelihood with its terms, with the leading axes of `emissions`.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Särkkä & Svensson (2023), theorem 6.6; Nejatbakhsh & Wang (2025), sec. 2 for the clamps.

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> plan = issm.do({0: 2.0}, num_timesteps=4, state_dim=1, start=2, stop=3)
        >>> posterior = issm.lgssm_filter(params, np.zeros((4, 1)), interventions=plan)
        >>> posterior.filtered_means[2].tolist()
        [2.0]
    """
    check_method(method)
    trials = as_trials(params, emissions, inputs, interventions)
    return _filter(params, trials, choose_method(method, params, trials))


def marginal_log_prob(
    params: ParamsLGSSM, emissions: Any, inputs: Any = None, *, interventions: Intervention | None = None
) -> Float[Array, "*trials"]:
    r"""Log-likelihood $\log p(y \mid do(\cdot), u)$, states integrated out.

    Args:
        params: Model parameters.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or with a leading trial axis; NaN is missing.
        inputs: Soft inputs, `(num_timesteps, input_dim)`, shared or one such array for each trial.
        interventions: Clamps, shared or one for each trial.

    Returns:
        One number for a sequence `()`, one for each trial `(num_trials,)`.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Särkkä & Svensson (2023), theorem 16.1 (prediction error decomposition).

    Examples:
        >>> import numpy as np, issm
        >>> level = issm.make_lgssm_params(0.0, 1.0, 1.0, 1.0, 1.0, 1.0)
        >>> round(float(issm.marginal_log_prob(level, np.zeros((1, 1)))), 4)  # y_0 ~ N(0, 2)
        -1.2655
    """
    trials = as_trials(params, emissions, inputs, interventions)
    return _marginal_log_prob(params, trials, choose_method("auto", params, trials))


@partial(jit_quickly, static_argnames="method", options=QUICKER)
def _filter(params: ParamsLGSSM, trials: Trials, method: str) -> PosteriorGSSMFiltered:
    moments = filter_and_smooth(params, trials, method)
    return trials.like_user(
        PosteriorGSSMFiltered(
            marginal_loglik=moments.logliks.sum(axis=1),
            filtered_means=moments.filtered_means,
            predicted_means=moments.predicted_means,
            logliks=moments.logliks,
            filtered_covariances_by_pattern=moments.filtered_covs,
            predicted_covariances_by_pattern=moments.predicted_covs,
            pattern=trials.pattern,
        )
    )


@partial(jit_quickly, static_argnames="method", options=QUICKER)
def _marginal_log_prob(params: ParamsLGSSM, trials: Trials, method: str) -> Float[Array, "*trials"]:
    return trials.like_user(log_likelihoods(params, trials, method))
