r"""Changes of the states' coordinates, $x \to x + E x + o$: the directions in which EM is slowest, and what pins them.

Without clamps the emissions cannot tell such models apart. Clamps that are rare tell them apart by little, and EM, whose steps
are those of data in which every state is seen, then needs as many steps as there are arrivals for each clamped one. What is
known about E and o is small and explicit, so that it can correct the steps.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, Float

from issm._linalg import symmetrize
from issm.fitting.m_step import Rules
from issm.fitting.regression import RowStatistics
from issm.fitting.score import emission_coefficients, to_coordinates
from issm.fitting.statistics import SufficientStatistics
from issm.models.fields import TimeVarying, values_of
from issm.models.lgssm import ParamsLGSSM, ParamsLGSSMDynamics, ParamsLGSSMEmissions, ParamsLGSSMInitial
from issm.models.trials import Trials

MOST_STATES = 24  # beyond them the system of D (D + 1) equations would cost more than an E step
SHARE = 0.5  # of the information that seen states would carry about correlations of the noise
RIDGE = 1e-3


class Clamps(eqx.Module):
    """Number, sum and sum of squares of the values that each state is clamped to."""

    count: Float[Array, " state_dim"]
    total: Float[Array, " state_dim"]
    square: Float[Array, " state_dim"]


def count_clamps(trials: Trials) -> Clamps:
    """Over all trials and steps."""
    plan = trials.plan.intervention
    times = 1 if plan.mask.ndim == 3 else trials.num_trials
    weights = times * plan.mask.reshape(-1, plan.state_dim).astype(plan.value.dtype)
    values = plan.value.reshape(-1, plan.state_dim)
    return Clamps(weights.sum(axis=0), (weights * values).sum(axis=0), (weights * values**2).sum(axis=0))


def has_gauge(params: ParamsLGSSM, rules: Rules) -> bool:
    """Whether a change of coordinates stays within what the fit may change."""
    fields = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, TimeVarying))
    free = all(rule.coefficients is None for rule in (rules.initial, rules.dynamics, rules.emissions))
    return free and not any(isinstance(f, TimeVarying) for f in fields) and params.state_dim <= MOST_STATES


class GaugeStep(eqx.Module):
    r"""$T G^{-1} T^\top$ with T the tangents of the changes and G the information about them."""

    params: ParamsLGSSM
    factor: Float[Array, "changes changes"]

    def __init__(self, params: ParamsLGSSM, stats: SufficientStatistics, clamps: Clamps):
        self.params = params
        self.factor = jnp.linalg.cholesky(_information(params, stats, clamps))

    def __call__(self, gradient: Float[Array, " coordinates"]) -> Float[Array, " coordinates"]:
        """The part of a search direction that changes coordinates."""
        changes = jnp.zeros(self.factor.shape[0], gradient.dtype)
        _, tangent = jax.linearize(lambda change: to_coordinates(_changed(self.params, change)), changes)
        (slopes,) = jax.linear_transpose(tangent, changes)(gradient)
        return tangent(jsl.cho_solve((self.factor, True), slopes))


def follow(point: Array, step: Array, at: Callable[[Array], ParamsLGSSM], params: ParamsLGSSM) -> ParamsLGSSM:
    r"""The parameters at `point + step` to first order, but along the curve on which coordinates change exactly.

    The likelihood is steep beside that curve, so that a straight step could only be short.

    Args:
        point: Coordinates of the best parameters.
        step: The step in them.
        at: Parameters from coordinates.
        params: The best parameters.
    """
    changes = _changes_within(params, step)
    _, tangent = jax.linearize(lambda change: to_coordinates(_changed(params, change)), jnp.zeros_like(changes))
    return _turned(at(point + step - tangent(changes)), changes)


def _changes_within(params: ParamsLGSSM, step: Array) -> Array:
    """The change of coordinates that a step of the readout amounts to."""
    dim = params.state_dim
    readout = values_of(params.emissions.weights)
    scaled = _over_noise(readout, params)
    gram = readout.T @ scaled
    gram = gram + 1e-6 * jnp.trace(gram) * jnp.eye(dim, dtype=gram.dtype)
    moved = emission_coefficients(step, params)
    moved = jnp.concatenate([moved[:, :dim], moved[:, -1:]], axis=1)
    return -jnp.linalg.solve(gram, scaled.T @ moved).reshape(-1)


def _over_noise(readout: Array, params: ParamsLGSSM) -> Array:
    """$R^{-1} C$."""
    noise = values_of(params.emissions.cov)
    return readout / noise[:, None] if noise.ndim == 1 else jsl.cho_solve((jnp.linalg.cholesky(noise), True), readout)


def _turned(params: ParamsLGSSM, change: Array) -> ParamsLGSSM:
    r"""The same model for $M x + o$ with $M = (I - E/2)^{-1} (I + E/2)$; diagonal covariances stay so."""
    dim = params.state_dim
    change = change.reshape(dim, dim + 1)
    half, shift, eye = change[:, :-1] / 2, change[:, -1], jnp.eye(dim, dtype=change.dtype)
    turn, back = jnp.linalg.solve(eye - half, eye + half), jnp.linalg.solve(eye + half, eye - half)
    initial, dynamics, emissions = params.initial, params.dynamics, params.emissions
    weights, readout = turn @ values_of(dynamics.weights) @ back, values_of(emissions.weights) @ back
    bias, input_weights = values_of(dynamics.bias), values_of(dynamics.input_weights)

    def turned(cov: Array) -> Array:
        return (turn**2) @ cov if cov.ndim == 1 else symmetrize(turn @ cov @ turn.T)

    return ParamsLGSSM(
        ParamsLGSSMInitial(turn @ initial.mean + shift, turned(initial.cov)),
        ParamsLGSSMDynamics(
            weights,
            turn @ bias + shift - weights @ shift,
            turn @ input_weights,
            turned(values_of(dynamics.cov)),
        ),
        ParamsLGSSMEmissions(
            readout, values_of(emissions.bias) - readout @ shift, emissions.input_weights, emissions.cov
        ),
    )


def _changed(params: ParamsLGSSM, change: Array) -> ParamsLGSSM:
    """The same model in other coordinates, to first order; `change` holds the rows `[E_i, o_i]`."""
    dim = params.state_dim
    change = change.reshape(dim, dim + 1)
    turn, shift = change[:, :-1], change[:, -1]
    initial, dynamics, emissions = params.initial, params.dynamics, params.emissions
    weights, readout = values_of(dynamics.weights), values_of(emissions.weights)
    bias, input_weights = values_of(dynamics.bias), values_of(dynamics.input_weights)

    def turned(cov: Array) -> Array:
        return cov * (1 + 2 * jnp.diagonal(turn)) if cov.ndim == 1 else cov + turn @ cov + cov @ turn.T

    return ParamsLGSSM(
        ParamsLGSSMInitial(initial.mean + turn @ initial.mean + shift, turned(initial.cov)),
        ParamsLGSSMDynamics(
            weights + turn @ weights - weights @ turn,
            bias + turn @ bias + shift - weights @ shift,
            input_weights + turn @ input_weights,
            turned(values_of(dynamics.cov)),
        ),
        ParamsLGSSMEmissions(
            readout - readout @ turn,
            values_of(emissions.bias) - readout @ shift,
            emissions.input_weights,
            emissions.cov,
        ),
    )


def _information(params: ParamsLGSSM, stats: SufficientStatistics, clamps: Clamps) -> Array:
    """What clamps and independent noise tell about the changes, and a little for those that nothing tells about."""
    dim = params.state_dim
    eye = jnp.eye(dim, dtype=clamps.count.dtype)
    if isinstance(stats.dynamics, RowStatistics):
        gram, steps = stats.dynamics.gram.mean(axis=0), stats.dynamics.count.mean()
    else:
        gram, steps = stats.dynamics.gram.sum(axis=0), stats.dynamics.count.sum()
    steps = jnp.maximum(steps, 1.0)
    second = gram[:dim, :dim] / jnp.maximum(gram[-1, -1], 1.0)
    cov = values_of(params.dynamics.cov)
    variances = cov if cov.ndim == 1 else jnp.diagonal(cov)
    variances = jnp.maximum(variances, 1e-6 * jnp.diagonal(second))
    precision = _clamped_precision(params, variances)
    # Row i at the steps where state i is clamped to v: (E x)_i + o_i is seen with that precision.
    inside = clamps.count[:, None, None] * second[None]
    own = (eye[:, :, None] + eye[:, None, :]) > 0
    inside = jnp.where(own, 0.0, inside) + clamps.square[:, None, None] * eye[:, :, None] * eye[:, None, :]
    crossed = clamps.total[:, None] * eye
    rows = jnp.concatenate(
        [
            jnp.concatenate([inside, crossed[:, :, None]], axis=2),
            jnp.concatenate([crossed, clamps.count[:, None]], axis=1)[:, None, :],
        ],
        axis=1,
    )
    little = RIDGE * steps * jnp.concatenate([jnp.diagonal(second), jnp.ones(1, second.dtype)])
    rows = (
        precision[:, None, None] * rows
        + (little[None] / variances[:, None])[:, :, None] * jnp.eye(dim + 1, dtype=second.dtype)[None]
    )
    total = jnp.einsum("ik,ipq->ipkq", eye, rows)
    if cov.ndim == 1:  # E Q + Q E' has to stay diagonal
        ratio = SHARE * steps * variances[None] / variances[:, None]
        index = jnp.arange(dim)
        total = total.at[index[:, None], index[None], index[:, None], index[None]].add(ratio * (1 - eye))
        total = total.at[index[:, None], index[None], index[None], index[:, None]].add(SHARE * steps * (1 - eye))
    return total.reshape(dim * (dim + 1), dim * (dim + 1))


def _clamped_precision(params: ParamsLGSSM, variances: Array) -> Array:
    """What the emissions of a step and the next arrival tell about one state when the others are free."""
    readout, weights = values_of(params.emissions.weights), values_of(params.dynamics.weights)
    information = (
        readout.T @ _over_noise(readout, params) + weights.T @ (weights / variances[:, None]) + jnp.diag(1 / variances)
    )
    inverse = jnp.linalg.inv(information)
    return jnp.maximum(1 / jnp.diagonal(inverse) - 1 / variances, 1e-6 / variances)
