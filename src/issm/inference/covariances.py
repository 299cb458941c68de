r"""Covariances and informations of every pattern: what is recursive in a filter and a smoother of a handful of states.

Only $P_t$ and $N_t$ run through a scan. With $S = I + H P^- H^\top = L L^\top$, everything else, $L^{-1} H$, $L^{-1} H P^-$ and the
products with them, is one vectorised pass over all steps.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm.inference import lanes

MOST_UNROLLED_ROWS = 3
"""Loops over more rows than this stay loops: unrolled, they compile slowly and fuse badly."""

STEPS_OF_BLOCK = 32
"""Steps of one pattern that are computed together: enough lanes for a vectorised loop, few enough to stop soon after settling."""

FEWEST_ENTRIES_IN_BLOCKS = 1024
"""Covariances of fewer entries, over all steps, are one block: to divide them costs more than to compute them."""

STEPS_WITHOUT_CHANGE = 8
"""Covariances that have not changed over so many equal steps at the end of a block have settled."""


class Updates(eqx.Module):
    r"""The update $m = V m^- + K z$ of every step, with $S = I + H P^- H^\top = L L^\top$.

    Attributes:
        predicted: $P^-$.
        retained: $V = I - K H$, the share of a prediction error that the update leaves.
        gains: K.
        white_weights: $L^{-1} H$.
        whitener: $L^{-1}$.
        pivots: Squared diagonal of L.
    """

    predicted: Array
    retained: Array
    gains: Array
    white_weights: Array
    whitener: Array
    pivots: Array

    @property
    def filtered(self) -> Array:
        r"""$P = V P^- V^\top + K K^\top$, Joseph's form, which keeps its digits however small the noise."""
        kept = lanes.matmul(lanes.matmul(self.retained, self.predicted), lanes.transpose(self.retained))
        return kept + lanes.matmul(self.gains, lanes.transpose(self.gains))


def run_covariances(weights: Array, covs: Array, rows: Array, num_lanes: int) -> Updates:
    """The one recursion of the covariances."""
    steps = (weights, covs) if rows.shape[0] == 1 else (weights, covs, rows)
    start = jnp.zeros((*weights.shape[1:3], num_lanes), weights.dtype)
    if num_lanes == 1:
        return _run_blocks(start, steps, rows)

    def step(cov: Array, at: tuple) -> tuple[Array, Updates]:
        weights, noise, *varying = at
        return _update(_predict(cov, weights, noise), varying[0] if varying else rows[0])

    return lax.scan(step, start, steps)[1]


