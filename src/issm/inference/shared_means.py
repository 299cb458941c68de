r"""Means of trials that share their covariances, in the layout of the data.

A step multiplies the vectors of many trials by one matrix. Forwards and backwards are one loop each, of a product or two for all trials,
and every array keeps the axes in which the data came: nothing is transposed. The loops write in place, and XLA drops what
nobody asks for.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm.inference.covariances import StepMatrices
from issm.inference.memory import blanks
from issm.inference.moments import TrialMeans
from issm.models.trials import Chunks

SMALLEST_SHARED_STEP = 1024
"""Entries of the means of a chunk at one step from which these loops are the faster ones; fewer are left to `lanes`."""


def are_worth_it(num_trials: int, state_dim: int, num_patterns: int, chunks: Chunks | None) -> bool:
    """Whether enough trials share each matrix."""
    if chunks is None and num_patterns > 1:
        return False
    sharing = num_trials if chunks is None else chunks.trials.shape[1]
    return sharing * state_dim >= SMALLEST_SHARED_STEP


def shared_means(
    matrices: StepMatrices, shifts: Array, values: Array, offsets: Array, chunks: Chunks | None
) -> TrialMeans:
    """Filter and smooth the values z less their offsets, `(num_trials, num_timesteps, rows)`."""
    if offsets.shape[0] > 1:
        values, offsets = values - offsets, jnp.zeros_like(offsets[:1, :1])
    shifts, values, offsets = (_enter(x, chunks) for x in (shifts, values, offsets))
    by_chunk = matrices if chunks is None else jax.tree.map(lambda x: jnp.take(x, chunks.pattern, axis=-1), matrices)
    as_rows = jax.tree.map(lambda x: jnp.transpose(x, (0, 3, 2, 1)), by_chunk)  # vectors are rows
    filtered, predicted, squares, innovations = _forwards(as_rows, shifts, values, offsets)
    adjoints, smoothed = _backwards(as_rows, innovations, filtered)
    leave = lambda x: _leave(x, chunks)  # noqa: E731
    return TrialMeans(
        leave(filtered), leave(predicted), leave(squares[..., None])[..., 0], leave(adjoints), leave(smoothed)
    )


def _forwards(
    matrices: StepMatrices, shifts: Array, values: Array, offsets: Array
) -> tuple[Array, Array, Array, Array]:
    r"""$m_t$, $m^-_t$, squares of the innovations $L^{-1} (z_t - H m^-_t)$, and the innovations."""
    num_chunks, size, num_timesteps, _ = values.shape
    state_dim, dtype = matrices.weights.shape[-1], values.dtype
    of_predicted = jnp.concatenate([matrices.retained, -matrices.white_weights], axis=-1)
    of_values = jnp.concatenate([matrices.gains, matrices.whitener], axis=-1)
    of_offsets = jnp.transpose(offsets, (2, 0, 1, 3)) @ of_values
    in_place = values.shape[-1] == state_dim  # filtered means take the place of the values that they were made of

    def step(t: Array, carry: tuple) -> tuple:
        mean, *found = carry
        seen = _vectors(found[0] if in_place else values, t)
        predicted = mean @ _matrix(matrices.weights, t) + _vectors(shifts, t)
        both = predicted @ _matrix(of_predicted, t) + seen @ _matrix(of_values, t) - _matrix(of_offsets, t)
        mean, innovation = both[..., :state_dim], both[..., state_dim:]
        here = (mean, predicted, (innovation**2).sum(axis=-1), innovation)
        return mean, *(lax.dynamic_update_index_in_dim(*pair, t, axis=2) for pair in zip(found, here, strict=True))

    start = jnp.zeros((num_chunks, size, state_dim), dtype)
    dims = ((state_dim,), (state_dim,), (), values.shape[-1:])
    filtered, *found = blanks(dtype, *((num_chunks, size, num_timesteps, *dim) for dim in dims))
    found = (values if in_place else filtered, *found)
    return lax.fori_loop(0, num_timesteps, step, (start, *found))[1:]


def _backwards(matrices: StepMatrices, innovations: Array, filtered: Array) -> tuple[Array, Array]:
    r"""$r_t = H^\top L^{-\top} e_t + V_t^\top A_{t+1}^\top r_{t+1}$, and $m^s_t = m_t + P_t A_{t+1}^\top r_{t+1}$."""
    state_dim, num_timesteps = filtered.shape[-1], filtered.shape[2]
    in_place = innovations.shape == filtered.shape
    scoring = jnp.swapaxes(matrices.white_weights, -1, -2)
    of_next = jnp.concatenate([jnp.swapaxes(matrices.propagated, -1, -2), matrices.onward], axis=-1)

    def step(count: Array, carry: tuple) -> tuple:
        adjoint, adjoints, smoothed = carry
        t = num_timesteps - 1 - count
        both = adjoint @ _matrix(of_next, t)
        seen = _vectors(adjoints if in_place else innovations, t)
        adjoint = both[..., :state_dim] + seen @ _matrix(scoring, t)
        mean = _vectors(smoothed, t) + both[..., state_dim:]
        put = lambda all, here: lax.dynamic_update_index_in_dim(all, here, t, axis=2)  # noqa: E731
        return adjoint, put(adjoints, adjoint), put(smoothed, mean)

    adjoints = innovations if in_place else jnp.zeros_like(filtered)
    start = (jnp.zeros_like(filtered[:, :, 0]), adjoints, filtered)
    return lax.fori_loop(0, num_timesteps, step, start)[1:]


def _matrix(matrices: Array, t: Array) -> Array:
    return lax.dynamic_index_in_dim(matrices, t, axis=0, keepdims=False)


def _vectors(vectors: Array, t: Array) -> Array:
    if vectors.shape[2] == 1:
        return vectors[:, :, 0]
    return lax.dynamic_index_in_dim(vectors, t, axis=2, keepdims=False)


def _enter(by_trial: Array, chunks: Chunks | None) -> Array:
    """From `(num_trials or 1, ...)` to `(num_chunks or 1, size or 1, ...)`."""
    if chunks is None or by_trial.shape[0] == 1:
        return by_trial[None]
    return jnp.take(by_trial, chunks.trials, axis=0)


def _leave(by_chunk: Array, chunks: Chunks | None) -> Array:
    """Back to `(num_trials, ...)`."""
    by_place = by_chunk.reshape(-1, *by_chunk.shape[2:])
    return by_place if chunks is None else jnp.take(by_place, chunks.place, axis=0)
