"""What EM does to the emissions before it looks at them: their mean, how many there are, and the least variance of each."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from issm.models.fields import TimeVarying, is_diagonal, values_of
from issm.models.lgssm import ParamsLGSSM


def mean_of_observed(emissions: Array) -> Array:
    """Mean of the observed entries of each channel; zero where there are none."""
    observed = ~jnp.isnan(emissions)
    count = observed.sum(axis=(0, 1)).astype(emissions.dtype)
    reference = jnp.where(observed, emissions, 0.0).sum(axis=(0, 1)) / jnp.maximum(count, 1)
    rest = jnp.where(observed, emissions - reference[None, None], 0.0).sum(axis=(0, 1)) / jnp.maximum(count, 1)
    return reference + rest


def shift_bias(params: ParamsLGSSM, by: Array) -> ParamsLGSSM:
    """The parameters of the same model for emissions less `by`."""
    bias = params.emissions.bias
    new = TimeVarying(bias.values - by[None]) if isinstance(bias, TimeVarying) else bias - by
    return eqx.tree_at(lambda p: p.emissions.bias, params, new)


def count_observed(emissions: Array) -> Array:
    """Number of observed entries."""
    return (~jnp.isnan(emissions)).sum().astype(emissions.dtype)


def variance_floor(params: ParamsLGSSM, emissions: Array) -> Array:
    """Smallest emission variances: a rounding-sized share of each channel's variance, and never above where the fit starts.

    Without one the likelihood has no maximum for a constant channel, or one that the states explain exactly.
    """
    dtype = emissions.dtype
    observed = ~jnp.isnan(emissions)
    centered = jnp.where(observed, emissions - mean_of_observed(emissions)[None, None], 0.0)
    variances = (centered**2).sum(axis=(0, 1)) / jnp.maximum(observed.sum(axis=(0, 1)), 1).astype(dtype)
    typical = variances.sum() / jnp.maximum((variances > 0).sum(), 1).astype(dtype)
    start = values_of(params.emissions.cov)
    if isinstance(params.emissions.cov, TimeVarying):
        return jnp.zeros_like(variances)
    diagonal = is_diagonal(start)
    own = start if diagonal else jnp.diagonal(start)
    scale = jnp.where(variances > 0, variances, jnp.where(typical > 0, typical, own))
    floor = _floor_ratio(dtype) * scale
    if diagonal:
        return jnp.minimum(floor, start)
    root = jnp.sqrt(floor)
    smallest = jnp.linalg.eigvalsh(start / root[:, None] / root[None]).min()
    return floor * jnp.minimum(1.0, smallest)


def variance_given_others(cov: Array, floor: Array) -> Array:
    """Variance of each emission given all others: small where a full covariance is close to singular along it."""
    scale = jnp.sqrt(floor)
    precision = jnp.linalg.inv(cov / scale[:, None] / scale[None])
    return floor / jnp.diagonal(precision)


def _floor_ratio(dtype: Any) -> float:
    return 1e-10 if dtype == jnp.float64 else 1e-6