def _run_blocks(start: Array, steps: tuple[Array, ...], rows: Array) -> Updates:
    """The recursion of one pattern, in blocks of steps: within a block everything but the recursion has the steps as lanes.

    Once the covariances have settled, the blocks that follow are passed over up to the first in which some step differs from the
    one before it; their updates are those of the last step that was computed.
    """
    num_timesteps, dtype = steps[0].shape[0], start.dtype
    few = start.size * num_timesteps < FEWEST_ENTRIES_IN_BLOCKS
    size = num_timesteps if few else min(num_timesteps, STEPS_OF_BLOCK)
    num_blocks = -(-num_timesteps // size)
    rest = num_blocks * size - num_timesteps
    blocks = [
        jnp.pad(x, ((0, rest), *((0, 0),) * 3), mode="edge").reshape(num_blocks, size, *x.shape[1:]) for x in steps
    ]
    as_lanes = lambda x: jnp.moveaxis(x[..., 0], 0, -1)  # noqa: E731
    as_steps = lambda x: jnp.moveaxis(x, -1, 0)[..., None]  # noqa: E731

    def step(cov: Array, at: tuple) -> tuple[Array, Array]:
        weights, noise, *varying = at
        predicted = _predict(cov, weights, noise)
        return _take_in(predicted, varying[0] if varying else rows[0]), predicted

    def block(cov: Array, at: tuple) -> tuple[Array, Updates]:
        cov, predicted = lax.scan(step, cov, at)
        updates = _update(as_lanes(predicted), as_lanes(at[2]) if len(at) == 3 else rows[0])[1]
        return cov, jax.tree.map(as_steps, updates)

    def is_settled(predicted: Array) -> Array:
        now, before = predicted[-1], predicted[-1 - STEPS_WITHOUT_CHANGE]
        scale = jnp.einsum("iil->il", now)
        change = (now - before) ** 2 / jnp.maximum(scale[:, None] * scale[None], jnp.finfo(dtype).tiny)
        return (change <= (4 * jnp.finfo(dtype).eps) ** 2).all()

    if num_blocks == 1:
        return block(start, steps)[1]
    shapes = jax.eval_shape(block, start, tuple(x[0] for x in blocks))[1]
    blank = jax.tree.map(lambda leaf: jnp.zeros((num_blocks, *leaf.shape), leaf.dtype), shapes)
    quiet, next_different = _find_changes(blocks)

    def run(carry: tuple) -> tuple:
        index, cov, computed, found = carry
        here = [lax.dynamic_index_in_dim(x, index, keepdims=False) for x in blocks]
        after, updates = block(cov, tuple(here))
        found = jax.tree.map(lambda all, x: lax.dynamic_update_index_in_dim(all, x, index, 0), found, updates)
        settled = quiet[index] & is_settled(updates.predicted)
        return jnp.where(settled, next_different[index], index + 1), after, computed.at[index].set(True), found

    carry = (jnp.zeros((), jnp.int32), start, jnp.zeros(num_blocks, bool), blank)
    _, _, computed, found = lax.while_loop(lambda carry: carry[0] < num_blocks, run, carry)
    numbers = jnp.arange(num_blocks, dtype=jnp.int32)
    last_of_computed = lax.cummax(jnp.where(computed, (numbers + 1) * size - 1, 0))
    places = jnp.arange(num_blocks * size, dtype=jnp.int32).reshape(num_blocks, size)
    places = jnp.where(computed[:, None], places, last_of_computed[:, None]).reshape(-1)[:num_timesteps]
    return jax.tree.map(lambda leaf: jnp.take(leaf.reshape(-1, *leaf.shape[2:]), places, axis=0), found)


def _find_changes(blocks: list[Array]) -> tuple[Array, Array]:
    """Which blocks end with `STEPS_WITHOUT_CHANGE` steps like the step before, and the next block after each that has a change."""
    num_blocks, size = blocks[0].shape[:2]
    flat = [x.reshape(num_blocks * size, -1) for x in blocks]
    differs = jnp.stack([(x[1:] != x[:-1]).any(axis=1) for x in flat]).any(axis=0)
    differs = jnp.pad(differs, (1, 0), constant_values=True).reshape(num_blocks, size)
    numbers = jnp.arange(num_blocks, dtype=jnp.int32)
    at_or_after = lax.cummin(jnp.where(differs.any(axis=1), numbers, num_blocks), reverse=True)
    next_different = jnp.pad(at_or_after[1:], (0, 1), constant_values=num_blocks)
    return ~differs[:, -STEPS_WITHOUT_CHANGE:].any(axis=1), next_different


def _predict(cov: Array, weights: Array, noise: Array) -> Array:
    return lanes.matmul(lanes.matmul(weights, cov), lanes.transpose(weights)) + noise


def _take_in(cov: Array, rows: Array) -> Array:
    """The covariance after an update with rows h of unit noise, one by one."""
    num_rows = rows.shape[0]

    def seen_by(i: Any, cov: Array) -> tuple[Array, Array]:
        row = lax.dynamic_index_in_dim(rows, i, keepdims=False)
        seen = (cov * row[None]).sum(axis=1)
        return seen, seen / (1 + (row * seen).sum(axis=0))[None]

    def take_in(i: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        cov, seen, gain = carry  # so that there is a division for each entry of a column, not of the matrix
        cov = cov - gain[:, None] * seen[None]
        return cov, *seen_by(jnp.minimum(i + 1, num_rows - 1), cov)

    unroll = num_rows <= MOST_UNROLLED_ROWS
    return lax.fori_loop(0, num_rows, take_in, (cov, *seen_by(0, cov)), unroll=unroll)[0]


def _update(predicted: Array, rows: Array) -> tuple[Array, Updates]:
    r"""The update of one step of all patterns, or of all steps of one pattern; the first result is the plain $P - K S K^\top$.

    Rows are taken in one by one, with s = 1 + h' P h of each, by what P, V and K become: $[P, V, K] - P h\, (h^\top [P, V, K] - e) / s$,
    where e is the unit vector of the row's own gain. $h^\top V / \sqrt{s}$ and $(e - h^\top K) / \sqrt{s}$ are its rows of
    $L^{-1} H$ and of $L^{-1}$.
    """
    state_dim, num_rows, num_lanes, dtype = predicted.shape[0], rows.shape[0], predicted.shape[-1], predicted.dtype
    eye = jnp.broadcast_to(lanes.identity(state_dim, dtype), predicted.shape)
    start = jnp.concatenate([predicted, eye, jnp.zeros((state_dim, num_rows, num_lanes), dtype)], axis=1)
    units = jnp.eye(num_rows, 2 * state_dim + num_rows, k=2 * state_dim, dtype=dtype)

    def see(known: Array, i: Any) -> tuple[Array, Array, Array]:
        row, unit = (lax.dynamic_index_in_dim(x, i, keepdims=False) for x in (rows, units))
        products = (known[j] * row[None, j] for j in range(state_dim))
        seen: Array = sum(products, start=-unit[:, None])  # type: ignore[assignment]
        pivot = sum((seen[j] * row[j] for j in range(state_dim)), start=jnp.ones((), dtype))
        return seen, seen[:state_dim] / pivot[None], pivot

    def take_in(carry: tuple, i: Array) -> tuple[tuple, tuple[Array, Array]]:
        # The next row is seen before it is needed: XLA would see it once for each state.
        known, seen, gain, pivot = carry
        known = known - gain[:, None] * seen[None]
        return (known, *see(known, jnp.minimum(i + 1, num_rows - 1))), (seen[state_dim:], pivot)

    unroll = num_rows <= MOST_UNROLLED_ROWS
    carry, (seen, pivots) = lax.scan(take_in, (start, *see(start, 0)), jnp.arange(num_rows), unroll=unroll)
    known = carry[0]
    filtered, retained, gains = jnp.split(known, (state_dim, 2 * state_dim), axis=1)
    white = seen / jnp.sqrt(pivots)[:, None]
    return filtered, Updates(predicted, retained, gains, white[:, :state_dim], -white[:, state_dim:], pivots)


def run_informations(propagated: Array, information: Array) -> Array:
    """N_t = F_t + V_t' A_{t+1}' N_{t+1} A_{t+1} V_t, backwards from zero."""

    def step(carry: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        propagated, information = at
        through = lanes.matmul(lanes.matmul(propagated, carry), lanes.transpose(propagated))
        carry = information + through
        return carry, carry

    start = jnp.zeros(jnp.broadcast_shapes(propagated.shape[1:], information.shape[1:]), information.dtype)
    return lax.scan(step, start, (propagated, information), reverse=True)[1]


class StepMatrices(eqx.Module):
    r"""What every step does to the means of its pattern, `(num_timesteps, ..., num_patterns or 1)` in the layout of `lanes`.

    Attributes:
        weights: $A_t$.
        retained, gains, whitener, white_weights: As in `Updates`.
        propagated: $V_t^\top A_{t+1}^\top$, zero at the last step.
        onward: $P_t A_{t+1}^\top = Cov[x_t, x_{t+1} \mid y_{0:t}]$, zero at the last step.
    """

    weights: Array
    retained: Array
    gains: Array
    whitener: Array
    white_weights: Array
    propagated: Array
    onward: Array
