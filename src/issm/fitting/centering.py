"""What EM does to the emissions before it looks at them: their mean, how many there are, and the least variance of each."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from issm._host import to_device
from issm.models.fields import TimeVarying, is_diagonal, values_of
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials


def mean_of_observed(trials: Trials) -> Array:
    """Mean of the observed entries of each channel; zero where there are none."""
    emissions = trials.emissions
    if not trials.may_miss:
        reference = emissions.mean(axis=(0, 1))
        return reference + (emissions - reference[None, None]).mean(axis=(0, 1))
    observed = ~jnp.isnan(emissions)
    count = observed.sum(axis=(0, 1)).astype(emissions.dtype)
    reference = jnp.where(observed, emissions, 0.0).sum(axis=(0, 1)) / jnp.maximum(count, 1)
    rest = jnp.where(observed, emissions - reference[None, None], 0.0).sum(axis=(0, 1)) / jnp.maximum(count, 1)
    return reference + rest


def variance_of_observed(trials: Trials, mean: Array) -> Array:
    """Variance of the observed entries of each channel around its mean."""
    centered = trials.emissions - mean[None, None]
    if not trials.may_miss:
        return (centered**2).mean(axis=(0, 1))
    observed = ~jnp.isnan(centered)
    count = jnp.maximum(observed.sum(axis=(0, 1)), 1).astype(centered.dtype)
    return jnp.where(observed, centered**2, 0.0).sum(axis=(0, 1)) / count


def shift_bias(params: ParamsLGSSM, by: Array) -> ParamsLGSSM:
    """The parameters of the same model for emissions less `by`."""
    bias = params.emissions.bias
    new = TimeVarying(bias.values - by[None]) if isinstance(bias, TimeVarying) else bias - by
    return eqx.tree_at(lambda p: p.emissions.bias, params, new)


def count_observed(trials: Trials) -> Array:
    """Number of observed entries."""
    emissions = trials.emissions
    if not trials.may_miss:
        return to_device(emissions.size, emissions.dtype)
    return (~jnp.isnan(emissions)).sum().astype(emissions.dtype)


def variance_floor(params: ParamsLGSSM, variances: Array) -> Array:
    """Smallest emission variances: a rounding-sized share of each channel's `variances`, and never above where the fit starts.

    Without one the likelihood has no maximum for a constant channel, or one that the states explain exactly.
    """
    dtype = variances.dtype
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
