r"""Filter and smoother for a handful of states, all trials at once.

Covariances are computed once for each pattern of clamps and missing entries, means for each trial. Only what is truly
recursive runs inside a scan: $P_t$ and $N_t$ by pattern, $m_t$ and $r_t$ by trial. With $S = I + H P^- H^\top = L L^\top$,
everything else, $L^{-1} H$, $L^{-1} H P^-$ and the products with them, is one vectorised pass over all steps.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm.inference import lanes
from issm.inference.compression import Compressed, compress, squared_residuals
from issm.inference.moments import Moments
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import Transitions, lgssm_transitions
from issm.models.trials import Plan, Trials

LEFTOVER_ACCURACY = 1e-11
"""Relative rounding error above which the cheap form of the leftover is not used."""


def small_moments(params: ParamsLGSSM, trials: Trials) -> Moments:
    """Filter and smooth all trials; what the caller does not use is not computed under `jit`."""
    observations = compress(params, trials)
    by_pattern = _transitions(params, trials.of_patterns().plan)
    shifts = _to_lanes(_transitions(params, trials.plan).shift)
    weights, covs = _to_lanes(by_pattern.weights), _to_lanes(by_pattern.cov)

    predicted_covs = _predicted_covariances(weights, covs, observations.weights, trials.num_patterns)
    gains = _Gains.of(predicted_covs, observations.weights)
    filtered_covs = gains.filtered_covariances(predicted_covs)
    retained_weights = lanes.matmul(gains.retained, weights)  # V_t A_t

    each = lambda by_pattern: trials.spread(by_pattern, axis=-1) if trials.pattern is not None else by_pattern  # noqa: E731
    innovation_factor, white_weights, white_gains = each(gains.factor), each(gains.weights), each(gains.gains)
    values = lanes.solve_lower(innovation_factor, observations.values)
    drive = shifts + lanes.matvec(lanes.transpose(white_gains), values - lanes.matvec(white_weights, shifts))
    filtered_means = _recursion(retained_weights, drive, trials.pattern)
    previous = jnp.concatenate([jnp.zeros_like(filtered_means[:1]), filtered_means[:-1]])
    predicted_means = lanes.matvec(each(weights), previous) + shifts
    innovations = values - lanes.matvec(white_weights, predicted_means)

    scores = lanes.matvec(lanes.transpose(white_weights), innovations)
    next_weights = jnp.concatenate([weights[1:], jnp.zeros_like(weights[:1])])
    propagated = lanes.transpose(lanes.matmul(next_weights, gains.retained))  # V_t' A_{t+1}'
    informations = _informations(propagated, gains.information)
    adjoints = _recursion(propagated, scores, trials.pattern, reverse=True)
    next_adjoints = jnp.concatenate([adjoints[1:], jnp.zeros_like(adjoints[:1])])
    next_informations = jnp.concatenate([informations[1:], jnp.zeros_like(informations[:1])])
    onward = lanes.matmul(filtered_covs, lanes.transpose(next_weights))  # Cov[x_t, x_{t+1} | y_{0:t}]
    explained = lanes.matmul(onward, next_informations)

    log_det = 2 * jnp.log(_diagonal(gains.factor)).sum(axis=-2)
    quadratic = (innovations**2).sum(axis=-2).T
    if observations.squares is not None:
        quadratic = quadratic + _leftover(params, trials, observations, filtered_means)
    smoothed_means = filtered_means + lanes.matvec(each(onward), next_adjoints)
    smoothed_covs = lanes.symmetrize(filtered_covs - lanes.matmul(explained, lanes.transpose(onward)))
    cross_covs = onward[:-1] - lanes.matmul(explained[:-1], predicted_covs[1:])
    return Moments(
        logliks=observations.log_norm - (trials.spread(log_det.T) + quadratic) / 2,
        filtered_means=_from_lanes(filtered_means),
        filtered_covs=_from_lanes(filtered_covs),
        predicted_means=_from_lanes(predicted_means),
        predicted_covs=_from_lanes(predicted_covs),
        adjoints=_from_lanes(adjoints),
        informations=_from_lanes(informations),
        smoothed_means=_from_lanes(smoothed_means),
        smoothed_covs=_from_lanes(smoothed_covs),
        smoothed_cross_covs=_from_lanes(cross_covs),
    )


def _predicted_covariances(weights: Array, covs: Array, rows: Array, num_lanes: int) -> Array:
    """The one recursion of the covariances; rows of unit noise are taken in one by one, in Joseph's form."""
    num_timesteps, state_dim = weights.shape[:2]
    constant = rows.shape[0] == 1

    def step(cov: Array, at: tuple) -> tuple[Array, Array]:
        weights, noise, *varying = at
        rows_here = rows[0] if constant else varying[0]
        predicted = lanes.matmul(lanes.matmul(weights, cov), lanes.transpose(weights)) + noise
        predicted = lanes.symmetrize(predicted)
        cov = predicted
        for row in rows_here:
            cov_row = lanes.matvec(cov, row)
            gain = cov_row / (1 + (row * cov_row).sum(axis=0))[None]
            kept = cov - gain[:, None] * cov_row[None]
            cov = kept + (gain - lanes.matvec(kept, row))[:, None] * gain[None]
        return lanes.symmetrize(cov), predicted

    start = jnp.zeros((state_dim, state_dim, num_lanes), weights.dtype)
    varying = () if constant else (rows,)
    return lax.scan(step, start, (weights, covs, *varying), length=num_timesteps)[1]


