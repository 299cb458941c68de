r"""What clamps and data can tell about the dynamics: which states moved, which edges were driven, and how well each is known."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Int

from issm._check import fail
from issm._compile import jit_quickly
from issm.causal.excitation import (
    StateMoments,
    Weights,
    clamp_moments,
    condition,
    constant_dynamics,
    predicted_moments,
    row_precisions,
    row_sums,
    smoothed_states,
)
from issm.causal.history import check_plan
from issm.causal.report import Identifiability
from issm.causal.support import support_of
from issm.inference.information import free_directions, information_of
from issm.inference.methods import choose_method, filter_and_smooth
from issm.interventions import Intervention
from issm.models.fields import values_of
from issm.models.lgssm import ParamsLGSSM, check_params
from issm.models.trials import Plan, Trials, as_plan, as_trials

RANK_TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
"""Eigenvalue, every regressor scaled to a second moment of one, below which a direction counts as never excited."""

INFORMATION_TOLERANCE = {"float64": 1e-6, "float32": 1e-3}
"""The same for the observed information. At an estimate it is known no better: the score there is not exactly zero."""

LARGEST_LOADING = 1e-2
"""An edge is silent if so much of it (as a unit vector) lies in what is never excited."""


def identifiability(
    interventions: Intervention,
    params: ParamsLGSSM | None = None,
    emissions: Any = None,
    inputs: Any = None,
    *,
    trainable: Any = None,
) -> Identifiability:
    r"""What clamps and data can tell about the dynamics, edge by edge.

    Three questions, by what is given. The clamps alone: what do they drive, free states resting at zero? With parameters: what is
    the excitation $\sum E[z_t z_t^\top]$ to be expected under the model, before any data? With emissions too: what is it, by
    the smoother, and what are the standard errors by the observed information $-\nabla^2 \log p(y \mid do(\cdot), u)$ of all that was
    estimated?

    Args:
        interventions: The clamps of the data, `(num_timesteps, state_dim)` or with a leading trial axis.
        params: Model parameters; for standard errors, a maximum of the likelihood.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs, `(num_timesteps, input_dim)`, shared or one such array for each trial. Needed if the model has
            inputs.
        trainable: What was estimated, as for `fit_em`; None: everything but `TimeVarying` fields. False: nothing, and no standard
            errors are computed, which in a large model take longer than all the rest.

    Returns:
        The report; `summary()` prints it and `check_plan` asks it about a plan.

    Raises:
        ValueError: If emissions or inputs come without parameters, or an argument has the wrong shape, type or values.

    References:
        Ljung (1999), *System Identification*, sec. 13.2; Harvey (1989), *Forecasting, Structural Time Series Models and the
        Kalman Filter*, sec. 3.4.5 (observed information); Nejatbakhsh & Wang (2025), sec. 3.

    Examples:
        >>> import issm
        >>> plan = issm.do({0: [1.0, -1.0, 2.0]}, num_timesteps=20, state_dim=2, start=5, stop=8)
        >>> print(issm.identifiability(plan).summary().splitlines()[0])
        state 1: never clamped
        >>> params = issm.make_lgssm_params(
        ...     [0.0, 0.0], [1.0, 1.0], [[0.5, 0.0], [0.4, 0.5]], [0.1, 0.1], [[1.0, 0.0], [0.0, 1.0]], [0.1, 0.1])
        >>> issm.identifiability(plan, params).rank.tolist()
        [3, 3]
    """
    check_plan("interventions", interventions)
    if params is None:
        for name, given in (("emissions", emissions), ("inputs", inputs), ("trainable", trainable)):
            if given is not None:
                fail(name, got="a value but no params", expected="params too", remedy="Pass the fitted parameters.")
        batched = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), interventions)
        return _from_clamps(batched)
    check_params(params)
    if emissions is None:
        num_trials = interventions.mask.shape[0] if interventions.mask.ndim == 3 else None
        if num_trials is None and np.ndim(inputs) == 3:
            num_trials = np.shape(inputs)[0]
        plan = as_plan(params, inputs, interventions, num_timesteps=interventions.num_timesteps, num_trials=num_trials)
        return _from_model(params, _with_trial_axis(plan))
    trials = as_trials(params, emissions, inputs, interventions)
    directions = None if trainable is False else free_directions(params, trainable)
    return _from_data(params, trials, directions, choose_method("auto", params, trials))


@jit_quickly
def _from_clamps(clamps: Intervention) -> Identifiability:
    alive = jnp.ones(clamps.mask.shape[:2], bool)
    by_trial = _count_once(clamps, alive).by_trial
    weights = Weights(by_trial, by_trial[:1])  # known states have no covariance, whatever the pattern
    no_inputs = jnp.zeros((clamps.num_timesteps, 0), clamps.value.dtype)
    return _report(clamps, alive, clamp_moments(clamps), weights, no_inputs, None, "clamps")


@jit_quickly
def _from_model(params: ParamsLGSSM, plan: Plan) -> Identifiability:
    moments = predicted_moments(params, plan)
    clamps = _for_every_trial(plan.intervention, moments.means.shape[0])
    alive = jnp.ones(clamps.mask.shape[:2], bool)
    return _report(clamps, alive, moments, _count_once(clamps, alive), plan.inputs, params, "model")


@partial(jit_quickly, static_argnames="method")
def _from_data(params: ParamsLGSSM, trials: Trials, directions: Array | None, method: str) -> Identifiability:
    clamps = _for_every_trial(trials.plan.intervention, trials.num_trials)
    observed = ~jnp.isnan(trials.emissions).all(axis=2)
    alive = jnp.flip(jnp.cumsum(jnp.flip(observed, 1), 1), 1) > 0  # what comes after the last observation is no data
    chosen = trials.representatives
    by_trial = _count_once(clamps, alive).by_trial
    weights = Weights(by_trial, by_trial[chosen])
    inputs = trials.plan.inputs
    if directions is None or not constant_dynamics(params):
        states = smoothed_states(filter_and_smooth(params, trials, method), trials)
        return _report(clamps, alive, states, weights, inputs, params, "data")
    information, moments = information_of(params, trials, directions, method)
    report = _report(clamps, alive, smoothed_states(moments, trials), weights, inputs, params, "data")
    errors = _standard_errors(params, information, directions)
    fields = lambda r: (r.standard_errors, r.silent)  # noqa: E731
    return eqx.tree_at(fields, report, (errors, report.silent | jnp.isinf(errors)), is_leaf=lambda leaf: leaf is None)


def _report(
    clamps: Intervention,
    alive: Bool[Array, "num_trials num_timesteps"],
    moments: StateMoments,
    weights: Weights,
    inputs: Array,
    params: ParamsLGSSM | None,
    source: str,
) -> Identifiability:
    mask = clamps.mask & alive[..., None]
    free = ~clamps.mask & alive[..., None]
    driven, driven_values = _driven(free, mask, clamps.value)
    excitation = row_sums(moments, weights, inputs)
    rank, ratio, silent = condition(excitation, RANK_TOLERANCE[excitation.dtype.name])
    state_dim = mask.shape[-1]
    edges = jnp.diagonal(silent, axis1=1, axis2=2)[:, :state_dim] > LARGEST_LOADING**2
    information, transition = None, None
    if params is None:
        edges = edges | (driven == 0)
    else:
        precisions = [row_precisions(params, clamps.mask), row_precisions(params, ~(weights.by_pattern > 0))]
        scaled = Weights(weights.by_trial * precisions[0], weights.by_pattern * precisions[1])
        information = row_sums(moments, scaled, inputs)
        transition = values_of(params.dynamics.weights) if constant_dynamics(params) else None
    return Identifiability(
        clamped_steps=mask.sum(axis=(0, 1), dtype=jnp.int32),
        num_values=jax.vmap(_count_distinct, in_axes=-1)(clamps.value, mask),
        free_arrivals=free[:, 1:].sum(axis=(0, 1), dtype=jnp.int32),
        driven_arrivals=driven,
        driven_values=driven_values,
        separated=(mask[..., :, None] != mask[..., None, :]).any(axis=(0, 1)),
        excitation=excitation,
        rank=rank,
        condition=ratio,
        information=information,
        standard_errors=None,
        silent=edges,
        weights=transition,
        support=support_of(mask, clamps.value),
        source=source,
    )


def _driven(free: Array, mask: Array, value: Array) -> tuple[Array, Array]:
    """For every edge: arrivals in a free target one step after its source was clamped, and the distinct values there."""
    before, value = mask[:, :-1], value[:, :-1]

    def target(free: Array) -> tuple[Array, Array]:
        both = before & free[..., None]
        return both.sum(axis=(0, 1), dtype=jnp.int32), jax.vmap(_count_distinct, in_axes=-1)(value, both)

    return jax.lax.map(target, jnp.moveaxis(free[:, 1:], -1, 0))


def _count_distinct(values: Array, chosen: Array) -> Int[Array, ""]:
    values = jnp.sort(jnp.where(chosen, values, jnp.inf).ravel())
    if values.size == 0:
        return jnp.zeros((), jnp.int32)
    is_new = jnp.concatenate([jnp.ones(1, bool), values[1:] != values[:-1]])
    return (is_new & jnp.isfinite(values)).sum(dtype=jnp.int32)


def _count_once(clamps: Intervention, alive: Array) -> Weights:
    """One for every arrival that a row learns from; a pattern of its own for every trial."""
    weights = (~clamps.mask & alive[..., None]).astype(clamps.value.dtype)
    return Weights(weights, weights)


def _standard_errors(params: ParamsLGSSM, information: Array, directions: Array) -> Array:
    size, dtype = information.shape[0], information.dtype
    curvature = jnp.abs(jnp.diagonal(information))
    scale = jnp.where(curvature > 0, 1 / jnp.sqrt(jnp.where(curvature > 0, curvature, 1.0)), 1.0)
    shares, vectors = jnp.linalg.eigh(information * scale[:, None] * scale[None])
    known = shares > size * INFORMATION_TOLERANCE[dtype.name]
    variances = (vectors**2 / jnp.where(known, shares, jnp.inf)[None]).sum(axis=1) * scale**2
    unknown = jnp.where(known[None], 0.0, vectors**2).sum(axis=1) > LARGEST_LOADING**2
    errors = directions @ jnp.where(unknown, 0.0, jnp.sqrt(jnp.where(unknown, 1.0, variances)))
    silent = directions @ unknown.astype(dtype) > 0
    _, unravel = ravel_pytree(params)
    return unravel(jnp.where(silent, jnp.inf, errors)).dynamics.weights


def _with_trial_axis(plan: Plan) -> Plan:
    return plan if plan.intervention.mask.ndim == 3 or plan.inputs.ndim == 3 else jax.tree.map(lambda x: x[None], plan)


def _for_every_trial(clamps: Intervention, num_trials: int) -> Intervention:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_trials, *leaf.shape[-2:])), clamps)
