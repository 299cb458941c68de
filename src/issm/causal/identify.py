r"""What clamps and data can tell about the dynamics: which states moved, which edges were driven, and how well each is known."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from issm._check import fail
from issm._tables import format_table, join_words
from issm.causal.excitation import (
    StateMoments,
    Weights,
    clamp_moments,
    condition,
    constant_dynamics,
    predicted_moments,
    row_precisions,
    row_sums,
    smoothed_moments,
)
from issm.causal.history import check_plan
from issm.causal.support import PlanCheck, Support, check_support, support_of
from issm.inference.information import free_directions, observed_information
from issm.inference.methods import choose_method
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM, check_params
from issm.models.trials import Plan, Trials, as_plan, as_trials

RANK_TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
"""Eigenvalue, every regressor scaled to a second moment of one, below which a direction counts as never excited."""

INFORMATION_TOLERANCE = {"float64": 1e-6, "float32": 1e-3}
"""The same for the observed information. At an estimate it is known no better: the score there is not exactly zero."""

LARGEST_LOADING = 1e-2
"""An edge is silent if so much of it (as a unit vector) lies in what is never excited."""


class Identifiability(eqx.Module):
    r"""Result of `identifiability`. Entry (i, j) of a matrix is about the edge from state j to state i, $A_{ij}$.

    Attributes:
        clamped_steps: Number of steps, over all trials, in which each state was clamped, `(state_dim,)`.
        num_values: Number of distinct values it was clamped to, `(state_dim,)`.
        free_arrivals: Number of arrivals (t = 1 ... T-1) in which it was free: its row is learned from these, `(state_dim,)`.
        driven_arrivals: Number of arrivals in which i was free one step after j was clamped, `(state_dim, state_dim)`.
        driven_values: Number of distinct values j was clamped to one step before those arrivals, same shape.
        separated: Whether some step clamps one of i and j and leaves the other free, same shape.
        excitation: $G_i = \sum_{W_i} E[z_t z_t^\top]$, row by row, with $z_t = [x_{t-1}; u_t; 1]$,
            `(state_dim, num_regressors, num_regressors)`.
        rank: Rank of every $G_i$ with its regressors scaled to a second moment of one, `(state_dim,)`; `num_regressors` is full.
        condition: Condition number of the same, `(state_dim,)`; infinite below full rank.
        information: Fisher information of $Θ_i = [A_i, B_i, b_i]$ if the states were seen: $G_i / Q_{ii}$ for a diagonal Q, given
            the other rows for a full one. None without parameters.
        standard_errors: Of every edge, by the observed information of the emissions, `(state_dim, state_dim)`; infinite where
            the data are silent, zero where the edge was not estimated. None without emissions, or where A varies in time.
        silent: Edges that the data cannot speak about, `(state_dim, state_dim)`. Without emissions or parameters: that the
            clamps alone do not drive, neither i free one step after j was clamped nor told apart from other regressors.
        weights: A, for the figures; None without parameters.
        support: What the clamps reached, for `check_plan`.
        source: What the excitation was computed from: "clamps" (free states rest at zero), "model" (expected under the model)
            or "data" (smoothed).

    References:
        Ljung (1999), *System Identification*, sec. 13.2 (persistence of excitation); Nejatbakhsh & Wang (2025), sec. 3.

    Examples:
        >>> import issm
        >>> report = issm.identifiability(issm.do({0: [1.0, 2.0]}, num_timesteps=6, state_dim=2, start=2, stop=4))
        >>> report.driven_arrivals.tolist(), report.silent.tolist()
        ([[1, 0], [2, 0]], [[False, True], [False, True]])
    """

    clamped_steps: Int[Array, " state_dim"]
    num_values: Int[Array, " state_dim"]
    free_arrivals: Int[Array, " state_dim"]
    driven_arrivals: Int[Array, "state_dim state_dim"]
    driven_values: Int[Array, "state_dim state_dim"]
    separated: Bool[Array, "state_dim state_dim"]
    excitation: Float[Array, "state_dim regressors regressors"]
    rank: Int[Array, " state_dim"]
    condition: Float[Array, " state_dim"]
    information: Float[Array, "state_dim regressors regressors"] | None
    standard_errors: Float[Array, "state_dim state_dim"] | None
    silent: Bool[Array, "state_dim state_dim"]
    weights: Float[Array, "state_dim state_dim"] | None
    support: Support
    source: str = eqx.field(static=True)

    @property
    def never_clamped(self) -> Bool[Array, " state_dim"]:
        """States that no step clamps."""
        return self.clamped_steps == 0

    @property
    def one_value(self) -> Bool[Array, " state_dim"]:
        """States clamped to one value only: the slope of what they do rests on their own noise, or on the way back."""
        return self.num_values == 1

    @property
    def inseparable(self) -> Bool[Array, "state_dim state_dim"]:
        """Pairs of clamped states of which no step clamps one without the other."""
        clamped = ~self.never_clamped
        others = ~jnp.eye(clamped.shape[0], dtype=bool)
        return clamped[:, None] & clamped[None] & ~self.separated & others

    def check_plan(self, plan: Intervention) -> PlanCheck:
        """Whether the clamps behind this report reach a plan.

        Args:
            plan: Clamps of a question, `(num_timesteps, state_dim)` or with a leading trial axis.

        Returns:
            What of the plan was never done: states never clamped, values beyond the range, combinations outside the span.

        Raises:
            ValueError: If the plan is none, or has other states.
        """
        return check_support(self.support, plan)

    def summary(self) -> str:
        """The report as text: findings in words, then a table of the states and one of the edges.

        Returns:
            Several lines.
        """
        states = [
            [f"state {i}", *(field[i] for field in (self.clamped_steps, self.num_values)), self.free_arrivals[i],
             f"{int(self.rank[i])}/{self.excitation.shape[-1]}", self.condition[i]]
            for i in range(len(self.rank))
        ]  # fmt: skip
        heads = ["", "steps clamped", "values", "free arrivals", "rank", "condition"]
        edges_head = ["edge", "driven arrivals", "values", "silent"]
        estimated = self.weights is not None
        edges_head += ["weight"] * estimated + ["s.e."] * (self.standard_errors is not None)
        edges = []
        for i, j in np.ndindex(*self.silent.shape):
            row: list[Any] = [f"{j} → {i}", self.driven_arrivals[i, j], self.driven_values[i, j], self.silent[i, j]]
            row += [self.weights[i, j]] if self.weights is not None else []
            row += [self.standard_errors[i, j]] if self.standard_errors is not None else []
            edges.append(row)
        basis = {
            "clamps": "by the clamps alone, free states at rest at zero",
            "model": "as expected under the model",
            "data": "as smoothed from the data",
        }[self.source]
        parts = [*self._findings(), "", format_table(heads, states, title=f"States (excitation {basis})"), ""]
        return "\n".join([*parts, format_table(edges_head, edges, title="Edges")])

    def _findings(self) -> list[str]:
        numbers = lambda flags: [int(i) for i in np.flatnonzero(np.asarray(flags))]  # noqa: E731
        found = [
            f"state {join_words(numbers(flags))}: {words}"
            for flags, words in (
                (self.never_clamped, "never clamped"),
                (self.one_value, "clamped to one value only"),
                (self.free_arrivals == 0, "never free, its own dynamics are not seen"),
            )
            if numbers(flags)
        ]
        pairs = np.argwhere(np.triu(np.asarray(self.inseparable)))
        found += [f"states {i} and {j}: always clamped together" for i, j in pairs]
        silent = [f"{j} → {i}" for i, j in np.argwhere(np.asarray(self.silent))]
        whom = "the clamps alone do not drive" if self.source == "clamps" else "the data are silent about"
        found += [f"{whom} {', '.join(silent)}"] if silent else []
        return found or ["every edge is spoken about"]


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


@jax.jit
def _from_clamps(clamps: Intervention) -> Identifiability:
    alive = jnp.ones(clamps.mask.shape[:2], bool)
    by_trial = _count_once(clamps, alive).by_trial
    weights = Weights(by_trial, by_trial[:1])  # known states have no covariance, whatever the pattern
    no_inputs = jnp.zeros((clamps.num_timesteps, 0), clamps.value.dtype)
    return _report(clamps, alive, clamp_moments(clamps), weights, no_inputs, None, "clamps")


@jax.jit
def _from_model(params: ParamsLGSSM, plan: Plan) -> Identifiability:
    moments = predicted_moments(params, plan)
    clamps = _for_every_trial(plan.intervention, moments.means.shape[0])
    alive = jnp.ones(clamps.mask.shape[:2], bool)
    return _report(clamps, alive, moments, _count_once(clamps, alive), plan.inputs, params, "model")


@jax.jit(static_argnames="method")
def _from_data(params: ParamsLGSSM, trials: Trials, directions: Array | None, method: str) -> Identifiability:
    clamps = _for_every_trial(trials.plan.intervention, trials.num_trials)
    observed = ~jnp.isnan(trials.emissions).all(axis=2)
    alive = jnp.flip(jnp.cumsum(jnp.flip(observed, 1), 1), 1) > 0  # what comes after the last observation is no data
    chosen = trials.representatives
    by_trial = _count_once(clamps, alive).by_trial
    weights = Weights(by_trial, by_trial[chosen])
    moments = smoothed_moments(params, trials, method)
    report = _report(clamps, alive, moments, weights, trials.plan.inputs, params, "data")
    if directions is None or not constant_dynamics(params):
        return report
    errors = _standard_errors(params, trials, directions, method)
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
        transition = params.dynamics.weights if constant_dynamics(params) else None
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


def _standard_errors(params: ParamsLGSSM, trials: Trials, directions: Array, method: str) -> Array:
    information = observed_information(params, trials, directions, method)
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
