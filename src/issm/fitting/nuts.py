r"""Draws from any smooth density by the No-U-Turn sampler of TensorFlow Probability, several chains side by side.

The step size is adapted by dual averaging, one for all chains, and the scale of every coordinate by the spread of the first half
of the warm-up, after a first guess from the curvature of the density at the start.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from issm._types import PRNGKey

TARGET_ACCEPTANCE = 0.8
FIRST_STEP = 0.1
LEAST_WARMUP = 20

LogDensity = Callable[[Float[Array, " dim"]], Float[Array, ""]]


class Sizes(NamedTuple):
    """Numbers that a compiled run depends on."""

    num_samples: int
    num_warmup: int
    num_chains: int
    thin: int


def sample_nuts(
    key: PRNGKey, log_density: LogDensity, start: Float[Array, " dim"], sizes: Sizes
) -> tuple[Float[Array, "num_chains num_samples dim"], Int[Array, ""]]:
    """Draws, and the number of kept ones at the end of a path whose energy diverged.

    References:
        Hoffman & Gelman (2014).
    """
    from tensorflow_probability.substrates import jax as tfp

    first_key, key = jax.random.split(key)
    half = sizes.num_warmup // 2

    def kernel(scale: Array, num_adaptation_steps: int):
        def target(points: Float[Array, "num_chains dim"]) -> Float[Array, " num_chains"]:
            value = jax.vmap(log_density)(start[None] + scale[None] * points)
            return jnp.where(jnp.isfinite(value), value, -jnp.inf)

        return tfp.mcmc.DualAveragingStepSizeAdaptation(
            tfp.mcmc.NoUTurnSampler(target, step_size=jnp.asarray(FIRST_STEP, start.dtype)),
            num_adaptation_steps=num_adaptation_steps,
            target_accept_prob=jnp.asarray(TARGET_ACCEPTANCE, start.dtype),
        )

    scale = _curvature_scale(log_density, start)
    # TFP relies on JAX's default promotion, whatever the user has set.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        points = tfp.mcmc.sample_chain(
            half,
            jnp.zeros((sizes.num_chains, *start.shape), start.dtype),
            kernel=kernel(scale, half),
            trace_fn=None,
            seed=first_key,
        )
        spread = _spread(points[half // 2 :])
        points, diverged = tfp.mcmc.sample_chain(
            sizes.num_samples,
            points[-1] / spread[None],
            kernel=kernel(scale * spread, sizes.num_warmup - half),
            num_burnin_steps=sizes.num_warmup - half,
            num_steps_between_results=sizes.thin - 1,
            trace_fn=lambda _, results: results.inner_results.has_divergence,
            seed=key,
        )
    draws = start[None, None] + (scale * spread)[None, None] * jnp.swapaxes(points, 0, 1)
    return draws, diverged.sum(dtype=jnp.int32)


def _curvature_scale(log_density: LogDensity, start: Float[Array, " dim"]) -> Float[Array, " dim"]:
    """One over the square root of the curvature along every coordinate; one where it is not downwards."""

    def curvature(direction: Array) -> Array:
        return -jax.jvp(jax.grad(log_density), (start,), (direction,))[1] @ direction

    found = jax.lax.map(curvature, jnp.eye(start.size, dtype=start.dtype))
    down = found > 0
    return jnp.where(down, 1 / jnp.sqrt(jnp.where(down, found, 1.0)), 1.0)


def _spread(points: Float[Array, "num_samples num_chains dim"]) -> Float[Array, " dim"]:
    """Standard deviations of all chains together, drawn towards one like five further draws of variance one."""
    count = points.shape[0] * points.shape[1]
    variances = points.var(axis=(0, 1))
    return jnp.sqrt((count * variances + 5) / (count + 5))
