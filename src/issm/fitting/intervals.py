"""Means, standard deviations and central intervals of draws of the parameters; exact for an entry that never moves."""

from typing import Any

import jax
import jax.numpy as jnp

from issm._check import fail


def check_level(level: Any) -> float:
    """Refuse what is no probability strictly between 0 and 1."""
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        fail("level", got=repr(level), expected="a number between 0 and 1", remedy="For example 0.95.")
    return float(level)


def quantiles(draws: Any, level: float) -> tuple[Any, Any]:
    """Lower and upper ends of the central interval of every entry, over the leading axis."""
    tail = (1 - level) / 2
    lower, upper = (jax.tree.map(lambda leaf, q=q: jnp.quantile(leaf, q, axis=0), draws) for q in (tail, 1 - tail))
    return lower, upper


def means(draws: Any) -> Any:
    """Mean of every entry over the leading axis."""
    return jax.tree.map(lambda leaf: leaf[0] + (leaf - leaf[:1]).mean(axis=0), draws)


def standard_deviations(draws: Any) -> Any:
    """Standard deviation of every entry over the leading axis."""
    return jax.tree.map(lambda leaf: (leaf - leaf[:1]).std(axis=0, ddof=1), draws)