class _Gains(eqx.Module):
    r"""With $S = I + H P^- H^\top = L L^\top$.

    Attributes:
        factor: L.
        weights: $L^{-1} H$.
        gains: $L^{-1} H P^-$.
        retained: $V = I - P^- H^\top S^{-1} H$, the share of a prediction error that the update leaves.
        information: $F = H^\top S^{-1} H$.
    """

    factor: Array
    weights: Array
    gains: Array
    retained: Array
    information: Array

    @staticmethod
    def of(predicted_covs: Array, rows: Array) -> "_Gains":
        rows_covs = lanes.matmul(rows, predicted_covs)
        spread = lanes.symmetrize(lanes.matmul(rows_covs, lanes.transpose(rows)))
        factor = lanes.cholesky(spread + lanes.identity(rows.shape[1], rows.dtype)[None])
        weights, gains = lanes.solve_lower_matrix(factor, rows), lanes.solve_lower_matrix(factor, rows_covs)
        retained = lanes.identity(rows.shape[2], rows.dtype)[None] - lanes.matmul(lanes.transpose(gains), weights)
        return _Gains(factor, weights, gains, retained, lanes.matmul(lanes.transpose(weights), weights))

    def filtered_covariances(self, predicted_covs: Array) -> Array:
        r"""Joseph's form $V P^- V^\top + K K^\top$, $K^\top = L^{-\top} L^{-1} H P^-$, which keeps its digits however small the noise."""
        gain = lanes.solve_lower_transposed_matrix(self.factor, self.gains)
        kept = lanes.matmul(lanes.matmul(self.retained, predicted_covs), lanes.transpose(self.retained))
        return lanes.symmetrize(kept + lanes.matmul(lanes.transpose(gain), gain))


def _recursion(matrices: Array, drive: Array, pattern: Array | None, reverse: bool = False) -> Array:
    """The vectors x_t = W_t x_{t-1} + b_t, forwards or backwards, from zero."""

    def step(vector: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        matrix, shift = at
        vector = lanes.matvec(matrix if pattern is None else matrix[..., pattern], vector) + shift
        return vector, vector

    return lax.scan(step, jnp.zeros_like(drive[0]), (matrices, drive), reverse=reverse)[1]


def _informations(propagated: Array, information: Array) -> Array:
    """N_t = F_t + V_t' A_{t+1}' N_{t+1} A_{t+1} V_t, backwards from zero."""

    def step(carry: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        propagated, information = at
        through = lanes.matmul(lanes.matmul(propagated, carry), lanes.transpose(propagated))
        carry = lanes.symmetrize(information + through)
        return carry, carry

    start = jnp.zeros(jnp.broadcast_shapes(propagated.shape[1:], information.shape[1:]), information.dtype)
    return lax.scan(step, start, (propagated, information), reverse=True)[1]


def _leftover(params: ParamsLGSSM, trials: Trials, observations: Compressed, filtered_means: Array) -> Array:
    r"""$\|R^{-1/2}(y - \ldots)\|^2 - \|z\|^2$, the part of the squared emissions that no state can change.

    The same number comes from the residuals of any states, $\|z_y - U x\|^2 - \|z - H x\|^2$. Where the squares are so much
    larger than what is left that their difference would lose digits, the filtered means are those states, at the price
    of another pass over Y.
    """
    squares, values = observations.squares, observations.values
    assert squares is not None
    difference = squares - (values**2).sum(axis=-2).T

    def from_residuals() -> Array:
        left = values - lanes.matvec(trials.spread(observations.weights, axis=-1), filtered_means)
        residual_squares = squared_residuals(params, trials, _from_lanes(filtered_means))
        return residual_squares - (left**2).sum(axis=-2).T

    epsilon = jnp.finfo(values.dtype).eps
    loses_digits = epsilon * squares.sum() > max(LEFTOVER_ACCURACY, 8 * epsilon) * jnp.abs(difference).sum()
    return lax.cond(loses_digits, from_residuals, lambda: difference)


def _diagonal(matrices: Array) -> Array:
    return jnp.moveaxis(jnp.diagonal(matrices, axis1=-3, axis2=-2), -1, -2)


def _transitions(params: ParamsLGSSM, plan: Plan) -> Transitions:
    """Transitions with a leading axis over the trials of the plan, of length 1 if they share it."""
    axes = plan.axes
    if plan.inputs.ndim == 2 and plan.intervention.mask.ndim == 2:
        return jax.tree.map(lambda leaf: leaf[None], lgssm_transitions(params, plan.inputs, plan.intervention))
    over_trials = jax.vmap(lgssm_transitions, in_axes=(None, axes.inputs, axes.intervention))
    return over_trials(params, plan.inputs, plan.intervention)


def _to_lanes(array: Array) -> Array:
    return jnp.moveaxis(array, 0, -1)


def _from_lanes(array: Array) -> Array:
    return jnp.moveaxis(array, -1, 0)
