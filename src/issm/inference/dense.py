r"""Filter and smoother of one sequence, in the plain form of the textbooks.

The form for more states than `recursions` unrolls, and the one that is differentiated: every step is smooth in its
arguments, also where an emission is missing or does not see a state. No covariance is inverted: a perfect clamp, a known
start and a singular Q are ordinary values here. The backward pass carries the adjoints of the predicted moments
(Bryson-Frazier, Durbin-Koopman), which divide by no predicted covariance.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm._linalg import symmetrize
from issm.inference.moments import Moments
from issm.inference.observations import Potential, Rows, WhitenedEmissions, whiten
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import Transitions, lgssm_transitions
from issm.models.trials import Trials

COVARIANCES = ("filtered_covs", "predicted_covs", "informations", "smoothed_covs", "smoothed_cross_covs")


def dense_moments(params: ParamsLGSSM, trials: Trials) -> Moments:
    """Filter and smooth every trial."""

    def one(emissions: Array, inputs: Array, intervention: Intervention) -> tuple[dict[str, Array], dict[str, Array]]:
        transitions = lgssm_transitions(params, inputs, intervention)
        moments = vars(sequence_moments(transitions, whiten(params, emissions, inputs, may_miss=trials.may_miss)))
        covs = {name: moments[name] for name in COVARIANCES}
        return {name: moments[name] for name in moments if name not in covs}, covs

    # Where all trials share them by construction, no trial has covariances, or derivatives of them, of its own.
    plan = trials.plan
    shared = not trials.may_miss and plan.intervention.mask.ndim == 2
    over_trials = jax.vmap(
        one, in_axes=(0, plan.axes.inputs, plan.axes.intervention), out_axes=(0, None if shared else 0)
    )
    by_trial, covs = over_trials(trials.emissions, plan.inputs, plan.intervention)
    chosen = (lambda cov: cov[None]) if shared else (lambda cov: cov[trials.representatives])
    return Moments(**by_trial, **jax.tree.map(chosen, covs))


def sequence_moments(transitions: Transitions, whitened: WhitenedEmissions) -> Moments:
    """Filter and smooth one sequence; the result has no axis for trials or patterns."""
    steps = run_filter(transitions, whitened.reduce())
    backward = run_smoother(transitions, steps)
    return Moments(
        logliks=step_logliks(steps, whitened),
        filtered_means=steps.means,
        filtered_covs=steps.covs,
        predicted_means=steps.predicted_means,
        predicted_covs=steps.predicted_covs,
        adjoints=backward.adjoints,
        informations=backward.informations,
        smoothed_means=backward.means,
        smoothed_covs=backward.covs,
        smoothed_cross_covs=backward.cross_covs[:-1],
    )


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


def step_logliks(steps: FilterPass, whitened: WhitenedEmissions) -> Array:
    r"""$\log p(y_t \mid past)$ at every step.

    The quadratic form is a sum of two squares, $\|z - U m\|^2 + q^\top P^- q$ (residuals after the update, and what the
    update cost), so that nothing cancels when the noise is small.
    """
    residuals = whitened.residuals(steps.means)
    cost = jnp.einsum("ti,tij,tj->t", steps.score, steps.predicted_covs, steps.score)
    return whitened.log_norm - (steps.log_det + (residuals**2).sum(axis=1) + cost) / 2


class BackwardPass(eqx.Module):
    r"""Smoothed moments and the adjoints $r_t, N_t$ of the predicted ones; all fields with a leading time axis.

    `cross_covs` has an entry for every step; the last, which has no successor, is zero.
    """

    means: Array
    covs: Array
    cross_covs: Array
    adjoints: Array
    informations: Array


def run_filter(transitions: Transitions, observations: Rows | Potential) -> FilterPass:
    """The forward recursion over one sequence."""
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
    _, steps = lax.scan(_without_residuals(step), start, (transitions, observations))
    return steps


def run_smoother(transitions: Transitions, steps: FilterPass) -> BackwardPass:
    """The backward recursion over one sequence."""
    state_dim, dtype = transitions.shift.shape[-1], transitions.shift.dtype

    def step(carry: tuple, at: tuple[FilterPass, Array]) -> tuple[tuple, BackwardPass]:
        adjoint, information, next_weights, next_predicted_cov = carry
        here, weights = at
        onward = here.covs @ next_weights.T  # Cov[x_t, x_{t+1} | y_{0:t}]
        mean = here.means + onward @ adjoint
        cov = symmetrize(here.covs - onward @ information @ onward.T)
        cross_cov = onward - onward @ information @ next_predicted_cov
        propagated = next_weights @ here.retained
        adjoint = here.score + propagated.T @ adjoint
        information = symmetrize(here.information + propagated.T @ information @ propagated)
        done = BackwardPass(mean, cov, cross_cov, adjoint, information)
        return (adjoint, information, weights, here.predicted_covs), done

    zeros = jnp.zeros((state_dim, state_dim), dtype)
    end = (jnp.zeros(state_dim, dtype), zeros, zeros, zeros)
    return lax.scan(_without_residuals(step), end, (steps, transitions.weights), reverse=True)[1]


def _without_residuals(step: Callable) -> Callable:
    """A step whose gradient computes it once more: that costs less than to keep, one by one, what came up in it."""
    return jax.checkpoint(step, prevent_cse=False)


def _update_with_rows(mean: Array, cov: Array, rows: Rows) -> FilterPass:
    """Innovation form with $S = I + U P^- U^T$, which is never singular, and Joseph's form for the covariance."""
    weights = rows.weights
    cov_weights = cov @ weights.T
    factor = jnp.linalg.cholesky(symmetrize(weights @ cov_weights) + jnp.eye(weights.shape[0], dtype=cov.dtype))
    solved = jax.scipy.linalg.cho_solve((factor, True), weights)
    information, score = symmetrize(weights.T @ solved), solved.T @ (rows.values - weights @ mean)
    gain = cov @ solved.T
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
    retained, log_det = _inverse(jnp.eye(cov.shape[0], dtype=cov.dtype) + cov @ potential.precision)
    score = retained.T @ (potential.shift - potential.precision @ mean)
    return FilterPass(
        means=mean + cov @ score,
        covs=symmetrize(retained @ cov),
        predicted_means=mean,
        predicted_covs=cov,
        score=score,
        information=symmetrize(potential.precision @ retained),
        retained=retained,
        log_det=log_det,
    )


@jax.custom_jvp
def _inverse(matrix: Array) -> tuple[Array, Array]:
    """The inverse, and the logarithm of the determinant's size."""
    lu, pivots = jax.scipy.linalg.lu_factor(matrix)
    inverse = jax.scipy.linalg.lu_solve((lu, pivots), jnp.eye(matrix.shape[0], dtype=matrix.dtype))
    return inverse, jnp.log(jnp.abs(jnp.diagonal(lu))).sum()


@_inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Products of small matrices: through the factors and pivots, a gradient takes several times as long."""
    inverse, log_det = _inverse(*primals)
    change = inverse @ tangents[0]
    return (inverse, log_det), (-change @ inverse, jnp.trace(change))
