r"""How certain fitted parameters are: the observed information, on the directions that the data speak about.

Two matrices are used. The observed information H is minus the Hessian of the log-likelihood, by forward mode through the exact
score. The information by first derivatives is, with $\hat y_t, S_t$ the one-step predictions,

$$F_{ij} = \sum_t \frac{\partial \hat y_t}{\partial θ_i}^\top S_t^{-1} \frac{\partial \hat y_t}{\partial θ_j} + \tfrac12
\mathrm{tr}\Big(S_t^{-1} \frac{\partial S_t}{\partial θ_i} S_t^{-1} \frac{\partial S_t}{\partial θ_j}\Big).$$

F is never negative, and zero exactly along a direction that changes no prediction (a change of the basis of the states, the
weight of an input that was never on), wherever it is computed: it tells what is identified. H is zero there only at a
maximum, and a fit that stopped early is none; H tells how well the rest is known.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from issm._check import fail
from issm._compile import jit_quickly
from issm._constraints import check_interior
from issm._host import is_concrete
from issm._linalg import safe_sqrt, symmetrize
from issm._trees import trainable_masks
from issm.fitting.result import FIELDS
from issm.inference.information import along, along_coordinates, columns_of, free_directions, likelihood_score
from issm.inference.methods import choose_method, filter_and_smooth
from issm.inference.moments import Moments
from issm.interventions import Intervention
from issm.models.fields import TimeVarying, apply_weights, as_matrix, over_time
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import emission_offsets
from issm.models.trials import Trials, as_trials

SMALLEST_SHARE = {"float64": 1e-10, "float32": 1e-4}
"""Eigenvalue of F, every parameter scaled to an information of one, below which a direction counts as not identified."""

SMALLEST_CURVATURE = 1e-2
"""Curvature H along a direction, as a share of F, below which the parameters are not at a maximum along it."""

LARGEST_PART = {"unidentified": 1e-4, "not_maximal": 1e-2}
"""An entry has no standard error if more than this of it lies in what is left out: of its square, or of its variance by F."""


SCALES = ("natural", "unconstrained")


class ParameterCovariance(eqx.Module):
    r"""Covariance and standard errors of fitted parameters.

    Attributes:
        covariance: Covariance of all entries in the order of `jax.flatten_util.ravel_pytree(params)`, as `causal_effect` takes
            it in `parameters`. Rows and columns of fixed entries are zero; the two mirrored entries of a full covariance move as
            one. Along directions that are left out (see below) it is zero: the variance of an effect that does not depend on them
            is right, that of any other is too small. NaN where the log-likelihood is not finite.
        standard_errors: Square roots of its diagonal in the structure of the parameters: zero for what is fixed, infinite for
            what a direction that is left out takes part in.
        unidentified: Entries that the data cannot tell apart from others or say nothing about, in the same order.
        not_maximal: Entries that take part in a direction along which the log-likelihood is not curved downwards as it is at
            a maximum inside the parameter space.
        num_unidentified: Number of directions that change no prediction.
        num_not_maximal: Number of directions without a maximum.
        remaining_gain: What a Newton step would add to the log-likelihood, in nats; zero at a maximum.

    References:
        Harvey (1989), *Forecasting, Structural Time Series Models and the Kalman Filter*, sec. 3.4.5.

    Examples:
        >>> import equinox as eqx, jax, numpy as np, issm
        >>> params = issm.make_lgssm_params(0.0, 0.0, 0.5, 1.0, 1.0, 1.0)
        >>> both = lambda p: (p.dynamics.cov, p.emissions.weights)  # only their ratio is known: the unit of the state
        >>> trainable = eqx.tree_at(both, jax.tree.map(lambda _: False, params), (True, True))
        >>> issm.parameter_covariance(params, np.sin(np.arange(50.0))[:, None], trainable=trainable).reason
        'left out: 1 direction that the data say nothing about, in dynamics.cov, emissions.weights'
    """

    covariance: Float[Array, "*batch num_parameters num_parameters"]
    standard_errors: ParamsLGSSM
    unidentified: Bool[Array, "*batch num_parameters"]
    not_maximal: Bool[Array, "*batch num_parameters"]
    num_unidentified: Int[Array, "*batch"]
    num_not_maximal: Int[Array, "*batch"]
    remaining_gain: Float[Array, "*batch"]

    @property
    def reason(self) -> str | list:
        """What was left out, in words, with the names of the fields; a list of them for a batch."""
        if not is_concrete(self.num_unidentified):
            return "not known while JAX traces"
        if self.num_unidentified.ndim:
            return [jax.tree.map(lambda leaf, k=k: leaf[k], self).reason for k in range(self.num_unidentified.shape[0])]
        if np.isnan(self.covariance).any():
            return "no covariance: the log-likelihood or a derivative of it is not finite at these parameters"
        left_out = [
            f"{int(count)} direction{'s' if count > 1 else ''} {why}, in {self._fields(flags)}"
            for count, why, flags in (
                (self.num_unidentified, "that the data say nothing about", self.unidentified),
                (self.num_not_maximal, "along which the parameters are not at a maximum", self.not_maximal),
            )
            if count
        ]
        return f"left out: {'; '.join(left_out)}" if left_out else "every free parameter is identified"

    def _fields(self, flags: Array) -> str:
        ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(self.standard_errors)])[:-1]
        parts = np.split(np.asarray(flags), ends)
        named = [name for name, part in zip(FIELDS, parts, strict=True) if part.any()]
        return ", ".join(named) or "no single entry"


def parameter_covariance(
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    trainable: Any = None,
    scale: str = "natural",
) -> ParameterCovariance:
    r"""Covariance of maximum likelihood estimates by the observed information, $(-\nabla^2 \log p(y \mid do(\cdot), u))^{-1}$.

    The data must be those of the fit, and `params` a maximum: the result says in `remaining_gain` how far it is from one. What
    the data cannot tell is left out and named in `reason`, not made up: without enough clamps, for instance, the basis of the
    states is free. Freeze in `trainable` what is known. A full covariance counts by its lower triangle.

    Args:
        params: Fitted parameters. `TimeVarying` fields count as known.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, `(num_timesteps, input_dim)`, shared or one such array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        trainable: What was estimated: a pytree prefix of `params` with Booleans, or Boolean arrays for single entries. None:
            everything but `TimeVarying` fields.
        scale: What the covariance is of. "natural": the entries themselves, as `causal_effect` takes it. "unconstrained": what a
            gradient moves freely, variances by their logarithm and full covariances by their Cholesky factor with the
            logarithm of its diagonal; an interval for a logarithm is closer to right with few data, and never reaches
            below zero.

    Returns:
        The covariance of all parameters, their standard errors, and what was left out.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Harvey (1989), *Forecasting, Structural Time Series Models and the Kalman Filter*, eq. 3.4.69, for the information by
        first derivatives; Efron & Hinkley (1978), *Biometrika* 65, for the observed information.

    Examples:
        >>> import equinox as eqx, jax, issm
        >>> params = issm.make_lgssm_params(0.0, 1.0, 0.8, 1.0, 1.0, 0.1)
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), params, 50)
        >>> both = lambda p: (p.dynamics.weights, p.dynamics.cov)
        >>> trainable = eqx.tree_at(both, jax.tree.map(lambda _: False, params), (True, True))
        >>> uncertainty = issm.parameter_covariance(params, emissions, trainable=trainable)
        >>> 0.05 < float(uncertainty.standard_errors.dynamics.weights[0, 0]) < 0.2
        True
    """
    trials = as_trials(params, emissions, inputs, interventions)
    directions = free_directions(params, trainable)
    if scale not in SCALES:
        fail("scale", got=repr(scale), expected=f"one of {SCALES}", remedy='"natural" is what `causal_effect` takes.')
    if scale == "unconstrained":
        check_interior(params, trainable_masks(params, trainable, fixed=TimeVarying), "params")
    return _parameter_covariance(params, trials, directions, choose_method("auto", params, trials), scale)


@partial(jit_quickly, static_argnames=("method", "scale"))
def _parameter_covariance(
    params: ParamsLGSSM, trials: Trials, directions: Array, method: str, scale: str
) -> ParameterCovariance:
    flat, unravel = ravel_pytree(params)
    at = along(params, directions) if scale == "natural" else along_coordinates(params, directions)
    score, observed, expected = _informations(at, jnp.zeros(directions.shape[1], flat.dtype), trials, method)
    finite = jnp.isfinite(expected).all() & jnp.isfinite(observed).all()
    eye = jnp.eye(score.size, dtype=score.dtype)
    basis, unidentified, not_maximal, counts = _identified(*(jnp.where(finite, h, eye) for h in (observed, expected)))

    # The basis is a constant to derivatives: any one of the same space gives the same inverse.
    known = (basis != 0).any(axis=0)
    curvature = basis.T @ observed @ basis + jnp.diag(1.0 - known.astype(flat.dtype))
    covariance = jnp.where(finite, symmetrize(basis @ jnp.linalg.solve(curvature, basis.T)), jnp.nan)
    embedded = directions @ covariance @ directions.T
    spread = lambda flags: directions @ flags.astype(flat.dtype) > 0  # noqa: E731
    unidentified, not_maximal = spread(unidentified), spread(not_maximal)
    variances = jnp.diagonal(embedded)
    errors = jnp.where(jnp.isnan(variances), jnp.nan, safe_sqrt(variances))
    return ParameterCovariance(
        covariance=embedded,
        standard_errors=unravel(jnp.where(unidentified | not_maximal, jnp.inf, errors)),
        unidentified=unidentified,
        not_maximal=not_maximal,
        num_unidentified=counts[0],
        num_not_maximal=counts[1],
        remaining_gain=score @ covariance @ score / 2,
    )


def _identified(observed: Array, expected: Array) -> tuple[Array, Array, Array, tuple[Array, Array]]:
    """A basis of the directions that are known, the entries that others take part in, and the numbers of the others.

    The columns of the basis are orthonormal in F; those of directions that are left out are zero.
    """
    observed = lax.stop_gradient(observed)
    variances = jnp.diagonal(expected)
    scale = jnp.where(variances > 0, 1 / jnp.sqrt(jnp.where(variances > 0, variances, 1.0)), 1.0)
    shares, vectors = jnp.linalg.eigh(expected * scale[:, None] * scale[None])
    seen = shares > len(shares) * SMALLEST_SHARE[expected.dtype.name]
    unidentified = jnp.where(seen[None], 0.0, vectors**2).sum(axis=1) > LARGEST_PART["unidentified"]

    whitened = jnp.where(seen[None], vectors / jnp.sqrt(jnp.where(seen, shares, 1.0))[None], 0.0) * scale[:, None]
    relative = whitened.T @ observed @ whitened + jnp.diag(1.0 - seen.astype(expected.dtype))
    curvatures, rotation = jnp.linalg.eigh(symmetrize(relative))
    curved = curvatures > SMALLEST_CURVATURE
    basis = whitened @ rotation
    left_out = jnp.where(curved[None], 0.0, basis**2).sum(axis=1)
    not_maximal = left_out > LARGEST_PART["not_maximal"] * (basis**2).sum(axis=1)
    counts = ((~seen).sum(dtype=jnp.int32), (~curved).sum(dtype=jnp.int32))
    return jnp.where(curved[None], basis, 0.0), unidentified, not_maximal, counts


def _informations(
    at: Callable[[Array], ParamsLGSSM], zero: Float[Array, " num_free"], trials: Trials, method: str
) -> tuple[Float[Array, " num_free"], Float[Array, "num_free num_free"], Float[Array, "num_free num_free"]]:
    """The score, H, and F, whose predictions are differentiated forwards and then back: a Jacobian would be large."""

    def score_and_predictions(step: Array) -> tuple[Array, tuple[Array, Array]]:
        params = at(step)
        moments = filter_and_smooth(params, trials, method)
        return likelihood_score(at, step, trials, moments), _predictions(params, trials, moments)

    (score, (_, covs)), forwards = jax.linearize(score_and_predictions, zero)
    back = jax.linear_transpose(lambda step: forwards(step)[1], zero)
    factors = jnp.linalg.cholesky(covs)
    eye = jnp.broadcast_to(jnp.eye(covs.shape[-1], dtype=zero.dtype), covs.shape)
    precisions = jax.scipy.linalg.cho_solve((factors, True), eye)  # once: a solve for every column would take longer
    shares = trials.in_patterns.astype(zero.dtype)[:, None, None, None] / 2

    def column(step: Array) -> tuple[Array, Array]:
        of_score, (means, covs) = forwards(step)
        weights = (_by_trial(precisions, means, trials), shares * (precisions @ covs @ precisions))
        return of_score, lax.stop_gradient(back(weights)[0])

    hessian, expected = columns_of(column, zero)
    return score, -symmetrize(hessian), symmetrize(expected)


def _by_trial(matrices: Array, vectors: Array, trials: Trials) -> Array:
    """The vectors of every trial times the matrices of its pattern, of which there is no copy for every trial."""
    if trials.pattern is None:
        return (matrices @ vectors[..., None])[..., 0]
    one = lambda at: jnp.einsum("tnm,tm->tn", lax.dynamic_index_in_dim(matrices, at[0], keepdims=False), at[1])  # noqa: E731
    return lax.map(one, (trials.pattern, vectors))


def _predictions(params: ParamsLGSSM, trials: Trials, moments: Moments) -> tuple[Array, Array]:
    r"""$\hat y_t$ by trial and $S_t$ by pattern; a missing entry is a sure zero plus noise of variance one."""
    num_timesteps = trials.emissions.shape[1]
    weights = over_time(params.emissions.weights, num_timesteps)
    noise = over_time(as_matrix(params.emissions.cov), num_timesteps)
    inputs = trials.plan.inputs
    means = jax.vmap(apply_weights, in_axes=(None, 0))(params.emissions.weights, moments.predicted_means)
    if inputs.ndim == 2:
        means = means + emission_offsets(params, inputs)[None]
    else:
        means = means + jax.vmap(emission_offsets, in_axes=(None, 0))(params, inputs)
    covs = jnp.einsum("tni,gtij,tmj->gtnm", weights, moments.predicted_covs, weights) + noise[None]
    if trials.may_miss:
        observed = ~jnp.isnan(trials.emissions)
        means = jnp.where(observed, means, 0.0)
        own = observed[trials.representatives]
        both = own[..., :, None] & own[..., None, :]
        covs = jnp.where(both, covs, jnp.eye(covs.shape[-1], dtype=covs.dtype)[None, None])
    return means, covs
