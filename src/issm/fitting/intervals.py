"""Means, standard deviations and central intervals of draws of the parameters; exact for an entry that never moves."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from issm._check import check_level
from issm._host import on_host, to_device


def quantiles(draws: Any, level: Any) -> tuple[Any, Any]:
    """Lower and upper ends of the central interval of every entry, over the leading axis."""
    check_level(level)
    tail = (1 - level) / 2

    def of_all(probability: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.quantile(leaf, jnp.asarray(probability, leaf.dtype), axis=0), draws)

    return of_all(tail), of_all(1 - tail)


def means(draws: Any) -> Any:
    """Mean of every entry over the leading axis."""

    def one(leaf: Array) -> Array:
        _, (leaf,) = on_host(leaf)
        return to_device(leaf[0] + (leaf - leaf[:1]).mean(axis=0))

    return jax.tree.map(one, draws)


def standard_deviations(draws: Any) -> Any:
    """Standard deviation of every entry over the leading axis."""

    def one(leaf: Array) -> Array:
        _, (leaf,) = on_host(leaf)
        return to_device((leaf - leaf[:1]).std(axis=0, ddof=1))

    return jax.tree.map(one, draws)
