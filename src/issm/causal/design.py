r"""Which clamps to try next: those that are expected to tell most about the dynamics.

The information that one trial under a plan $\pi$ will carry about row i of $Θ = [A, B, b]$ is expected to be
$I_i(\pi) = \sum_{t \ge 1} (1 - c_{t,i})\, (Q_{oo}^{-1})_{ii}\, E[z_t z_t^\top \mid do(\pi)]$ with $z_t = [x_{t-1}; u_t; 1]$. The
second moments follow from the forward recursion in closed form, and the information of independent trials adds up.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from issm._check import fail
from issm._compile import jit_quickly
from issm._linalg import symmetrize
from issm._tables import format_table
from issm.causal.compare import check_count
from issm.causal.design_arguments import as_bounds, as_candidates, as_information
from issm.causal.excitation import Weights, predicted_moments, row_precisions, row_sums
from issm.interventions import Intervention
from issm.models.fields import TimeVarying
from issm.models.lgssm import ParamsLGSSM, check_params
from issm.models.trials import Plan, as_plan

CRITERIA = ("D", "A")
CANDIDATES_AT_ONCE = 16
STEP_SIZE = 0.05
"""Largest change of a clamp in one step of the refinement, as a share of the range of its state."""


class Design(eqx.Module):
    """The next trials; result of `design_interventions`.

    Attributes:
        plans: Their clamps, one trial each, `(budget, num_timesteps, state_dim)`.
        chosen: Which candidate each of them was (before refinement), `(budget,)`.
        criterion: Value of the criterion, higher is better, before the first trial and after each, `(budget + 1,)`: "D" half the
            log determinant of the information about A, "A" minus the sum of the variances of its entries, an effect minus its
            variance.
        refined_criterion: The same after all trials with the values refined; that of the last trial if none were.
        information: Information expected after all trials, row by row, `(state_dim, num_regressors, num_regressors)`.
        standard_errors: Standard errors of A to be expected if the states were seen, `(state_dim, state_dim)`.

    References:
        Pukelsheim (2006), *Optimal Design of Experiments*, ch. 6.

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[1.0]], [0.5])
        >>> candidates = [issm.do({0: v}, num_timesteps=5, state_dim=1, stop=2) for v in (0.0, 1.0, -3.0)]
        >>> issm.design_interventions(params, candidates, budget=2).chosen.tolist()
        [2, 2]
    """

    plans: Intervention
    chosen: Int[Array, " budget"]
    criterion: Float[Array, " budget_plus_1"]
    refined_criterion: Float[Array, ""]
    information: Float[Array, "state_dim regressors regressors"]
    standard_errors: Float[Array, "state_dim state_dim"]

    def summary(self) -> str:
        """A table of the trials in the order of their choice.

        Returns:
            Several lines.
        """
        rows = []
        for k, candidate in enumerate(self.chosen):
            mask, value = (np.asarray(leaf[k]) for leaf in (self.plans.mask, self.plans.value))
            held = [
                f"{i}: {mask[:, i].sum()} steps, {value[mask[:, i], i].min():.3g} … {value[mask[:, i], i].max():.3g}"
                for i in np.flatnonzero(mask.any(axis=0))
            ]
            rows.append([f"trial {k}", candidate, "; ".join(held) or "nothing", self.criterion[k + 1]])
        return format_table(["", "candidate", "state: held", "criterion after"], rows, title="Next trials")


def design_interventions(
    params: ParamsLGSSM,
    candidates: Intervention | Sequence[Intervention],
    *,
    budget: int,
    criterion: str | Callable[[ParamsLGSSM], Any] = "D",
    information: Any = None,
    inputs: Any = None,
    refine: int = 0,
    bounds: Any = None,
) -> Design:
    r"""Choose the next trials among candidate plans, so that the dynamics (or one effect) will be known best.

    Greedy: each trial is the candidate that raises the criterion most given those before it; a candidate may be chosen again.
    For "D" a greedy choice is within a factor $1 - 1/e$ of the best gain. The information is that of seen states (see the module's
    equation, rows apart): with noisy emissions less is learned, but of every plan, so that the order of plans is kept roughly. The
    parameters are the best guess so far; after each batch, fit and design again.

    Args:
        params: Best guess of the model, with constant dynamics weights.
        candidates: Plans that could be carried out, a list of plans `(num_timesteps, state_dim)` or one `Intervention` with a
            leading axis of candidates.
        budget: Number of trials to choose, at least 1.
        criterion: "D" (smallest confidence ellipsoid of A), "A" (smallest sum of the variances of its entries), or a
            differentiable function of the parameters that returns one number, such as a named effect: the variance of its
            estimate, to first order in the dynamics, is then made smallest.
        information: What is known already, `(state_dim, num_regressors, num_regressors)`, as in `Identifiability.information`.
            None: what one trial without clamps is expected to tell.
        inputs: Soft inputs of a trial, `(num_timesteps, input_dim)`. Needed if the model has inputs.
        refine: Number of gradient steps on the values of the chosen clamps, each step of each trial by itself; their times and
            states stay. Zero: none.
        bounds: Lowest and highest value for the refinement, two numbers or two arrays `(state_dim,)`; None: those among the
            candidates, state by state.

    Returns:
        The trials and what to expect of them.

    Raises:
        ValueError: If the budget is below 1, the candidates are none or differ in shape, `information` is singular, or an
            argument has the wrong shape, type or values.

    References:
        Pukelsheim (2006), *Optimal Design of Experiments*, ch. 6 (criteria); Nemhauser, Wolsey & Fisher (1978), *Mathematical
        Programming* 14 (the greedy bound).

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params(
        ...     [0.0, 0.0], [0.1, 0.1], [[0.5, 0.0], [0.5, 0.5]], [0.1, 0.1], [[1.0, 0.0], [0.0, 1.0]], [0.1, 0.1])
        >>> sizes = dict(num_timesteps=10, state_dim=2, start=2, stop=8)
        >>> candidates = [issm.do({i: v}, **sizes) for i in (0, 1) for v in (-1.0, 1.0)]
        >>> design = issm.design_interventions(params, candidates, budget=2, refine=20, bounds=(-2.0, 2.0))
        >>> bool(design.refined_criterion > design.criterion[-1])
        True
    """
    check_params(params)
    if isinstance(params.dynamics.weights, TimeVarying):
        fail(
            "params.dynamics.weights", got="a TimeVarying", expected="one matrix", remedy="Design for constant weights."
        )
    check_count("budget", budget, 1)
    check_count("refine", refine, 0)
    plans = as_candidates(candidates, params.state_dim)
    checked = as_plan(
        params, inputs, plans, num_timesteps=plans.num_timesteps, num_trials=plans.mask.shape[0],
        interventions_name="candidates",
    )  # fmt: skip
    if checked.inputs.ndim == 3:
        fail(
            "inputs",
            got=f"shape {tuple(checked.inputs.shape)}",
            expected="(num_timesteps, input_dim)",
            remedy="All candidates get the same inputs.",
        )
    if not callable(criterion) and criterion not in CRITERIA:
        fail(
            "criterion",
            got=repr(criterion),
            expected="'D', 'A' or a function of the parameters",
            remedy="See the Args.",
        )
    kind = criterion if isinstance(criterion, str) else "effect"
    slopes = _slopes(params, criterion) if callable(criterion) else None
    known = as_information(params, information)
    limits = as_bounds(checked.intervention, bounds)
    return _design(params, checked, known, slopes, limits, kind, int(budget), int(refine))


def expected_information(params: ParamsLGSSM, plan: Plan) -> Float[Array, "state_dim regressors regressors"]:
    """What one trial under a plan without a trial axis is expected to tell about every row."""
    one = jax.tree.map(lambda leaf: leaf[None], plan)
    precisions = row_precisions(params, one.intervention.mask)
    return row_sums(predicted_moments(params, one), Weights(precisions, precisions), one.inputs)


@partial(jit_quickly, static_argnames=("kind", "budget", "refine"))
def _design(
    params: ParamsLGSSM,
    candidates: Plan,
    known: Array | None,
    slopes: Array | None,
    bounds: tuple[Array, Array],
    kind: str,
    budget: int,
    refine: int,
) -> Design:
    plans, state_dim = candidates.intervention, params.state_dim
    information = lambda plan: expected_information(params, Plan(candidates.inputs, plan))  # noqa: E731
    value = lambda total: _criterion(total, slopes, kind, state_dim)  # noqa: E731
    if known is None:
        known = information(jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), plans))
    each = lax.map(information, plans, batch_size=CANDIDATES_AT_ONCE)

    def choose(total: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        values = lax.map(value, total[None] + each, batch_size=CANDIDATES_AT_ONCE)
        best = jnp.argmax(values)
        return total + each[best], (best.astype(jnp.int32), values[best])

    total, (chosen, values) = lax.scan(choose, known, None, length=budget)
    plans = jax.tree.map(lambda leaf: leaf[chosen], plans)
    refined = values[-1]
    if refine:
        plans, total, refined = _refine(plans, known, information, value, bounds, refine)
    variances = jnp.diagonal(_covariances(total), axis1=1, axis2=2)[:, :state_dim]
    return Design(
        plans=plans,
        chosen=chosen,
        criterion=jnp.concatenate([value(known)[None], values]),
        refined_criterion=refined,
        information=total,
        standard_errors=jnp.sqrt(variances),
    )


def _refine(
    plans: Intervention,
    known: Array,
    information: Callable[[Intervention], Array],
    value: Callable[[Array], Array],
    bounds: tuple[Array, Array],
    num_steps: int,
) -> tuple[Intervention, Array, Array]:
    """Ascend along the clamp values inside the bounds, and keep the best that was met."""
    lowest, highest = (bound[None, None] for bound in bounds)
    scale = jnp.where(highest > lowest, highest - lowest, 1.0)
    with_values = lambda unit: eqx.tree_at(lambda p: p.value, plans, jnp.where(plans.mask, unit * scale, 0.0))  # noqa: E731

    def objective(unit: Array) -> tuple[Array, Array]:
        total = known + lax.map(information, with_values(unit)).sum(axis=0)
        return value(total), total

    start = plans.value / scale

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        unit, best_unit, best = carry
        (here, _), slope = jax.value_and_grad(objective, has_aux=True)(unit)
        better = here > best
        best_unit, best = jnp.where(better, unit, best_unit), jnp.where(better, here, best)
        largest = jnp.abs(slope).max()
        change = STEP_SIZE * slope / jnp.where(largest > 0, largest, 1.0)
        unit = jnp.clip(unit + change, lowest / scale, highest / scale)
        return (unit, best_unit, best), None

    (last, best_unit, best), _ = lax.scan(step, (start, start, objective(start)[0]), None, length=num_steps)
    unit = jnp.where(objective(last)[0] > best, last, best_unit)
    refined, total = objective(unit)
    return with_values(unit), total, refined


def _criterion(total: Array, slopes: Array | None, kind: str, state_dim: int) -> Float[Array, ""]:
    covariances = _covariances(total)
    if kind == "effect":
        return -jnp.einsum("ip,ipq,iq->", slopes, covariances, slopes)
    about_weights = covariances[:, :state_dim, :state_dim]
    if kind == "A":
        return -jnp.trace(about_weights, axis1=1, axis2=2).sum()
    return -jnp.log(jnp.diagonal(jnp.linalg.cholesky(about_weights), axis1=1, axis2=2)).sum()


def _covariances(information: Float[Array, "rows dim dim"]) -> Float[Array, "rows dim dim"]:
    scale = 1 / jnp.sqrt(jnp.diagonal(information, axis1=1, axis2=2))
    scaled = symmetrize(information * scale[:, :, None] * scale[:, None, :])
    eye = jnp.broadcast_to(jnp.eye(scaled.shape[-1], dtype=scaled.dtype), scaled.shape)
    inverse = jax.vmap(lambda m, e: jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(m), True), e))(scaled, eye)
    return symmetrize(inverse * scale[:, :, None] * scale[:, None, :])


def _slopes(params: ParamsLGSSM, effect: Callable[[ParamsLGSSM], Any]) -> Float[Array, "state_dim regressors"]:
    """Derivative of an effect with respect to every row of [A, B, b]."""
    shape = jax.eval_shape(effect, params)
    if not hasattr(shape, "shape") or shape.shape != ():
        fail(
            "criterion",
            got=f"a function that returns {shape}",
            expected="one number",
            remedy="Name one effect, such as `lambda p: issm.total_effects(p).states[1, 0]`.",
        )
    slope = jax.grad(effect)(params).dynamics
    parts = (slope.weights, slope.input_weights, slope.bias)
    if any(isinstance(part, TimeVarying) for part in parts):
        fail("params.dynamics", got="a TimeVarying", expected="constant fields", remedy="Design for constant dynamics.")
    return jnp.concatenate([parts[0], parts[1], parts[2][:, None]], axis=1)
