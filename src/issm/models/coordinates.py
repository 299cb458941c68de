r"""The same model in other coordinates of the states, $x' = M x + o$."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from issm._check import as_float_array, check_finite, check_shape, fail
from issm._host import is_concrete
from issm.interventions import Intervention
from issm.models.fields import TimeVarying, as_matrix, is_diagonal, values_of
from issm.models.lgssm import ParamsLGSSM, ParamsLGSSMDynamics, ParamsLGSSMEmissions, ParamsLGSSMInitial, check_params

SMALLEST_CONDITION = 1e-12


def transform_params(params: ParamsLGSSM, matrix: Any, offset: Any = None) -> ParamsLGSSM:
    r"""The same model with states $x' = M x + o$.

    $$m' = M m + o,\quad S' = M S M^\top,\quad A' = M A M^{-1},\quad b' = M b + o - A' o,\quad B' = M B,\quad
    Q' = M Q M^\top,\quad C' = C M^{-1},\quad d' = d - C' o$$

    D and R stay. Without clamps the distribution of the emissions does not change: the data cannot tell the two apart. With
    clamps it does not change either if the clamps are moved along by `transform_interventions`, which exists only where M does
    not mix what is clamped.

    Args:
        params: The model.
        matrix: M, `(state_dim, state_dim)`, invertible.
        offset: o, `(state_dim,)`, in the units of the new states; None is zero.

    Returns:
        Parameters in the new coordinates. A diagonal covariance stays diagonal if M is known to have one entry in each row and
        column, and becomes full otherwise (also while JAX traces M).

    Raises:
        ValueError: If shapes disagree, an entry is not finite, or M is singular.

    References:
        Durbin & Koopman (2012), sec. 4.2; Van Overschee & De Moor (1996), ch. 2, on systems that no data can tell apart.

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0, 1.0], [1.0, 1.0], [[0.75, 0.25], [0.0, 0.5]], [0.25, 0.5], [[1.0, 2.0]], [0.5])
        >>> swapped = issm.transform_params(params, [[0.0, 1.0], [1.0, 0.0]])
        >>> swapped.dynamics.weights.tolist(), swapped.dynamics.cov.tolist()
        ([[0.5, 0.0], [0.25, 0.75]], [0.5, 0.25])
    """
    check_params(params)
    matrix, offset = _as_affine(matrix, offset, params.state_dim, params.initial.mean.dtype)
    inverse = jnp.linalg.solve(matrix, jnp.eye(params.state_dim, dtype=matrix.dtype))
    monomial = _is_monomial(matrix)
    dynamics, emissions = params.dynamics, params.emissions

    def moved_cov(field: Array | TimeVarying) -> Any:
        if is_diagonal(field) and monomial:
            return _map(lambda cov: jnp.einsum("ij,...j->...i", matrix**2, cov), field)
        return _map(lambda cov: _symmetric(matrix @ cov @ matrix.T), as_matrix(field))

    weights = _map(lambda a: matrix @ a @ inverse, dynamics.weights)
    loadings = _map(lambda c: c @ inverse, emissions.weights)
    bias = _map(lambda b: jnp.einsum("ij,...j->...i", matrix, b), dynamics.bias)
    emission_bias = emissions.bias
    mean = matrix @ params.initial.mean
    if offset is not None:
        mean = mean + offset
        shift = _map(lambda a: offset.reshape((1,) * (a.ndim - 2) + (-1,)) - a @ offset, weights)
        bias = _add(bias, shift)
        emission_bias = _add(emission_bias, _map(lambda c: -(c @ offset), loadings))
    return ParamsLGSSM(
        ParamsLGSSMInitial(mean, values_of(moved_cov(params.initial.cov))),
        ParamsLGSSMDynamics(weights, bias, _map(lambda b: matrix @ b, dynamics.input_weights), moved_cov(dynamics.cov)),
        ParamsLGSSMEmissions(loadings, emission_bias, emissions.input_weights, emissions.cov),
    )


def transform_interventions(interventions: Intervention, matrix: Any, offset: Any = None) -> Intervention:
    r"""The same clamps on states $x' = M x + o$: values $M v + o$, variances $M^2 s$ entry by entry.

    A clamp holds one state. It can be said of the new states only if every clamped state is one of them up to a scale and an
    offset, and enters no other: M may permute and rescale the clamped states and mix the others among themselves.

    Args:
        interventions: The clamps.
        matrix: M, `(state_dim, state_dim)`.
        offset: o, `(state_dim,)`; None is zero.

    Returns:
        Clamps of the new states, with the axes of `interventions`.

    Raises:
        ValueError: If shapes disagree, an entry is not finite, or (where values are known) M mixes a clamped state with others.

    References:
        Nejatbakhsh & Wang (2025), sec. 2; `docs/concepts.md`, "Interventions".

    Examples:
        >>> import issm
        >>> plan = issm.do({0: 2.0}, num_timesteps=3, state_dim=2)
        >>> issm.transform_interventions(plan, [[0.0, 1.0], [-3.0, 0.0]]).value[0].tolist()
        [0.0, -6.0]
    """
    if not isinstance(interventions, Intervention):
        fail(
            "interventions",
            got=f"a {type(interventions).__name__}",
            expected="an Intervention",
            remedy="Build one with `do`, `stimulate` or `Intervention(mask, value)`.",
        )
    matrix, offset = _as_affine(matrix, offset, interventions.state_dim, interventions.value.dtype)
    _check_unmixed(interventions.mask, matrix)
    mask = jnp.einsum("...j,ij->...i", interventions.mask, matrix != 0)
    value = jnp.einsum("...j,ij->...i", interventions.value, matrix)
    if offset is not None:
        value = value + offset.reshape((1,) * (value.ndim - 1) + (-1,))
    variance = jnp.einsum("...j,ij->...i", interventions.variance, matrix**2)
    return Intervention(mask, value, variance)


def _as_affine(matrix: Any, offset: Any, state_dim: int, dtype: Any) -> tuple[Array, Array | None]:
    matrix = as_float_array("matrix", matrix, dtype)
    check_shape(
        "matrix", matrix, (state_dim, state_dim), ("state_dim", "state_dim"), "It maps the states to the new states."
    )
    check_finite("matrix", matrix)
    if is_concrete(matrix):
        values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
        if values[-1] <= SMALLEST_CONDITION * values[0]:
            fail(
                "matrix",
                got=f"a singular matrix (singular values {values[0]:.3g} to {values[-1]:.3g})",
                expected="an invertible one",
                remedy="New states must hold all that the old ones did.",
            )
    if offset is None:
        return matrix, None
    offset = as_float_array("offset", offset, dtype)
    check_shape("offset", offset, (state_dim,), ("state_dim",), "Give one number for each new state.")
    check_finite("offset", offset)
    return matrix, offset


def _is_monomial(matrix: Float[Array, "state_dim state_dim"]) -> bool:
    """Whether every row and every column is known to have exactly one entry."""
    if not is_concrete(matrix):
        return False
    entries = np.asarray(matrix) != 0
    return bool((entries.sum(axis=0) == 1).all() and (entries.sum(axis=1) == 1).all())


def _check_unmixed(mask: Bool[Array, "*steps state_dim"], matrix: Float[Array, "state_dim state_dim"]) -> None:
    if not (is_concrete(mask) and is_concrete(matrix)):
        return
    clamped = np.asarray(mask).any(axis=tuple(range(mask.ndim - 1)))
    entries = np.asarray(matrix) != 0
    for state in np.flatnonzero(clamped):
        rows = np.flatnonzero(entries[:, state])
        if len(rows) != 1 or entries[rows[0]].sum() != 1:
            fail(
                "matrix",
                got=f"one that mixes state {state}, which is clamped, with others",
                expected="a single entry in the column and in the row of a clamped state",
                remedy="Align with the kind 'scaled_permutation', or mix states that are never clamped.",
            )


def _map(function: Callable[[Array], Array], field: Array | TimeVarying) -> Any:
    return TimeVarying(function(field.values)) if isinstance(field, TimeVarying) else function(field)


def _add(a: Array | TimeVarying, b: Array | TimeVarying) -> Any:
    """The sum of two vector fields, which varies in time if one of them does."""
    if not (isinstance(a, TimeVarying) or isinstance(b, TimeVarying)):
        return a + b
    a, b = (values_of(field).reshape(-1, values_of(field).shape[-1]) for field in (a, b))
    return TimeVarying(a + b)


def _symmetric(cov: Array) -> Array:
    return (cov + jnp.swapaxes(cov, -1, -2)) / 2
