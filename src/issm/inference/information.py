r"""The observed information, $-\nabla^2 \log p(y \mid do(\cdot), u)$, along chosen directions of the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from issm._check import fail, is_concrete
from issm._constraints import constrain, unconstrain
from issm._linalg import symmetrize
from issm._trees import apply_mask, trainable_masks
from issm.inference.likelihood import log_likelihoods
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
    return jnp.asarray(directions, params.initial.mean.dtype)


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


def score_and_information(
    params: ParamsLGSSM,
    trials: Trials,
    directions: Float[Array, "num_parameters num_free"],
    method: str,
    *,
    at: Callable[[Float[Array, " num_free"]], ParamsLGSSM] | None = None,
) -> tuple[Float[Array, " num_free"], Float[Array, "num_free num_free"]]:
    """The score of the log-likelihood and minus its Hessian, by forward mode through the score.

    `at` gives the parameters some steps away, if these are not steps along the directions.
    """
    move = along(params, directions) if at is None else at
    score = jax.grad(lambda step: log_likelihoods(move(step), trials, method).sum())
    num_free = directions.shape[1]
    zero = jnp.zeros(num_free, directions.dtype)
    column = lambda direction: jax.jvp(score, (zero,), (direction,))  # noqa: E731
    size = min(num_free, DERIVATIVES_AT_ONCE)
    steps = jnp.eye(-(-num_free // size) * size, num_free, dtype=zero.dtype)  # filled up with zeros
    value, columns = lax.map(jax.vmap(column, out_axes=(None, 0)), steps.reshape(-1, size, num_free))
    return value[0], -symmetrize(columns.reshape(-1, num_free)[:num_free])
