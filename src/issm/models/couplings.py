r"""One emission in two worlds that share its noise: $y' \sim p(\cdot \mid \eta')$ given that $y$ came of $\eta$."""

from functools import singledispatch

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from issm._check import fail
from issm._linalg import noise_factor
from issm._types import PRNGKey
from issm.models.discrete_emissions import BernoulliEmission, NegativeBinomialEmission, PoissonEmission
from issm.models.emissions import Emission, GaussianEmission


@singledispatch
def couple(
    emission: Emission,
    key: PRNGKey,
    emissions: Float[Array, "num_timesteps emission_dim"],
    predictors: Float[Array, "num_timesteps emission_dim"],
    others: Float[Array, "num_timesteps emission_dim"],
) -> Float[Array, "num_timesteps emission_dim"]:
    r"""A draw of $y'$; equal predictors give $y$ itself where it was observed, and what was missing is drawn.

    Args:
        emission: The emission model.
        key: JAX random key.
        emissions: $y$; NaN is missing.
        predictors: $\eta$.
        others: $\eta'$.
    """
    fail(
        "model.emission",
        got=f"a {type(emission).__name__}",
        expected="one of the emission models of this library, whose noise two worlds can share",
        remedy="Ask for the expected emissions with `sample_effect`, or register a rule with `couple.register`.",
    )


@couple.register
def _(emission: GaussianEmission, key: PRNGKey, emissions: Array, predictors: Array, others: Array) -> Array:
    r"""$y' = \eta' + r$ with $r = y - \eta$, and r given the entries of the step that were observed where it is missing."""
    observed = ~jnp.isnan(emissions)
    fresh = (
        jax.random.normal(key, emissions.shape, predictors.dtype)
        @ noise_factor(emission.cov, diagonal=emission.cov.ndim == 1).T
    )
    off = jnp.where(observed, emissions - predictors - fresh, 0.0)
    if emission.cov.ndim == 2:
        both = observed[:, :, None] & observed[:, None, :]
        cov = jnp.where(both, emission.cov[None], jnp.eye(emission.cov.shape[0], dtype=off.dtype)[None])
        solved = jnp.where(observed, jnp.linalg.solve(cov, off[:, :, None])[:, :, 0], 0.0)
        fresh = fresh + solved @ emission.cov
    return jnp.where(observed, emissions + (others - predictors), others + fresh)


@couple.register
def _(emission: PoissonEmission, key: PRNGKey, emissions: Array, predictors: Array, others: Array) -> Array:
    """Thinning: events of a Poisson process are kept or added, those in common being the same."""
    thin_key, fresh_key = jax.random.split(key)
    thinned = _thin(thin_key, emissions, emission.mean(predictors), emission.mean(others))
    return jnp.where(jnp.isnan(emissions), emission.sample(fresh_key, others), thinned)


@couple.register
def _(emission: NegativeBinomialEmission, key: PRNGKey, emissions: Array, predictors: Array, others: Array) -> Array:
    r"""Thinning given the gamma factor of the rate, $g \mid y \sim Gamma(r + y, r + \mu)$."""
    gamma_key, thin_key, fresh_key = jax.random.split(key, 3)
    mean, other = emission.mean(predictors), emission.mean(others)
    shape = emission.concentration[None]
    counts = jnp.where(jnp.isnan(emissions), 0.0, emissions)
    factor = jax.random.gamma(gamma_key, shape + counts, dtype=mean.dtype) / (shape + mean)
    thinned = _thin(thin_key, emissions, mean * factor, other * factor)
    return jnp.where(jnp.isnan(emissions), emission.sample(fresh_key, others), thinned)


@couple.register
def _(emission: BernoulliEmission, key: PRNGKey, emissions: Array, predictors: Array, others: Array) -> Array:
    r"""One uniform number decides in both worlds: $y = 1[v < p]$, $y' = 1[v < p']$."""
    share = jax.random.uniform(key, emissions.shape, predictors.dtype)
    mean, other = emission.mean(predictors), emission.mean(others)
    level = jnp.where(emissions == 1, share * mean, mean + share * (1 - mean))
    level = jnp.where(jnp.isnan(emissions), share, level)
    return (level < other).astype(predictors.dtype)


def _thin(key: PRNGKey, counts: Array, mean: Array, other: Array) -> Array:
    kept_key, new_key = jax.random.split(key)
    counts = jnp.where(jnp.isnan(counts), 0.0, counts)
    share = jnp.clip(other / jnp.where(mean > 0, mean, 1.0), 0.0, 1.0)
    kept = jax.random.binomial(kept_key, counts, jnp.where(share < 1, share, 0.5), dtype=mean.dtype)
    added = counts + jax.random.poisson(new_key, jnp.maximum(other - mean, 0.0)).astype(mean.dtype)
    return jnp.where(other > mean, added, jnp.where(share < 1, kept, counts))
