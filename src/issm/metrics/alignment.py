"""States of a fit in the coordinates of the true ones, or of another fit."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from optax.assignment import hungarian_algorithm

from issm._check import as_float_array, check_finite, common_float_dtype, fail

KINDS = ("sign", "permutation", "signed_permutation", "scaled_permutation", "orthogonal", "affine")


class Alignment(eqx.Module):
    r"""The map $x' = M x + o$ that brings states closest to others, and how close.

    Attributes:
        matrix: M, `(true_dim, state_dim)`.
        offset: o, `(true_dim,)`, in the units of the states aligned to.
        r2: Share of the variance of each of those states that the aligned ones explain, `(true_dim,)`; NaN where they do not vary.

    References:
        Schönemann (1966); `docs/how-to/comparing-fits.md`.

    Examples:
        >>> from issm.metrics import align_states
        >>> alignment = align_states([[0.0], [1.0], [2.0]], [[1.0], [3.0], [5.0]])
        >>> alignment.matrix.round(6).tolist(), alignment.offset.round(6).tolist()
        ([[2.0]], [1.0])
    """

    matrix: Float[Array, "true_dim state_dim"]
    offset: Float[Array, " true_dim"]
    r2: Float[Array, " true_dim"]

    def apply(self, states: Any) -> Float[Array, "*steps true_dim"]:
        r"""$M x + o$ at every step of `states`, `(..., state_dim)`."""
        states = as_float_array("states", states, self.matrix.dtype)
        moved = jnp.einsum("...j,ij->...i", states, self.matrix)
        return moved + self.offset.reshape((1,) * (moved.ndim - 1) + (-1,))


def align_states(states: Any, truth: Any, *, kind: str = "affine", center: bool = True) -> Alignment:
    r"""Find the map $M x_t + o$ of one kind that is closest to the true states, $\min \sum_t \lVert z_t - M x_t - o \rVert^2$.

    Pass `matrix` and `offset` to `transform_params` to move the parameters along.

    | kind | M | leaves unchanged |
    |---|---|---|
    | "sign" | diagonal, entries ±1 | order and size |
    | "permutation" | a permutation | sign and size |
    | "signed_permutation" | a permutation times signs | size |
    | "scaled_permutation" | one entry in each row and column | which states are clamped, up to order and units |
    | "orthogonal" | rotation and reflection | distances |
    | "affine" | any | nothing |

    The permutations weigh each true state by its inverse variance, so that units do not matter; they are found exactly, by the
    Hungarian algorithm.

    Args:
        states: x, `(..., state_dim)`: smoothed means of a fit, say.
        truth: z, `(..., true_dim)` with the same leading axes; `true_dim` may differ from `state_dim` for "affine" alone.
        kind: Which maps are allowed.
        center: Whether there is an offset o; without one it is zero.

    Returns:
        The map, and the share of variance explained after it.

    Raises:
        ValueError: If shapes disagree, an entry is not finite, or the kind is unknown.

    References:
        Schönemann (1966), for "orthogonal"; Kuhn (1955), for the permutations.

    Examples:
        >>> import numpy as np
        >>> from issm.metrics import align_states
        >>> truth = np.random.default_rng(0).normal(size=(50, 2))
        >>> align_states(-truth[:, ::-1], truth, kind="signed_permutation").matrix.round(3).tolist()
        [[0.0, -1.0], [-1.0, 0.0]]
    """
    check_kind(kind)
    dtype = common_float_dtype(states, truth)
    states, truth = as_float_array("states", states, dtype), as_float_array("truth", truth, dtype)
    if states.ndim < 2 or states.shape[:-1] != truth.shape[:-1]:
        fail(
            "truth",
            got=f"shape {tuple(truth.shape)} for states of shape {tuple(states.shape)}",
            expected="the same steps in both, with the states in the last axis",
            remedy="Compare states of the same trials.",
        )
    if kind != "affine" and states.shape[-1] != truth.shape[-1]:
        fail(
            "kind",
            got=f"{kind!r} for {states.shape[-1]} and {truth.shape[-1]} states",
            expected="'affine', or as many states in both",
            remedy="Only an affine map changes the number of states.",
        )
    check_finite("states", states)
    check_finite("truth", truth)
    flat, goal = (array.reshape(-1, array.shape[-1]) for array in (states, truth))
    return _align(flat, goal, kind, bool(center))


def check_kind(kind: str) -> None:
    """Refuse a kind of alignment that does not exist."""
    if kind not in KINDS:
        fail("kind", got=repr(kind), expected=f"one of {', '.join(KINDS)}", remedy="See the table of `align_states`.")


def linear_map(
    states: Float[Array, "steps state_dim"], truth: Float[Array, "steps true_dim"], kind: str, *, weigh: bool = True
) -> Array:
    """M of one kind, for states that need no offset; `weigh`: whether errors count in units of each true state."""
    if kind == "affine":
        return jnp.linalg.lstsq(states, truth)[0].T
    cross = truth.T @ states
    if kind == "orthogonal":
        left, _, right = jnp.linalg.svd(cross, full_matrices=False)
        return left @ right
    signs = jnp.where(cross < 0, -1.0, 1.0)
    if kind == "sign":
        return jnp.diag(jnp.diagonal(signs))
    size, power = (states**2).sum(axis=0), (truth**2).sum(axis=0)
    power = jnp.where((power > 0) & weigh, power, 1.0)[:, None]
    if kind == "scaled_permutation":
        size = jnp.where(size > 0, size, 1.0)
        entries = cross / size[None]
        cost = -(cross**2) / size[None] / power
    else:
        entries = jnp.ones_like(cross) if kind == "permutation" else signs
        cost = (size[None] - 2 * entries * cross) / power
    rows, columns = hungarian_algorithm(cost.astype(jnp.result_type(float)))
    chosen = jnp.zeros_like(cross).at[rows, columns].set(1.0)
    return jnp.where(chosen > 0, jnp.where(entries == 0, 1.0, entries), 0.0)


@partial(jax.jit, static_argnames=("kind", "center"))
def _align(states: Array, truth: Array, kind: str, center: bool) -> Alignment:
    middle = truth.mean(axis=0)
    ours, theirs = (a.mean(axis=0) if center else jnp.zeros_like(a[0]) for a in (states, truth))
    matrix = linear_map(states - ours[None], truth - theirs[None], kind)
    offset = theirs - matrix @ ours
    rest = ((truth - states @ matrix.T - offset[None]) ** 2).sum(axis=0)
    total = ((truth - middle[None]) ** 2).sum(axis=0)
    r2 = jnp.where(total > 0, 1 - rest / jnp.where(total > 0, total, 1.0), jnp.nan)
    return Alignment(matrix, offset, r2)
