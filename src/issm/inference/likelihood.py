r"""The marginal log-likelihood, with its derivative by Fisher's identity.

The score of the marginal likelihood is the expected score of the complete data, so that one smoother gives the gradient with
respect to everything. For the transitions it is read off the adjoints $r_t, N_t$ of the smoother, which needs no inverse of
Q: with $x_t = A_t x_{t-1} + a_t + w_t$,

$$\frac{\partial \ell}{\partial a_t} = r_t, \quad
\frac{\partial \ell}{\partial A_t} = r_t\, {m^s_{t-1}}^\top - N_t A_t P_{t-1}, \quad
\frac{\partial \ell}{\partial Q_t} = \tfrac12 (r_t r_t^\top - N_t).$$

The rule is a linear map of tangents: it serves forward mode, and by transposition reverse mode; second derivatives
differentiate the smoother.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jaxtyping import Array, Float

from issm.inference.emission_score import emission_score, is_score_of
from issm.inference.methods import choose_method, filter_and_smooth
from issm.inference.moments import Moments
from issm.inference.observations import whiten
from issm.models.fields import TimeVarying, apply_weights, is_diagonal, values_of
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import emission_offsets, free_transitions
from issm.models.trials import Trials


def log_likelihoods(params: ParamsLGSSM, trials: Trials, method: str = "auto") -> Float[Array, " num_trials"]:
    """The marginal log-likelihood of every trial."""
    return _log_likelihoods(params, trials, choose_method(method, params, trials))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _log_likelihoods(params: ParamsLGSSM, trials: Trials, method: str) -> Float[Array, " num_trials"]:
    return filter_and_smooth(params, trials, method).logliks.sum(axis=1)


def _log_likelihoods_jvp(method: str, primals: tuple[ParamsLGSSM, Trials], tangents: tuple) -> tuple[Array, Array]:
    params, trials = primals
    in_total = replace(trials, by_step=False)  # the squares that the score needs say the likelihood of a trial as well
    moments = filter_and_smooth(params, in_total, method)
    return moments.logliks.sum(axis=1), _tangent(params, trials, moments, tangents)


_log_likelihoods.defjvp(_log_likelihoods_jvp, symbolic_zeros=True)


def likelihood_tangent(
    params: ParamsLGSSM, trials: Trials, moments: Moments, tangent: ParamsLGSSM
) -> Float[Array, " num_trials"]:
    """The derivative of the log-likelihoods along a tangent of the parameters, given the moments at these parameters."""
    fixed = jax.tree.map(partial(zero_from_primal, symbolic_zeros=True), trials)
    return _tangent(params, trials, moments, (tangent, fixed))


def _tangent(params: ParamsLGSSM, trials: Trials, moments: Moments, tangents: tuple) -> Array:
    of_transitions = _transition_tangent(params, trials, moments, tangents)
    return of_transitions + _emission_tangent(params, trials, moments, tangents)


def _transition_tangent(params: ParamsLGSSM, trials: Trials, moments: Moments, tangents: tuple) -> Array:
    """The part that comes through the initial distribution, the dynamics and the clamps, `(num_trials,)`."""
    params_tangent, trials_tangent = _instantiate(tangents)
    inputs, clamps = trials.plan.inputs, trials.plan.intervention
    num_timesteps = trials.emissions.shape[1]

    no_inputs = jnp.zeros((num_timesteps, params.input_dim), inputs.dtype)
    free, free_tangent = jax.jvp(lambda p: free_transitions(p, no_inputs), (params,), (params_tangent,))
    shift = lambda p, u: free_transitions(p, u).shift  # noqa: E731
    shifts = shift if inputs.ndim == 2 else jax.vmap(shift, in_axes=(None, 0))
    _, shift_tangent = jax.jvp(shifts, (params, inputs), (params_tangent, trials_tangent.plan.inputs))

    clamped = _with_trial_axis(clamps.mask)
    value_tangent = _with_trial_axis(trials_tangent.plan.intervention.value)
    variance_tangent = _with_trial_axis(trials_tangent.plan.intervention.variance)
    means = _previous(moments.smoothed_means)
    by_shift = jnp.where(clamped, value_tangent, _with_trial_axis(shift_tangent))
    through_weights = jnp.einsum("tij,ktj->kti", free_tangent.weights, means)
    through_cov = jnp.einsum("tij,ktj->kti", free_tangent.cov, jnp.where(clamped, 0.0, moments.adjoints)) / 2
    by_trial = by_shift + jnp.where(clamped, variance_tangent * moments.adjoints / 2, through_weights + through_cov)

    plan_of_patterns = trials.of_patterns().plan
    masked = _with_trial_axis(plan_of_patterns.intervention.mask)[..., None]
    informations = jnp.where(masked, 0.0, moments.informations)
    weights = jnp.where(masked, 0.0, free.weights[None])
    explained = informations @ weights @ _previous(moments.filtered_covs)
    informations = jnp.where(jnp.swapaxes(masked, -1, -2), 0.0, informations)
    by_pattern = jnp.einsum("gtij,tij->g", explained, free_tangent.weights)
    by_pattern = by_pattern + jnp.einsum("gtij,tij->g", informations, free_tangent.cov) / 2
    own_informations = trials.spread(jnp.diagonal(moments.informations, axis1=-2, axis2=-1))
    by_clamp_noise = jnp.where(clamped, variance_tangent * own_informations / 2, 0.0)
    return (by_trial * moments.adjoints - by_clamp_noise).sum(axis=(1, 2)) - trials.spread(by_pattern)


def _emission_tangent(params: ParamsLGSSM, trials: Trials, moments: Moments, tangents: tuple) -> Array:
    """The part that comes through the emissions, `(num_trials,)`."""
    params_tangent, trials_tangent = tangents
    is_fixed = lambda leaf: isinstance(leaf, SymbolicZero) or leaf.size == 0  # noqa: E731
    fixed_data = is_fixed(trials_tangent.emissions) and is_fixed(trials_tangent.plan.inputs)
    if fixed_data and is_score_of(params, trials):
        return emission_score(params, trials, moments).along(_instantiate(params_tangent))
    return _tangent_by_trial(params, trials, moments, tangents)


def _tangent_by_trial(params: ParamsLGSSM, trials: Trials, moments: Moments, tangents: tuple) -> Array:
    """The same for any model and any tangent, by differentiating what is expected; trials are visited one by one to save memory."""
    params_tangent, trials_tangent = tangents
    differentiates_data = not isinstance(trials_tangent.emissions, SymbolicZero)
    pattern = trials.spread(jnp.arange(trials.num_patterns))
    shared_inputs = trials.plan.inputs.ndim == 2

    def all_trials(params: ParamsLGSSM, emissions: Array, inputs: Array) -> Array:
        def one(at: tuple) -> Array:
            emissions, means, pattern, *own_inputs = at
            covs = lax.dynamic_index_in_dim(moments.smoothed_covs, pattern, keepdims=False)
            inputs_here = inputs if shared_inputs else own_inputs[0]
            return _expected_log_prob(params, emissions, inputs_here, means, covs, trials.may_miss)

        own_inputs = () if shared_inputs else (inputs,)
        return lax.map(jax.checkpoint(one), (emissions, moments.smoothed_means, pattern, *own_inputs))

    if differentiates_data:
        tangents = (_instantiate(params_tangent), trials_tangent.emissions, _instantiate(trials_tangent.plan.inputs))
        return jax.jvp(all_trials, (params, trials.emissions, trials.plan.inputs), tangents)[1]
    fixed_data = lambda params, inputs: all_trials(params, trials.emissions, inputs)  # noqa: E731
    tangents = (_instantiate(params_tangent), _instantiate(trials_tangent.plan.inputs))
    return jax.jvp(fixed_data, (params, trials.plan.inputs), tangents)[1]


def _expected_log_prob(
    params: ParamsLGSSM, emissions: Array, inputs: Array, means: Array, covs: Array, may_miss: bool
) -> Array:
    r"""$\sum_t E[\log p(y_t \mid x_t)]$ of one sequence for given moments of the states."""
    varies = any(isinstance(field, TimeVarying) for field in (params.emissions.weights, params.emissions.cov))
    if varies or not is_diagonal(params.emissions.cov):
        whitened = whiten(params, emissions, inputs, may_miss=may_miss)
        residuals, weights = whitened.residuals(means), values_of(whitened.weights)
        if weights.ndim == 2:
            spread = jnp.einsum("ni,ij,nj->", weights, covs.sum(axis=0), weights)
        else:
            spread = jnp.einsum("tni,tij,tnj->", weights, covs, weights)
        return whitened.log_norm.sum() - ((residuals**2).sum() + spread) / 2
    weights, variances = params.emissions.weights, values_of(params.emissions.cov)
    residuals = emissions - apply_weights(weights, means) - emission_offsets(params, inputs)
    if may_miss:
        observed = ~jnp.isnan(emissions)
        residuals = jnp.where(observed, residuals, 0.0)
        share = observed.astype(variances.dtype)
        counts = share.sum(axis=0)
        spread = jnp.einsum("ni,nij,nj->n", weights, jnp.einsum("tn,tij->nij", share, covs), weights)
    else:
        counts = jnp.full(variances.shape, emissions.shape[0], variances.dtype)
        spread = jnp.einsum("ni,ij,nj->n", weights, covs.sum(axis=0), weights)
    squares = (residuals**2).sum(axis=0) + spread
    return -(counts * jnp.log(2 * jnp.pi * variances) + squares / variances).sum() / 2


def _instantiate(tangents: Any) -> Any:
    """Zeros in place of symbolic zeros."""
    is_zero = lambda leaf: isinstance(leaf, SymbolicZero)  # noqa: E731

    def zeros(leaf: Any) -> Any:
        if not is_zero(leaf):
            return leaf
        return (
            np.zeros(leaf.shape, leaf.dtype) if leaf.dtype == jax.dtypes.float0 else jnp.zeros(leaf.shape, leaf.dtype)
        )

    return jax.tree.map(zeros, tangents, is_leaf=is_zero)


def _with_trial_axis(array: Array) -> Array:
    return array if array.ndim == 3 else array[None]


def _previous(by_step: Array) -> Array:
    """The value one step before; zero before the first."""
    return jnp.concatenate([jnp.zeros_like(by_step[:, :1]), by_step[:, :-1]], axis=1)
