r"""Dynamics from the steps that nobody touched, and then the clamps as functionals of their states.

In the first model every clamped step redraws all states from a wide prior. Its states have coordinates of their own, in which
the process noise is white; a clamped state is $x_i = w_i^\top \tilde x + c_i$ there, and equals what it is clamped to.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Bool, Float

from issm.fitting.em import improve
from issm.fitting.start_data import StartData
from issm.inference.smoother import lgssm_smoother
from issm.interventions import Intervention
from issm.models.coordinates import transform_params
from issm.models.fields import as_matrix, values_of
from issm.models.lgssm import ParamsLGSSM

WIDE = 100.0  # variance of the prior of a redrawn state, in units of the variance of that state
NUM_UPDATES = 150
TOLERANCE = 1e-6  # nats for each observed number: what is learned here is fitted again
FEWEST_ARRIVALS = 10  # untouched arrivals for each coefficient of a row of the dynamics
SHRINK = 1.0  # twice the nats against the length that least squares gives
LARGEST_CONDITION = 1e6


def redrawn_start(data: StartData, near: ParamsLGSSM) -> ParamsLGSSM | None:
    r"""Parameters from the untouched steps, in the coordinates that the clamps name.

    1. The model in which clamped steps redraw all states is fitted from `near`; then $\tilde x = Q^{-1/2} x$.
    2. At a clamped step the emissions from then on give $\hat x_t$ with error covariance $E_t$. State i minimises
       $\sum_t (w^\top \hat x_t + c - v_t)^2 / (w^\top E_t w)$ over its steps, regression with errors in all variables, beside small
       penalties: a diagonal Q makes functionals of different states orthogonal here, which decides between states that are
       only ever clamped together.
    3. States that are never clamped take the directions that remain.

    Args:
        data: The trials.
        near: Parameters whose likelihood is not hopeless.

    Returns:
        Parameters with diagonal covariances, or None where too few arrivals are untouched, a state is clamped to one value only,
        the fit is degenerate, or the functionals are not independent.

    References:
        Van Overschee & De Moor (1996), ch. 2, on coordinates; Fuller (1987), *Measurement Error Models*, sec. 2.3.
    """
    touched = data.mask.any(axis=2)
    arrivals = int((data.alive & ~touched)[:, 1:].sum())
    levels_known = all(np.ptp(data.value[data.mask[..., i] & data.alive, i]) > 0 for i in np.flatnonzero(data.clamped))
    if arrivals < FEWEST_ARRIVALS * (data.state_dim + data.inputs.shape[2] + 1) or not levels_known:
        return None
    plan, inputs = data.trials.plan.intervention, data.trials.plan.inputs
    emissions = jnp.asarray(np.where(data.observed, data.values, np.nan), data.dtype)
    near = _in_units(near, 1 / data.scale, -data.center / data.scale)
    spread = np.asarray(lgssm_smoother(near, emissions, inputs).smoothed_means)[data.alive].var(axis=0)
    if not (spread > 0).all():
        return None
    redrawn = redraw(np.asarray(plan.mask.any(axis=-1)), WIDE * spread)
    where = lambda t: (t.emissions, t.plan.intervention)  # noqa: E731
    params = improve(near, eqx.tree_at(where, data.trials, (emissions, redrawn)), NUM_UPDATES, TOLERANCE).params
    posterior = lgssm_smoother(params, emissions, inputs, interventions=redrawn)
    used = touched & data.alive
    wide = np.broadcast_to(np.asarray(redrawn.variance, np.float64), data.mask.shape)[used]
    to_white = 1 / np.sqrt(np.asarray(values_of(params.dynamics.cov), np.float64))
    means = np.asarray(posterior.smoothed_means, np.float64)[used] * to_white
    covs = np.asarray(posterior.smoothed_covariances, np.float64)[used] * np.outer(to_white, to_white)
    if not (np.isfinite(covs).all() and np.isfinite(means).all() and (np.linalg.eigvalsh(covs) > 0).all()):
        return None
    estimate, error = from_emissions_alone(means, covs, wide * to_white**2)
    noise = np.broadcast_to(np.asarray(plan.variance, np.float64), data.mask.shape)[used]
    rows, offset = _functionals(estimate, error, data.mask[used], data.value[used], noise, data.clamped)
    if not np.isfinite(rows).all() or np.linalg.cond(rows) > LARGEST_CONDITION:
        return None
    moved = transform_params(params, jnp.asarray(rows * to_white, data.dtype), jnp.asarray(offset, data.dtype))
    diagonals = tuple(jnp.diagonal(values_of(as_matrix(cov))) for cov in (moved.initial.cov, moved.dynamics.cov))
    moved = eqx.tree_at(lambda p: (p.initial.cov, p.dynamics.cov), moved, diagonals)
    return _in_units(moved, data.scale, data.center)


def redraw(
    steps: Bool[np.ndarray, "*trials num_timesteps"], variances: Float[np.ndarray, " state_dim"]
) -> Intervention:
    """The plan that draws all states anew from N(0, variances) at some steps, in the dtype of the variances."""
    mask = np.repeat(np.asarray(steps)[..., None], len(variances), axis=-1)
    return Intervention(mask, np.zeros((), variances.dtype), np.broadcast_to(variances, mask.shape))


def from_emissions_alone(
    means: Float[np.ndarray, "steps state_dim"],
    covs: Float[np.ndarray, "steps state_dim state_dim"],
    variances: Float[np.ndarray, "steps state_dim"],
) -> tuple[Float[np.ndarray, "steps state_dim"], Float[np.ndarray, "steps state_dim state_dim"]]:
    """Estimates of redrawn states and their error covariances: the posteriors less their prior N(0, variances)."""
    precision = np.linalg.inv(covs)
    information = precision - np.eye(means.shape[1]) / variances[:, None, :]
    values, vectors = np.linalg.eigh(information)
    values = np.maximum(values, 1e-2 / variances.max(axis=1, keepdims=True))  # directions that were not seen
    error = np.einsum("tik,tk,tjk->tij", vectors, 1 / values, vectors)
    return np.einsum("tij,tjk,tk->ti", error, precision, means), error


def _in_units(params: ParamsLGSSM, scale: np.ndarray, offset: np.ndarray) -> ParamsLGSSM:
    """The same model of the emissions `scale * y + offset`."""
    emissions, dtype = params.emissions, params.initial.mean.dtype
    factor, shift = jnp.asarray(scale, dtype), jnp.asarray(offset, dtype)
    where = lambda p: (p.emissions.weights, p.emissions.bias, p.emissions.input_weights, p.emissions.cov)  # noqa: E731
    moved = (
        factor[:, None] * values_of(emissions.weights),
        factor * values_of(emissions.bias) + shift,
        factor[:, None] * values_of(emissions.input_weights),
        factor**2 * values_of(emissions.cov),
    )
    return eqx.tree_at(where, params, moved)


def _functionals(
    estimate: np.ndarray,
    error: np.ndarray,
    mask: np.ndarray,
    value: np.ndarray,
    noise: np.ndarray,
    clamped: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows w and offsets c of all states; those that most combinations of states tell apart come first."""
    state_dim = mask.shape[1]
    rows, offset = np.zeros((state_dim, state_dim)), np.zeros(state_dim)
    combinations = [len(np.unique(mask[mask[:, i]], axis=0)) for i in range(state_dim)]
    found: list[int] = []
    for i in sorted(np.flatnonzero(clamped).tolist(), key=lambda i: -combinations[i]):
        at = mask[:, i]
        rows[i], offset[i] = _functional(estimate[at], error[at], value[at, i], noise[at, i], rows[found])
        found.append(i)
    rows[~clamped] = np.linalg.svd(rows[clamped])[2][clamped.sum() :]
    return rows, offset


