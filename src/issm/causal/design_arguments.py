"""What the design of experiments is given: candidates, what is known already, and bounds, checked and in one form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from issm._check import as_float_array, check_shape, common_float_dtype, fail
from issm._host import is_concrete, on_host, to_device
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM


def as_candidates(candidates: Any, state_dim: int) -> Intervention:
    """One `Intervention` with a leading axis of candidates."""
    if isinstance(candidates, Intervention):
        if candidates.mask.ndim != 3 or not candidates.mask.shape[0]:
            fail(
                "candidates",
                got=f"shape {tuple(candidates.mask.shape)}",
                expected="(num_candidates, num_timesteps, state_dim)",
                remedy="Pass several plans, in a list or stacked.",
            )
        return candidates
    if not isinstance(candidates, (list, tuple)) or not candidates or not all(map(_is_plan, candidates)):
        fail(
            "candidates",
            got=f"a {type(candidates).__name__}",
            expected="plans (num_timesteps, state_dim) in a list, or an Intervention of several",
            remedy="Build each with `do` or `stimulate`.",
        )
    shape = candidates[0].mask.shape
    for k, plan in enumerate(candidates):
        check_shape(
            f"candidates[{k}]", plan.mask, shape, ("num_timesteps", "state_dim"), "Make all plans equally long."
        )
    dtype = common_float_dtype(*candidates)

    def stack(*leaves: Array) -> Array:
        xp, leaves = on_host(*leaves)
        return to_device(xp.stack([leaf if leaf.dtype == bool else leaf.astype(dtype) for leaf in leaves]))

    return jax.tree.map(stack, *candidates)


def _is_plan(plan: Any) -> bool:
    return isinstance(plan, Intervention) and plan.mask.ndim == 2


def as_information(params: ParamsLGSSM, information: Any) -> Array | None:
    """What is known already, row by row; it must say something about every regressor."""
    if information is None:
        return None
    num_regressors = params.state_dim + params.input_dim + 1
    information = as_float_array("information", information, params.initial.mean.dtype)
    axes = ("state_dim", "num_regressors", "num_regressors")
    remedy = "Pass `Identifiability.information` of the same model."
    check_shape("information", information, (params.state_dim, num_regressors, num_regressors), axes, remedy)
    if is_concrete(information):
        values = np.asarray(information, np.float64)
        scale = np.sqrt(np.maximum(np.diagonal(values, axis1=1, axis2=2), np.finfo(float).tiny))
        smallest = np.linalg.eigvalsh(values / scale[:, :, None] / scale[:, None, :]).min()
        if not smallest > 1e-12:
            fail(
                "information",
                got=f"a matrix that is singular (smallest share {smallest:.1e})",
                expected="some information about everything in each row",
                remedy="Leave it out to start from one trial without clamps, or add the information of a prior.",
            )
    return information


def as_bounds(plans: Intervention, bounds: Any) -> tuple[Array, Array]:
    """Lowest and highest clamp value of every state; by default those among the candidates."""
    dtype, state_dim = plans.value.dtype, plans.state_dim
    if bounds is None:
        xp, (mask, value) = on_host(plans.mask, plans.value)
        used, axes = mask.any((0, 1)), (0, 1)
        lowest, highest = xp.where(mask, value, xp.inf).min(axes), xp.where(mask, value, -xp.inf).max(axes)
        return to_device(xp.where(used, lowest, 0.0), dtype), to_device(xp.where(used, highest, 0.0), dtype)
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
        fail("bounds", got=repr(bounds), expected="a lowest and a highest value", remedy="Pass (low, high).")
    ends = [as_float_array("bounds", end, dtype) for end in bounds]
    for end in ends:
        if end.shape not in ((), (state_dim,)):
            fail(
                "bounds", got=f"shape {end.shape}", expected=f"() or ({state_dim},)", remedy="One value for each state."
            )
    lowest, highest = (jnp.broadcast_to(end, (state_dim,)) for end in ends)
    if is_concrete(lowest) and is_concrete(highest) and not (np.asarray(lowest) <= np.asarray(highest)).all():
        fail("bounds", got="a lowest value above the highest", expected="low <= high", remedy="Swap them.")
    return lowest, highest
