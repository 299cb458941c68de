r"""The numbers of a general model that a gradient may move freely: variances and concentrations as logarithms above a floor."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from issm._trees import apply_mask, trainable_masks
from issm.models.fields import TimeVarying
from issm.models.nonlinear import NonlinearDynamics
from issm.models.ssm import SSM

DYNAMICS_FLOOR, INITIAL_FLOOR, EMISSION_FLOOR = 1e-7, 1e-5, 1e-5
"""Smallest variances that are learned, in the squared units of states and emissions."""


def to_free(model: SSM) -> SSM:
    """The model with its positive numbers replaced by unconstrained ones."""
    return _replace(model, lambda value, floor: _to_free(value, floor))


def from_free(free: SSM, like: SSM) -> SSM:
    """The model of unconstrained numbers; a variance that is exactly zero in `like` stays so."""
    wheres = _positive_fields(like)
    model = free
    for where, floor in wheres:
        old = where(like)
        new = _from_free(where(free), floor)
        if old.ndim == 1:
            new = jnp.where(old == 0, 0.0, new)
        model = eqx.tree_at(where, model, new)
    return model


def split(model: SSM, trainable: Any, *, may_be_none: bool = False) -> tuple[Any, Any, Any]:
    """The arrays of a model that a gradient can move, the rest, and Booleans that say what of the former may change."""
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    masks = trainable_masks(arrays, trainable, fixed=TimeVarying, may_be_none=may_be_none)
    if hasattr(model.emission, "exposure"):
        shape = getattr(model.emission, "exposure").shape  # noqa: B009
        masks = eqx.tree_at(lambda m: m.emission.exposure, masks, np.zeros(shape, bool))
    return arrays, rest, masks


def keep_frozen(masks: Any, new: Any, old: Any) -> Any:
    """`new` with the entries of `old` where the masks are false, to the last bit."""
    arrays, rest = eqx.partition(new, eqx.is_inexact_array)
    return eqx.combine(apply_mask(masks, arrays, eqx.filter(old, eqx.is_inexact_array)), rest)


def learning_rates(arrays: Any, dynamics_rate: float, emission_rate: float) -> Any:
    """One rate for maps, another for linear dynamics, the initial state and all noise."""
    slow = jax.tree.map(lambda _: emission_rate, arrays)
    rates = eqx.tree_at(
        lambda m: (m.initial, m.dynamics),
        slow,
        jax.tree.map(lambda _: dynamics_rate, (arrays.initial, arrays.dynamics)),
    )
    if isinstance(arrays.dynamics, NonlinearDynamics):
        slow_map = jax.tree.map(lambda _: emission_rate, arrays.dynamics.map)
        rates = eqx.tree_at(lambda m: m.dynamics.map, rates, slow_map)
    for name in ("cov", "concentration"):
        if hasattr(arrays.emission, name):
            rates = eqx.tree_at(lambda m, n=name: getattr(m.emission, n), rates, dynamics_rate)
    return rates


def _positive_fields(model: SSM) -> list:
    fields = [(lambda m: m.initial.cov, INITIAL_FLOOR)]
    if not isinstance(model.dynamics.cov, TimeVarying):
        fields.append((lambda m: m.dynamics.cov, DYNAMICS_FLOOR))
    if hasattr(model.emission, "cov"):
        fields.append((lambda m: m.emission.cov, EMISSION_FLOOR))
    if hasattr(model.emission, "concentration"):
        fields.append((lambda m: m.emission.concentration, EMISSION_FLOOR))
    return fields


def _replace(model: SSM, change: Any) -> SSM:
    for where, floor in _positive_fields(model):
        model = eqx.tree_at(where, model, change(where(model), floor))
    return model


def _to_free(value: Array, floor: float) -> Array:
    if value.ndim == 1:
        return jnp.log(jnp.maximum(value - floor, floor / 100))
    factor, least = jnp.linalg.cholesky(value), floor**0.5
    diagonal = jnp.diagonal(factor)
    return factor + jnp.diag(jnp.log(jnp.maximum(diagonal - least, least / 100)) - diagonal)


def _from_free(free: Array, floor: float) -> Array:
    if free.ndim == 1:
        return floor + jnp.exp(free)
    lower = jnp.tril(free, -1) + jnp.diag(floor**0.5 + jnp.exp(jnp.diagonal(free)))
    return lower @ lower.T
