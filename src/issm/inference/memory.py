"""What XLA keeps in memory: arrays that loops write into, and products that are not to be computed twice."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def blanks(dtype: Any, *shapes: tuple[int, ...]) -> tuple[Array, ...]:
    """Arrays to write into.

    They hold different numbers: XLA would make equal ones once, and then copy.
    """
    return tuple(jnp.full(shape, number, dtype) for number, shape in enumerate(shapes))


def stored(array: Array) -> Array:
    """The same array, in memory.

    On the CPU XLA computes a sum of a few products again inside all that use it, and removes its optimisation barriers before it
    decides to. A loop of a number of steps that it does not know, none, stays.
    """
    if jax.default_backend() != "cpu":  # there a loop waits for the host
        return array
    none = lax.optimization_barrier(jnp.zeros((), jnp.int32))
    return lax.fori_loop(0, none, lambda _, array: -array, array)
