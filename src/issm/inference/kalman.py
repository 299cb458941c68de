r"""The Kalman filter of the clamped linear Gaussian model, and its marginal likelihood.

No covariance is ever inverted: a perfect clamp, a known start and a singular Q are ordinary values here. Jitter is not used.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from issm._check import fail
from issm._linalg import symmetrize
from issm.inference.observations import Potential, Rows, WhitenedEmissions, whiten
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import Transitions, lgssm_transitions
from issm.models.trials import Trials, as_trials

METHODS = ("auto", "sequential")


class PosteriorGSSMFiltered(eqx.Module):
    r"""Result of `lgssm_filter`; every field has the leading trial axis of the data, if they have one.

    Attributes:
        marginal_loglik: $\log p(y_{0:T-1} \mid do(\cdot), u)$, `()`.
        filtered_means: $E[x_t \mid y_{0:t}]$, `(num_timesteps, state_dim)`.
        filtered_covariances: $Cov[x_t \mid y_{0:t}]$, `(num_timesteps, state_dim, state_dim)`.
        predicted_means: $E[x_t \mid y_{0:t-1}]$; at t = 0 the (clamped) initial distribution.
        predicted_covariances: $Cov[x_t \mid y_{0:t-1}]$.
        logliks: $\log p(y_t \mid y_{0:t-1})$, `(num_timesteps,)`; zero where nothing was observed.

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
    filtered_covariances: Float[Array, "*trials num_timesteps state_dim state_dim"]
    predicted_means: Float[Array, "*trials num_timesteps state_dim"]
    predicted_covariances: Float[Array, "*trials num_timesteps state_dim state_dim"]
    logliks: Float[Array, "*trials num_timesteps"]


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
        method: "sequential" (a scan over time) or "auto", which chooses.

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
    return _filter(params, as_trials(params, emissions, inputs, interventions))


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
        >>> float(issm.marginal_log_prob(level, np.zeros((1, 1)))) == float(np.float32(-0.5 * np.log(2 * np.pi * 2)))
        True
    """
    return _marginal_log_prob(params, as_trials(params, emissions, inputs, interventions))


def check_method(method: str) -> None:
    """Refuse a method that does not exist."""
    if method not in METHODS:
        fail(
            "method",
            got=repr(method),
            expected=f"one of {', '.join(map(repr, METHODS))}",
            remedy='"auto" chooses for you.',
        )


@jax.jit
def _filter(params: ParamsLGSSM, trials: Trials) -> PosteriorGSSMFiltered:
    def one(emissions: Array, inputs: Array, intervention: Intervention) -> PosteriorGSSMFiltered:
        transitions = lgssm_transitions(params, inputs, intervention)
        whitened = whiten(params, emissions, inputs, may_miss=trials.may_miss)
        return filtered_posterior(run_filter(transitions, whitened.reduce()), whitened)

    return trials.map(one)


@jax.jit
def _marginal_log_prob(params: ParamsLGSSM, trials: Trials) -> Float[Array, "*trials"]:
    return _filter(params, trials).marginal_loglik


class FilterPass(eqx.Module):
    r"""Everything that the backward pass needs; all fields with a leading time axis.

    Attributes:
        means, covs: Filtered moments $m_t, P_t$.
        predicted_means, predicted_covs: $m_t^-, P_t^-$.
        score: $q_t = \partial \log p(y_t \mid past) / \partial m_t^- = U^\top S^{-1} v$.
        information: $F_t = U^\top S^{-1} U$, its expected negative derivative.
        retained: $V_t = I - K_t U = (I + P_t^- J_t)^{-1}$, the share of a prediction error that the update leaves.
        log_det: $\log |I + P_t^- J_t|$.
    """

    means: Array
    covs: Array
    predicted_means: Array
    predicted_covs: Array
    score: Array
    information: Array
    retained: Array
    log_det: Array


def run_filter(transitions: Transitions, observations: Rows | Potential) -> FilterPass:
    """The recursion over one sequence."""
    state_dim = transitions.shift.shape[-1]
    update = _update_with_rows if isinstance(observations, Rows) else _update_with_potential

    def step(carry: tuple[Array, Array], at: tuple) -> tuple[tuple[Array, Array], FilterPass]:
        mean, cov = carry
        transition, observation = at
        predicted_mean = transition.weights @ mean + transition.shift
        predicted_cov = symmetrize(transition.weights @ cov @ transition.weights.T + transition.cov)
        done = update(predicted_mean, predicted_cov, observation)
        return (done.means, done.covs), done

    start = (jnp.zeros(state_dim, transitions.shift.dtype), jnp.zeros((state_dim, state_dim), transitions.shift.dtype))
    _, steps = lax.scan(step, start, (transitions, observations))
    return steps


def filtered_posterior(steps: FilterPass, whitened: WhitenedEmissions) -> PosteriorGSSMFiltered:
    r"""The public result of a filter pass.

    The quadratic form of the log-likelihood is a sum of two squares, $\|z - U m\|^2 + q^\top P^- q$ (residuals after the
    update, and what the update cost), so that nothing cancels when the noise is small.
    """
    residuals = whitened.residuals(steps.means)
    cost = jnp.einsum("ti,tij,tj->t", steps.score, steps.predicted_covs, steps.score)
    logliks = whitened.log_norm - (steps.log_det + (residuals**2).sum(axis=1) + cost) / 2
    return PosteriorGSSMFiltered(
        marginal_loglik=logliks.sum(),
        filtered_means=steps.means,
        filtered_covariances=steps.covs,
        predicted_means=steps.predicted_means,
        predicted_covariances=steps.predicted_covs,
        logliks=logliks,
    )


def _update_with_rows(mean: Array, cov: Array, rows: Rows) -> FilterPass:
    """Innovation form with $S = I + U P^- U^T$, which is never singular, and Joseph's form for the covariance."""
    weights = rows.weights
    cov_weights = cov @ weights.T
    factor = jnp.linalg.cholesky(symmetrize(weights @ cov_weights) + jnp.eye(weights.shape[0], dtype=cov.dtype))
    solved = jax.scipy.linalg.cho_solve((factor, True), jnp.column_stack([weights, rows.values - weights @ mean]))
    information, score = symmetrize(weights.T @ solved[:, :-1]), weights.T @ solved[:, -1]
    gain = cov @ solved[:, :-1].T
    retained = jnp.eye(cov.shape[0], dtype=cov.dtype) - gain @ weights
    return FilterPass(
        means=mean + cov @ score,
        covs=symmetrize(retained @ cov @ retained.T + gain @ gain.T),
        predicted_means=mean,
        predicted_covs=cov,
        score=score,
        information=information,
        retained=retained,
        log_det=2 * jnp.log(jnp.diagonal(factor)).sum(),
    )


def _update_with_potential(mean: Array, cov: Array, potential: Potential) -> FilterPass:
    r"""Information form $P = (I + P^- J)^{-1} P^-$, whose matrix is never singular."""
    eye = jnp.eye(cov.shape[0], dtype=cov.dtype)
    lu, pivots = jax.scipy.linalg.lu_factor(eye + cov @ potential.precision)
    retained = jax.scipy.linalg.lu_solve((lu, pivots), eye)
    score = retained.T @ (potential.shift - potential.precision @ mean)
    return FilterPass(
        means=mean + cov @ score,
        covs=symmetrize(retained @ cov),
        predicted_means=mean,
        predicted_covs=cov,
        score=score,
        information=symmetrize(potential.precision @ retained),
        retained=retained,
        log_det=jnp.log(jnp.abs(jnp.diagonal(lu))).sum(),
    )
