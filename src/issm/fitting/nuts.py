r"""The no-U-turn sampler of TensorFlow Probability on the free coordinates of the parameters, scaled by the curvature at the start."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from issm._check import fail, is_concrete
from issm._constraints import constrain, log_volume, unconstrain
from issm._linalg import symmetrize
from issm._trees import apply_mask
from issm._types import PRNGKey
from issm.fitting.m_step import Rules, log_prior
from issm.inference.likelihood import log_likelihoods
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials

TARGET_ACCEPTANCE = 0.8
LARGEST_DEPTH = 8
SMALLEST_SHARE = 1e-3
"""Curvature, as a share of the largest after scaling, below which a direction counts as this flat."""


def free_places(masks: Any) -> Int[np.ndarray, " num_free"]:
    """Where the free coordinates stand among all: entries that are trainable, and the lower triangle of matrices."""
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(masks)):
        fail(
            "trainable",
            got="Booleans that JAX traces",
            expected="known Booleans: they decide the number of coordinates",
            remedy="Build them outside of `jit`, with NumPy.",
        )
    lower = lambda block: np.tril(block) if np.ndim(block) == 2 else np.asarray(block)  # noqa: E731
    parts = []
    for name in ("initial", "dynamics", "emissions"):
        fields = getattr(masks, name)
        cov = jax.tree.leaves(fields.cov)
        parts += [
            (lower(leaf) if any(leaf is part for part in cov) else np.asarray(leaf)).ravel()
            for leaf in jax.tree.leaves(fields)
        ]
    return np.flatnonzero(np.concatenate(parts))


def nuts_chains(
    key: PRNGKey,
    params: ParamsLGSSM,
    trials: Trials,
    masks: Any,
    places: Int[Array, " num_free"],
    rules: Rules,
    user_prior: Callable[[ParamsLGSSM], Array] | None,
    *,
    num_samples: int,
    num_warmup: int,
    num_chains: int,
    thin: int,
    method: str,
) -> tuple[ParamsLGSSM, Int[Array, ""]]:
    """Draws `(num_chains, num_samples, ...)`, and the number of divergent transitions."""
    import tensorflow_probability.substrates.jax as tfp

    coordinates, unravel = ravel_pytree(unconstrain(params))
    at = lambda point: unravel(coordinates.at[places].set(point))  # noqa: E731
    to_params = lambda point: apply_mask(masks, constrain(at(point)), params)  # noqa: E731

    def log_density(point: Float[Array, " num_free"]) -> Float[Array, ""]:
        own = to_params(point)
        value = log_likelihoods(own, trials, method).sum() + log_prior(own, rules) + log_volume(at(point), masks)
        return value if user_prior is None else value + user_prior(own)

    start = coordinates[places]
    scale = _scale(jax.jacfwd(jax.grad(log_density))(start))
    whitened = jax.vmap(lambda white: log_density(start + scale @ white))
    kernel = tfp.mcmc.NoUTurnSampler(
        whitened, step_size=jnp.full((num_chains, 1), 0.5, start.dtype), max_tree_depth=LARGEST_DEPTH
    )
    kernel = tfp.mcmc.DualAveragingStepSizeAdaptation(
        kernel, num_adaptation_steps=max(4 * num_warmup // 5, 1), target_accept_prob=TARGET_ACCEPTANCE
    )
    spread_key, chain_key = jax.random.split(key)
    begin = jax.random.normal(spread_key, (num_chains, start.size), start.dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which the library relies on
        result: Any = tfp.mcmc.sample_chain(
            num_samples,
            current_state=begin,
            kernel=kernel,
            num_burnin_steps=num_warmup,
            num_steps_between_results=thin - 1,
            trace_fn=lambda _, results: results.inner_results.has_divergence,
            seed=chain_key,
        )
    draws = jax.vmap(jax.vmap(lambda point: to_params(start + scale @ point)))(jnp.swapaxes(result.all_states, 0, 1))
    return draws, result.trace.sum(dtype=jnp.int32)


def _scale(hessian: Array) -> Array:
    """A matrix in whose coordinates the density has a curvature of about one at the start."""
    curvature = -symmetrize(hessian)
    diagonal = jnp.abs(jnp.diagonal(curvature))
    unit = jnp.where(diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0)), 1.0)
    values, vectors = jnp.linalg.eigh(curvature * unit[:, None] * unit[None])
    values = jnp.maximum(jnp.abs(values), SMALLEST_SHARE * jnp.abs(values).max())
    return unit[:, None] * vectors / jnp.sqrt(values)[None]
