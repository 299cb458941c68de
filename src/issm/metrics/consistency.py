"""Whether several fits of the same data found the same states."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from issm._check import as_float_array, check_finite, fail
from issm.metrics.alignment import check_kind, linear_map


class Consistency(eqx.Module):
    r"""Agreement of several fits, two by two, after alignment.

    Attributes:
        pairwise: Score of each pair of fits, `(num_fits, num_fits)`; one on the diagonal.
        mean: Mean over different fits.
        lowest: Score of the two that agree least.

    References:
        Hotelling (1936), for "affine"; `docs/how-to/comparing-fits.md`.

    Examples:
        >>> import numpy as np
        >>> from issm.metrics import consistency
        >>> states = np.random.default_rng(0).normal(size=(50, 2))
        >>> round(float(consistency([states, 3 * states[:, ::-1] + 1]).lowest), 6)
        1.0
    """

    pairwise: Float[Array, "num_fits num_fits"]
    mean: Float[Array, ""]
    lowest: Float[Array, ""]


def consistency(states: Any, *, kind: str = "affine") -> Consistency:
    r"""How far fits from several seeds found the same states, whatever their coordinates.

    The score of two fits is one if a map of the given kind turns one into the other, and does not change when such a map is
    applied to either:

    - "affine": the mean squared canonical correlation of the two sets of states;
    - "scaled_permutation": the mean squared correlation of the states, matched one to one;
    - other kinds: $1 - \min_M \sum_t \lVert z_t - M x_t \rVert^2 / \sum_t (\lVert z_t \rVert^2 + \lVert x_t \rVert^2)$ for
      states less their means.

    Args:
        states: Smoothed means of each fit, `(num_fits, ..., state_dim)`, at least two fits.
        kind: Which maps count as no difference, as in `align_states`: "scaled_permutation" where all states are clamped at some
            time, "affine" where none is.

    Returns:
        The score of each pair, their mean and the lowest.

    Raises:
        ValueError: If there are fewer than two fits, an entry is not finite, or the kind is unknown.

    References:
        Hotelling (1936), on canonical correlations; Schönemann (1966).

    Examples:
        >>> import numpy as np
        >>> from issm.metrics import consistency
        >>> first, other = np.random.default_rng(0).normal(size=(2, 1000, 2))
        >>> score = consistency([first, first[:, ::-1], other], kind="permutation")
        >>> round(float(score.pairwise[0, 1]), 6), bool(score.lowest < 0.2)
        (1.0, True)
    """
    check_kind(kind)
    states = as_float_array("states", states)
    if states.ndim < 3 or states.shape[0] < 2:
        fail(
            "states",
            got=f"shape {tuple(states.shape)}",
            expected="(num_fits, ..., state_dim) with at least two fits",
            remedy="Stack the smoothed means of the fits.",
        )
    check_finite("states", states)
    return _consistency(states.reshape(states.shape[0], -1, states.shape[-1]), kind)


@partial(jax.jit, static_argnames="kind")
def _consistency(states: Array, kind: str) -> Consistency:
    centered = states - states.mean(axis=1, keepdims=True)
    if kind == "affine":  # an orthonormal basis of each set, without the directions in which it does not vary
        left, strength, _ = jnp.linalg.svd(centered, full_matrices=False)
        tolerance = states.shape[1] * jnp.finfo(states.dtype).eps * strength.max(axis=1, keepdims=True)
        centered = jnp.where((strength > tolerance)[:, None], left, 0.0)
    pairwise = jax.vmap(lambda a: jax.vmap(lambda b: _score(a, b, kind))(centered))(centered)
    num_fits = states.shape[0]
    different = ~jnp.eye(num_fits, dtype=bool)
    mean = jnp.where(different, pairwise, 0.0).sum() / (num_fits * (num_fits - 1))
    return Consistency(pairwise, mean, jnp.where(different, pairwise, jnp.inf).min())


def _score(states: Array, others: Array, kind: str) -> Array:
    if kind == "affine":
        return ((others.T @ states) ** 2).sum() / states.shape[1]
    matrix = linear_map(states, others, kind, weigh=kind == "scaled_permutation")
    if kind == "scaled_permutation":
        products = jnp.where(matrix != 0, others.T @ states, 0.0) ** 2
        sizes = (others**2).sum(axis=0)[:, None] * (states**2).sum(axis=0)[None]
        return jnp.where(sizes > 0, products / jnp.where(sizes > 0, sizes, 1.0), 0.0).sum(axis=1).mean()
    power = (others**2).sum() + (states**2).sum()
    return 1 - ((others - states @ matrix.T) ** 2).sum() / jnp.where(power > 0, power, 1.0)