def _functional(
    estimate: np.ndarray, error: np.ndarray, value: np.ndarray, noise: np.ndarray, others: np.ndarray
) -> tuple[np.ndarray, float]:
    """Regression of the values on estimates with errors: least squares, then the errors count along w."""
    center, mean = estimate.mean(axis=0), value.mean()
    design, target = estimate - center, value - mean
    state_dim = len(center)
    typical = error.mean(axis=0)
    size = np.trace(typical) / state_dim
    axes = np.linalg.svd(others)[2]
    known, rest = axes[: len(others)], axes[len(others) :]
    inside = design @ rest.T
    start = np.linalg.solve(inside.T @ inside + SHRINK * size * np.eye(len(rest)), inside.T @ target) @ rest
    scale = start @ start
    if scale == 0:  # the estimates do not move with the values
        return start, mean
    # A direction in common counts like one error along w at every step, whatever the length of w.
    along_known = len(value) * size * known.T @ known

    def misfit(row: np.ndarray) -> tuple[float, np.ndarray]:
        along, typically = error @ row, typical @ row
        variance, common = along @ row + noise, row @ along_known @ row / (row @ typically)
        residual = design @ row - target
        ratio = residual / variance
        slope = ratio @ design - ratio**2 @ along + SHRINK * row / scale
        slope = slope + (along_known @ row - common * typically) / (row @ typically)
        return float(residual @ ratio + common + SHRINK * row @ row / scale) / 2, slope

    row = scipy.optimize.minimize(misfit, start, jac=True, method="BFGS").x
    return row, mean - row @ center
