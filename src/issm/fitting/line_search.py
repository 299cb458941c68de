r"""L-BFGS that evaluates the loss in one place: a state between two evaluations, and what an evaluation makes of it.

XLA compiles a loss and its gradient anew wherever a program asks for them, and a search that brackets, narrows and starts asks in
three places. Here the loop of a fit evaluates once an iteration, at `LBFGS.trial`; `LBFGS.weigh` then moves there or tries
another length.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from issm._trees import choose

SUFFICIENT = 1e-4  # share of the fall promised by the slope that a step has to bring
CURVATURE = 0.9  # share of the slope that may be left
MOST_TRIALS = 20  # lengths of one direction

memory_of_steps = optax.scale_by_lbfgs()


class Lengths(eqx.Module):
    r"""A search along a line for a length that meets the weak conditions of Wolfe.

    $f(t) \le f(0) + c_1 t f'(0)$ and $f'(t) \ge c_2 f'(0)$: a length that breaks the first is too long, one that breaks the second
    too short. The length is doubled until one is too long, and then the interval halved. Where rounding hides the fall, the
    slope stands for it.

    Attributes:
        value, slope: $f(0)$ and $f'(0)$.
        length: The length on trial, t.
        low, high: The longest length that is too short and the shortest that is too long.
        tried: Number of lengths that have failed.

    References:
        Lewis & Overton (2013), *Mathematical Programming* 141, algorithm 2.6; Hager & Zhang (2005), *SIAM Journal on Optimization* 16
        (the condition on the slope where rounding hides the fall).
    """

    value: Float[Array, ""]
    slope: Float[Array, ""]
    length: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    tried: Int[Array, ""]

    def weigh(self, value: Array, slope: Array) -> tuple[Bool[Array, ""], "Lengths"]:
        """Whether the length on trial is taken, and the next one if not.

        When all trials are used up, the last is the longest length that brought enough: zero if none did.
        """
        rounding = jnp.finfo(value.dtype).eps ** 0.75 * jnp.abs(self.value)  # of a sum of many numbers
        falls = value <= self.value + SUFFICIENT * self.length * self.slope
        falls |= (value <= self.value + rounding) & (slope <= (2 * SUFFICIENT - 1) * self.slope)
        falls &= jnp.isfinite(value) & jnp.isfinite(slope)
        taken = (falls & (slope >= CURVATURE * self.slope)) | (self.tried == MOST_TRIALS)
        low, high = jnp.where(falls, self.length, self.low), jnp.where(falls, self.high, self.length)
        following = jnp.where(jnp.isfinite(high), (low + high) / 2, 2 * self.length)
        following = jnp.where(self.tried + 1 == MOST_TRIALS, low, following)
        return taken, Lengths(self.value, self.slope, following, low, high, self.tried + 1)


class LBFGS(eqx.Module):
    """What is known at a point of the path, and the length on trial from there.

    Attributes:
        direction: Where the path goes next.
        lengths: The search along it.
        memory: Earlier steps and what they did to the gradient.
    """

    direction: Float[Array, " coordinates"]
    lengths: Lengths
    memory: Any

    def trial(self, point: Float[Array, " coordinates"]) -> Float[Array, " coordinates"]:
        """The point to evaluate, from the last one that was taken."""
        return point + self.lengths.length * self.direction

    def weigh(
        self, trial: Float[Array, " coordinates"], value: Float[Array, ""], gradient: Float[Array, " coordinates"]
    ) -> tuple[Bool[Array, ""], "LBFGS"]:
        """Whether the path goes to the trial, and the search from there or, along the same line, by another length."""
        taken, lengths = self.lengths.weigh(value, self.direction @ gradient)
        fresh = memory_of_steps.init(trial)
        stuck = (self.lengths.tried == MOST_TRIALS) & (self.lengths.length == 0)
        memory = choose(stuck, fresh, self.memory)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which optax relies on
            preconditioned, memory = memory_of_steps.update(gradient, memory, trial)
        step = jnp.asarray(preconditioned)
        slope = -(step @ gradient)
        steepest = gradient / jnp.maximum(1.0, jnp.linalg.norm(gradient))
        descends = (slope < 0) & jnp.isfinite(step).all()
        direction = -jnp.where(descends, step, steepest)
        turned = LBFGS(direction, _lengths(value, direction @ gradient), choose(descends, memory, fresh))
        return taken, choose(taken, turned, LBFGS(self.direction, lengths, self.memory))


def start_lbfgs(point: Float[Array, " coordinates"]) -> LBFGS:
    """Before anything is known: the first trial is the point itself, and it is taken."""
    zero = jnp.zeros((), point.dtype)
    lengths = eqx.tree_at(
        lambda s: (s.length, s.tried), _lengths(zero, zero), (zero, jnp.asarray(MOST_TRIALS, jnp.int32))
    )
    return LBFGS(jnp.zeros_like(point), lengths, memory_of_steps.init(point))


def _lengths(value: Array, slope: Array) -> Lengths:
    one = jnp.ones((), value.dtype)
    return Lengths(value, slope, one, 0 * one, jnp.inf * one, jnp.zeros((), jnp.int32))
