r"""Covariances and informations of every pattern: what is recursive in a filter and a smoother of a handful of states.

Only $P_t$ and $N_t$ run through a scan. With $S = I + H P^- H^\top = L L^\top$, everything else, $L^{-1} H$, $L^{-1} H P^-$ and the
products with them, is one vectorised pass over all steps.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from issm.inference import lanes
from issm.inference.memory import stored
from issm.interventions import Intervention
from issm.models.transitions import Transitions, clamped_transitions

MOST_UNROLLED_ROWS = 3
"""Loops over more rows than this stay loops: unrolled, they compile slowly and fuse badly."""

MOST_UNROLLED_PIVOTS = 8
"""An elimination of more pivots is a loop, which compiles in less time and takes up to twice as long."""

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
    """

    predicted: Array
    retained: Array
    gains: Array
    white_weights: Array
    whitener: Array

    @property
    def log_det(self) -> Array:
        r"""$\log |S|$, from the diagonal of $L^{-1}$."""
        return -2 * jnp.log(jnp.einsum("...iil->...il", self.whitener)).sum(axis=-2)

    @property
    def filtered(self) -> Array:
        r"""$P = V P^- V^\top + K K^\top$, Joseph's form, which keeps its digits however small the noise."""
        kept = lanes.product(self.retained, self.predicted)
        return lanes.matmul(kept, lanes.transpose(self.retained)) + lanes.matmul(
            self.gains, lanes.transpose(self.gains)
        )


class PatternTransitions(eqx.Module):
    """The transitions of every pattern, which clamps cut where they are asked for: an array of all would be as large as the covariances.

    Attributes:
        free: The transitions without clamps.
        clamps: The clamps of every pattern as lanes, `(num_timesteps, state_dim, num_patterns or 1)`.
    """

    free: Transitions
    clamps: Intervention

    @property
    def weights(self) -> Array:
        """$A_t$, `(num_timesteps, state_dim, state_dim, num_patterns or 1)`."""
        return self._clamped.weights

    @property
    def cov(self) -> Array:
        """$Q_t$, in the same layout."""
        return self._clamped.cov

    @property
    def _clamped(self) -> Transitions:
        return jax.vmap(clamped_transitions, in_axes=(None, -1), out_axes=-1)(self.free, self.clamps)


def run_covariances(transitions: PatternTransitions, rows: Array, num_lanes: int) -> Updates:
    """The one recursion of the covariances."""
    varying_rows = () if rows.shape[0] == 1 else (rows,)
    state_dim, dtype = rows.shape[2], rows.dtype
    start = jnp.zeros((state_dim, state_dim, num_lanes), dtype)
    if num_lanes == 1:
        return _of_one_pattern(start, (transitions.weights, transitions.cov, *varying_rows), rows)

    def step(cov: Array, at: tuple) -> tuple[Array, Updates]:
        transition, *varying = at
        here = jax.tree.map(lambda leaf: leaf[None], transition)
        predicted = predict(cov, here.weights[0], here.cov[0])
        updates = update(predicted, varying[0] if varying else rows[0])
        return updates.filtered, updates

    return lax.scan(step, start, (transitions, *varying_rows))[1]


def _of_one_pattern(start: Array, steps: tuple[Array, ...], rows: Array) -> Updates:
    """The recursion of one pattern, in blocks: within a block everything but the recursion has the steps as lanes."""
    as_lanes = lambda x: jnp.moveaxis(x[..., 0], 0, -1)  # noqa: E731
    as_steps = lambda x: jnp.moveaxis(x, -1, 0)[..., None]  # noqa: E731

    def step(cov: Array, at: tuple) -> tuple[Array, Array]:
        weights, noise, *varying = at
        predicted = predict(cov, weights, noise)
        return _take_in(predicted, varying[0] if varying else rows[0]), predicted

    def block(cov: Array, at: tuple) -> tuple[Array, Updates]:
        cov, predicted = lax.scan(step, cov, at)
        updates = update(as_lanes(predicted), as_lanes(at[2]) if len(at) == 3 else rows[0])
        return cov, jax.tree.map(as_steps, updates)

    return _run_blocks(block, start, steps, lambda updates: updates.predicted)


