r"""Filtered means and adjoints of all trials, given what the covariances decided.

Arrays have time first, then patterns or trials: a matrix for each pattern `(num_timesteps, num_patterns, rows, columns)`, a vector
for each trial `(num_timesteps, num_trials, rows)`. Both recursions over time are affine, so that one scan serves them:
$m_t = V_t A_t m_{t-1} + b_t$ forwards and $r_t = q_t + V_t^\top A_{t+1}^\top r_{t+1}$ backwards.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm.interventions import Intervention
from issm.models.trials import Plan

Recursion = Callable[[Array, Array, Array | None, bool], Array]


class Gains(eqx.Module):
    r"""What the update of every step does to means: with rows $z = H x + N(0, I)$ and $S = I + H P^- H^\top = L L^\top$.

    Attributes:
        whitener: $L^{-1}$.
        weights: $L^{-1} H$.
        gains: $L^{-1} H P^-$.
    """

    whitener: Array
    weights: Array
    gains: Array

    @property
    def retained(self) -> Array:
        """$V = I - P^- H^T S^{-1} H$, the share of a prediction error that the update leaves."""
        return identity_like(self.weights) - transpose(self.gains) @ self.weights


class Means(eqx.Module):
    r"""Means and adjoints of all trials; `innovations` are white, $L^{-1}(z - H m^-)$, and `scores` $H^\top L^{-\top}$ times them."""

    filtered: Array
    predicted: Array
    innovations: Array
    scores: Array
    adjoints: Array


def run_means(
    weights: Array, shifts: Array, gains: Gains, values: Array, pattern: Array | None, recursion: Recursion
) -> Means:
    """Filter the values z of all trials, and carry the adjoints back."""
    each = lambda matrices, vectors: apply(matrices, vectors, pattern)  # noqa: E731
    whitened = each(gains.whitener, values)
    drive = shifts + each(transpose(gains.gains), whitened - each(gains.weights, shifts))
    closed_loop = weights - transpose(gains.gains) @ (gains.weights @ weights)
    filtered = recursion(closed_loop, drive, pattern, False)
    previous = jnp.concatenate([jnp.zeros_like(filtered[:1]), filtered[:-1]])
    predicted = each(weights, previous) + shifts
    innovations = whitened - each(gains.weights, predicted)
    scores = each(transpose(gains.weights), innovations)
    adjoints = recursion(propagate(weights, gains), scores, pattern, True)
    return Means(filtered, predicted, innovations, scores, adjoints)


def propagate(weights: Array, gains: Gains) -> Array:
    r"""$V_t^\top A_{t+1}^\top$, zero at the last step."""
    return transpose(following(weights) @ gains.retained)


def following(array: Array) -> Array:
    """The entries of the next step; zero after the last."""
    return jnp.concatenate([array[1:], jnp.zeros_like(array[:1])])


def transpose(matrices: Array) -> Array:
    """Transposed matrices."""
    return jnp.swapaxes(matrices, -1, -2)


def identity_like(matrices: Array) -> Array:
    """The identity of the matrices' last axis, with as many leading axes of length one as they have."""
    return jnp.eye(matrices.shape[-1], dtype=matrices.dtype)[(None,) * (matrices.ndim - 2)]


def swap(array: Array) -> Array:
    """Time first, trials or patterns second, and back."""
    return jnp.swapaxes(array, 0, 1)


def over_trials(kernel: Callable[[Array, Intervention], Any], plan: Plan) -> Any:
    """`kernel(inputs, intervention)` of every trial, time first; one for all where the trials share their plan."""
    axes = plan.axes
    if plan.inputs.ndim == 2 and plan.intervention.mask.ndim == 2:
        return jax.tree.map(lambda leaf: leaf[:, None], kernel(plan.inputs, plan.intervention))
    of_all = jax.vmap(kernel, in_axes=(axes.inputs, axes.intervention))(plan.inputs, plan.intervention)
    return jax.tree.map(swap, of_all)


def spread(by_pattern: Array, pattern: Array | None) -> Array:
    """The matrices of every trial, or one for all of them."""
    return by_pattern if pattern is None else jnp.take(by_pattern, pattern, axis=-3)


def apply(matrices: Array, vectors: Array, pattern: Array | None) -> Array:
    """Every trial's vector times the matrix of its pattern."""
    if matrices.shape[-3] == 1:
        return vectors @ transpose(matrices[..., 0, :, :])
    return (spread(matrices, pattern) * vectors[..., None, :]).sum(axis=-1)


def scan_recursion(matrices: Array, drive: Array, pattern: Array | None, reverse: bool) -> Array:
    """$x_t = W_t x_{t-1} + b_t$ from zero, step by step, forwards or backwards."""

    def step(vectors: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        matrix, shift = at
        vectors = apply(matrix, vectors, pattern) + shift
        return vectors, vectors

    return lax.scan(step, jnp.zeros_like(drive[0]), (matrices, drive), reverse=reverse)[1]
