r"""The observed information, $-\nabla^2 \log p(y \mid do(\cdot), u)$, along chosen directions of the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from issm._check import fail
from issm._constraints import constrain, unconstrain
from issm._host import is_concrete, to_device
from issm._linalg import symmetrize
from issm._trees import apply_mask, trainable_masks
from issm.inference.likelihood import likelihood_tangent
from issm.inference.methods import filter_and_smooth
from issm.inference.moments import Moments
from issm.models.fields import TimeVarying, is_diagonal
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials

DERIVATIVES_AT_ONCE = 8


def free_directions(params: ParamsLGSSM, trainable: Any) -> Float[Array, "num_parameters num_free"]:
    """What one step of each free number does to the raveled parameters: zeros and ones.

    The two mirrored entries of a full covariance are one number.
    """
    masks = trainable_masks(params, trainable, fixed=TimeVarying)
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(masks)):
        fail(
            "trainable",
            got="Booleans that JAX traces",
            expected="known Booleans: they decide the size of the information",
            remedy="Build them outside of `jit`, with NumPy.",
        )
    numbers, count = [], 0
    for block in ("initial", "dynamics", "emissions"):
        fields = getattr(masks, block)
        for leaf in jax.tree.leaves(fields):
            mask = np.asarray(leaf)
            mirrored = leaf is fields.cov and not is_diagonal(getattr(params, block).cov)
            if mirrored and (mask != mask.T).any():
                fail(
                    f"trainable.{block}.cov",
                    got="an entry frozen on one side of the diagonal only",
                    expected="the same Booleans on both sides",
                    remedy="A covariance is symmetric; set both entries.",
                )
            chosen = np.tril(mask) if mirrored else mask
            number = np.full(mask.shape, -1)
            number[chosen] = count + np.arange(chosen.sum())
            numbers.append((np.maximum(number, number.T) if mirrored else number).ravel())
            count += int(chosen.sum())
    directions = np.concatenate(numbers)[:, None] == np.arange(count)
    return to_device(directions, params.initial.mean.dtype)


def along(
    params: ParamsLGSSM, directions: Float[Array, "num_parameters num_free"]
) -> Callable[[Float[Array, " num_free"]], ParamsLGSSM]:
    """The parameters some steps along the directions away."""
    flat, unravel = ravel_pytree(params)
    return lambda step: unravel(flat + directions @ step)


def along_coordinates(
    params: ParamsLGSSM, directions: Float[Array, "num_parameters num_free"]
) -> Callable[[Float[Array, " num_free"]], ParamsLGSSM]:
    """The parameters some steps away in coordinates without constraints; what is fixed keeps every bit."""
    coordinates, unravel = ravel_pytree(unconstrain(params))
    moves = (directions != 0).any(axis=1)
    masks = jax.tree.map(lambda leaf: leaf > 0, unravel(moves.astype(directions.dtype)))
    start = jnp.where(moves, coordinates, 0.0)  # those of a singular covariance that is fixed are not finite
    return lambda step: apply_mask(masks, constrain(unravel(start + directions @ step)), params)


def likelihood_score(
    at: Callable[[Float[Array, " num_free"]], ParamsLGSSM],
    step: Float[Array, " num_free"],
    trials: Trials,
    moments: Moments,
) -> Float[Array, " num_free"]:
    """The score of the log-likelihood of all trials in the steps that lead to the parameters, given the moments there."""
    params = at(step)

    def along_step(change: Array) -> Array:
        return likelihood_tangent(params, trials, moments, jax.jvp(at, (step,), (change,))[1]).sum()

    return jax.linear_transpose(along_step, step)(jnp.ones((), step.dtype))[0]


def information_of(
    params: ParamsLGSSM, trials: Trials, directions: Float[Array, "num_parameters num_free"], method: str
) -> tuple[Float[Array, "num_free num_free"], Moments]:
    """Minus the Hessian of the log-likelihood along the directions, by forward mode through the score, and the moments on the way."""
    at, zero = along(params, directions), jnp.zeros(directions.shape[1], directions.dtype)

    def score(step: Array) -> tuple[Array, Moments]:
        moments = filter_and_smooth(at(step), trials, method)
        return likelihood_score(at, step, trials, moments), moments

    _, forwards, moments = jax.linearize(score, zero, has_aux=True)
    return -symmetrize(columns_of(forwards, zero)), moments


def columns_of(forwards: Callable[[Array], Any], zero: Float[Array, " num_free"]) -> Any:
    """What a linear map makes of each free number, in the leading axis; a few at a time, to save memory."""
    size = min(zero.size, DERIVATIVES_AT_ONCE)
    steps = jnp.eye(-(-zero.size // size) * size, zero.size, dtype=zero.dtype)  # filled up with zeros
    columns = lax.map(jax.vmap(forwards), steps.reshape(-1, size, zero.size))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: zero.size], columns)