def _run_blocks(block: Callable, start: Array, steps: tuple[Array, ...], watched: Callable[[Any], Array]) -> Any:
    """A recursion over one matrix in blocks of steps: `block(matrix, steps)` gives the next matrix and what it found at its steps.

    Once the matrices that are `watched` have settled, the blocks that follow are passed over up to the first in which some step
    differs from the one before it; what they would find is that of the last step that was computed.
    """
    num_timesteps, dtype = steps[0].shape[0], start.dtype
    few = start.size * num_timesteps < FEWEST_ENTRIES_IN_BLOCKS
    size = num_timesteps if few else min(num_timesteps, STEPS_OF_BLOCK)
    num_blocks = -(-num_timesteps // size)
    if num_blocks == 1:
        return block(start, steps)[1]
    rest = num_blocks * size - num_timesteps
    blocks = [
        jnp.pad(x, ((0, rest), *((0, 0),) * 3), mode="edge").reshape(num_blocks, size, *x.shape[1:]) for x in steps
    ]

    def is_settled(matrices: Array) -> Array:
        now, before = matrices[-1], matrices[-1 - STEPS_WITHOUT_CHANGE]
        scale = jnp.einsum("iil->il", now)
        change = (now - before) ** 2 / jnp.maximum(scale[:, None] * scale[None], jnp.finfo(dtype).tiny)
        return (change <= (4 * jnp.finfo(dtype).eps) ** 2).all()

    shapes = jax.eval_shape(block, start, tuple(x[0] for x in blocks))[1]
    blank = jax.tree.map(lambda leaf: jnp.zeros((num_blocks, *leaf.shape), leaf.dtype), shapes)
    quiet, next_different = _find_changes(blocks)

    def run(carry: tuple) -> tuple:
        index, matrix, computed, found = carry
        at = tuple(lax.dynamic_index_in_dim(x, index, keepdims=False) for x in blocks)
        matrix, here = block(matrix, at)
        found = jax.tree.map(lambda all, x: lax.dynamic_update_index_in_dim(all, x, index, 0), found, here)
        settled = quiet[index] & is_settled(watched(here))
        return jnp.where(settled, next_different[index], index + 1), matrix, computed.at[index].set(True), found

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


def predict(cov: Array, weights: Array, noise: Array) -> Array:
    r"""$A P A^\top + Q$."""
    return lanes.matmul(lanes.product(weights, cov), lanes.transpose(weights)) + noise


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


def update(predicted: Array, rows: Array) -> Updates:
    r"""The update of one step of all patterns, or of all steps of one pattern.

    Elimination of the first block of columns of

    $$\begin{bmatrix} S & H & I \\ P^- H^\top & I & 0 \end{bmatrix} \to
    \begin{bmatrix} L^\top & L^{-1} H & L^{-1} \\ 0 & V & -K \end{bmatrix},$$

    with the rows above scaled by the roots of their pivots.
    """
    state_dim, num_rows, num_lanes, dtype = predicted.shape[0], rows.shape[0], predicted.shape[-1], predicted.dtype
    spread = lambda matrix: jnp.broadcast_to(matrix, (*matrix.shape[:-1], num_lanes))  # noqa: E731
    seen = lanes.product(rows, predicted)
    unit = lanes.identity(num_rows, dtype)
    above = [lanes.matmul(seen, lanes.transpose(rows)) + unit, spread(rows), spread(unit)]
    below = [
        lanes.transpose(seen),
        spread(lanes.identity(state_dim, dtype)),
        jnp.zeros((state_dim, num_rows, num_lanes), dtype),
    ]
    left = jnp.concatenate([jnp.concatenate(above, axis=1), jnp.concatenate(below, axis=1)])
    if num_rows > MOST_UNROLLED_PIVOTS:
        left = lax.fori_loop(0, num_rows, _eliminate, left)
        pivots = jnp.einsum("iil->il", left[:num_rows, :num_rows])
        white, left = left[:num_rows, num_rows:] * lax.rsqrt(pivots)[:, None], left[num_rows:, num_rows:]
    else:
        rows_above = []
        for i in range(num_rows):
            left = stored(left)
            pivot = left[0, 0]
            rows_above.append(left[0, num_rows - i :] * lax.rsqrt(pivot)[None])
            left = left[1:, 1:] - (left[1:, 0] / pivot[None])[:, None] * left[0, None, 1:]
        white, left = jnp.stack(rows_above), stored(left)
    return Updates(predicted, left[:, :state_dim], -left[:, state_dim:], white[:, :state_dim], white[:, state_dim:])


def _eliminate(i: Array, left: Array) -> Array:
    """Clear the column of pivot i below its row."""
    row, column = (lax.dynamic_index_in_dim(left, i, axis, keepdims=False) for axis in (0, 1))
    pivot = lax.dynamic_index_in_dim(row, i)
    below = jnp.arange(left.shape[0])[:, None] > i
    return left - jnp.where(below, column / pivot, 0.0)[:, None] * row[None]


def run_informations(propagated: Array, information: Array) -> Array:
    """N_t = F_t + V_t' A_{t+1}' N_{t+1} A_{t+1} V_t, backwards from zero."""

    def step(later: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        propagated, information = at
        through = lanes.product(later, propagated)
        here = information + lanes.matmul(lanes.transpose(propagated), through)
        return here, here

    def block(later: Array, at: tuple) -> tuple[Array, Array]:
        return lax.scan(step, later, at)

    start = jnp.zeros_like(information[0])
    if start.shape[-1] == 1:
        return _run_blocks(block, start, (propagated[::-1], information[::-1]), lambda found: found)[::-1]
    return lax.scan(step, start, (propagated, information), reverse=True)[1]


class StepMatrices(eqx.Module):
    r"""What every step does to the means of its pattern, `(num_timesteps, ..., num_patterns or 1)` in the layout of `lanes`.

    Attributes:
        weights: $A_t$.
        retained, gains, whitener, white_weights: As in `Updates`.
        propagated: $A_{t+1} V_t$, zero at the last step.
        onward: $P_t A_{t+1}^\top = Cov[x_t, x_{t+1} \mid y_{0:t}]$, zero at the last step.
    """

    weights: Array
    retained: Array
    gains: Array
    whitener: Array
    white_weights: Array
    propagated: Array
    onward: Array
