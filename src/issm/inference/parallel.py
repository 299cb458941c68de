r"""Filter and smoother by associative scans: about 2 log2(T) steps deep, for machines that do many small products at once.

The filter is the scan of Särkkä & García-Fernández (2021), for covariances alone. Element t stands for the conditional
$p(x_t \mid x_{t-1}, y_t)$ with covariance $C_t$ and map $A_t$, and for the likelihood of $x_{t-1}$ with information $J_t$:

$$A_t = V_t F_t, \quad C_t = V_t Q_t, \quad J_t = F_t^\top H_t^\top S_t^{-1} H_t F_t, \quad
S_t = I + H_t Q_t H_t^\top, \quad V_t = I - Q_t H_t^\top S_t^{-1} H_t$$

where F_t and Q_t are the transition under its clamps and H_t the rows of unit noise. Two neighbours i, j combine to

$$A = A_j E A_i, \quad C = A_j E C_i A_j^\top + C_j, \quad J = A_i^\top J_j E A_i + J_i, \quad E = (I + C_i J_j)^{-1}$$

and I + C J is never singular, whatever the clamps make of C. The scan from the left has the filtered covariances in C; the scan
from the right has in J the information $J^b_t$ that the future holds on $x_t$, and $P^s_t = (I + P_t J^b_t)^{-1} P_t$: no
predicted covariance is inverted, and nothing is a difference of covariances. Means and adjoints are affine recursions once the
gains are known, which is two more scans. Covariances are scanned once for each pattern, means for each trial.

References:
    Särkkä & García-Fernández (2021), *IEEE Trans. Automatic Control* 66, lemmas 7 and 8.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm._linalg import symmetrize
from issm.inference.compression import compress
from issm.inference.means import Gains, apply, following, identity_like, over_trials, run_means, swap, transpose
from issm.inference.moments import Moments
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import lgssm_transitions
from issm.models.trials import Trials


def parallel_moments(params: ParamsLGSSM, trials: Trials) -> Moments:
    """Filter and smooth all trials by scans of logarithmic depth."""
    plan_of_patterns = trials.of_patterns().plan
    transitions = over_trials(lambda inputs, plan: lgssm_transitions(params, inputs, plan), plan_of_patterns)
    shifts = over_trials(lambda inputs, plan: lgssm_transitions(params, inputs, plan).shift, trials.plan)
    weights, noise = transitions.weights, transitions.cov
    observations = compress(params, trials)
    rows, values = jnp.moveaxis(observations.weights, -1, 1), swap(observations.values - observations.offsets)

    elements = _elements(weights, noise, rows, trials.num_patterns)
    past = lax.associative_scan(_combine, elements).cov
    before = jnp.concatenate([jnp.zeros_like(past[:1]), past[:-1]])
    predicted_covs = symmetrize(weights @ before @ transpose(weights) + noise)
    gains, log_det = _gains(predicted_covs, rows)
    filtered_covs = _update(predicted_covs, gains)

    means = run_means(weights, shifts, gains, values, trials.pattern, parallel_recursion)
    quadratic = swap((means.innovations**2).sum(axis=-1)) + observations.unexplained

    future = lax.associative_scan(lambda later, sooner: _combine(sooner, later), elements, reverse=True).information
    beyond = following(future)  # of y_{t+1:T-1} on x_t
    information = transpose(rows) @ rows + beyond
    eye = identity_like(noise)
    smoothed_covs = symmetrize(jnp.linalg.solve(eye + filtered_covs @ beyond, filtered_covs))
    informations = symmetrize(jnp.linalg.solve(eye + information @ predicted_covs, information))
    cross_covs = jnp.linalg.solve((eye + noise @ information)[1:], weights[1:] @ smoothed_covs[:-1])
    onward = filtered_covs @ transpose(following(weights))  # Cov[x_t, x_{t+1} | y_{0:t}]
    smoothed_means = means.filtered + apply(onward, following(means.adjoints), trials.pattern)
    return Moments(
        logliks=observations.log_norm - (trials.spread(log_det.T) + quadratic) / 2,
        filtered_means=swap(means.filtered),
        filtered_covs=swap(filtered_covs),
        predicted_means=swap(means.predicted),
        predicted_covs=swap(predicted_covs),
        adjoints=swap(means.adjoints),
        informations=swap(informations),
        smoothed_means=swap(smoothed_means),
        smoothed_covs=swap(smoothed_covs),
        smoothed_cross_covs=swap(transpose(cross_covs)),
    )


def parallel_recursion(matrices: Array, drive: Array, pattern: Array | None, reverse: bool) -> Array:
    """$x_t = W_t x_{t-1} + b_t$ from zero: affine maps, composed in any order."""

    def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return second[0] @ first[0], apply(second[0], first[1], pattern) + second[1]

    return lax.associative_scan(compose, (matrices, drive), reverse=reverse)[1]


class _Element(eqx.Module):
    r"""$x_t = A x_s + e$ with $e \sim N(0, C)$ given the emissions between, and their information J on $x_s$."""

    weights: Array
    cov: Array
    information: Array


def _elements(weights: Array, noise: Array, rows: Array, num_patterns: int) -> _Element:
    """One for each step; the first transition has zero weights, so that an element that begins there is a posterior."""
    gains, _ = _gains(noise, rows)
    whitened = gains.weights @ weights
    element = _Element(gains.retained @ weights, _update(noise, gains), transpose(whitened) @ whitened)
    shape = (weights.shape[0], num_patterns, *weights.shape[2:])
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, shape), element)


def _combine(first: _Element, second: _Element) -> _Element:
    eye = identity_like(first.cov)
    known = jnp.concatenate([first.weights, first.cov], axis=-1)
    solved = jnp.linalg.solve(eye + first.cov @ second.information, known)
    solved_weights, solved_cov = jnp.split(solved, 2, axis=-1)
    through = transpose(first.weights) @ second.information @ solved_weights
    return _Element(
        weights=second.weights @ solved_weights,
        cov=symmetrize(second.weights @ solved_cov @ transpose(second.weights) + second.cov),
        information=symmetrize(through + first.information),
    )


def _gains(covs: Array, rows: Array) -> tuple[Gains, Array]:
    r"""Gains of the update of every step, and $\log |S|$."""
    eye = identity_like(transpose(rows))
    rows_covs = rows @ covs
    factor = jnp.linalg.cholesky(symmetrize(rows_covs @ transpose(rows)) + eye)
    whitener = jax.scipy.linalg.solve_triangular(factor, jnp.broadcast_to(eye, factor.shape), lower=True)
    log_det = 2 * jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)).sum(axis=-1)
    return Gains(whitener, whitener @ rows, whitener @ rows_covs), log_det


def _update(covs: Array, gains: Gains) -> Array:
    """The updated covariance in Joseph's form."""
    gain = transpose(gains.gains) @ gains.whitener
    retained = gains.retained
    return symmetrize(retained @ covs @ transpose(retained) + gain @ transpose(gain))
