r"""What a state does while it is held: total effects, and the part that goes round held mediators.

Two worlds hold the same states; in one of them the source is held at one more unit. With $M_j$ zero in the rows of the held
states, the difference moves by $\delta_h = M_j A \delta_{h-1} + e_j$.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from issm._check import fail
from issm._compile import jit_quickly
from issm._host import to_device
from issm._tables import join_words
from issm.causal.predict import quantile_of_level
from issm.causal.responses import (
    Response,
    as_number,
    check_constant,
    check_num_steps,
    check_state,
    course,
    with_uncertainty,
)
from issm.causal.summaries import response_table
from issm.causal.uncertainty import Directions, as_uncertain_parameters
from issm.models.fields import values_of
from issm.models.lgssm import ParamsLGSSM


class SustainedEffect(eqx.Module):
    r"""Effect of holding one state, for as long as it takes and step by step. `states` and `emissions` are those of `limit`.

    With one source the arrays are as below; `total_effects` adds a last axis of sources, so that entry (i, j) of `states` is
    the effect of state j on state i.

    Attributes:
        limit: After infinitely many steps: states `(state_dim,)`, emissions `(emission_dim,)`. NaN where there is no limit.
        per_step: h steps after the clamp was put on, for h = 0 ... num_steps: states `(num_steps + 1, state_dim)`, emissions
            `(num_steps + 1, emission_dim)`; None if no `num_steps` was asked for.
        stable: Whether the limit exists: the spectral radius is below one. With draws of the parameters, in all draws.
        spectral_radius: Largest modulus of the eigenvalues of $M_j A$, the dynamics of the states that are not held. With draws
            of the parameters, the largest of all draws. It is a report: its derivative is zero.
        level: Level of the intervals.

    References:
        Horn & Johnson (2013), *Matrix Analysis*, corollary 5.6.16 (the limit is a Neumann series).

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params(
        ...     [0.0, 0.0], [1.0, 1.0], [[0.5, 0.0], [1.0, 2.0]], [0.1, 0.1], [[1.0, 1.0]], [0.5])
        >>> effects = issm.total_effects(params)
        >>> effects.stable.tolist(), effects.states.tolist()
        ([False, True], [[nan, 0.0], [nan, 1.0]])
    """

    limit: Response
    per_step: Response | None
    stable: Bool[Array, "*sources"]
    spectral_radius: Float[Array, "*sources"]
    level: Float[Array, ""]

    @property
    def states(self) -> Float[Array, "state_dim *sources"]:
        """Effect on every state in the limit."""
        return self.limit.states

    @property
    def emissions(self) -> Float[Array, "emission_dim *sources"]:
        """Effect on every emission in the limit."""
        return self.limit.emissions

    def summary(self) -> str:
        """Effects in the limit: a row for every state or emission, a column for every source.

        Returns:
            Two tables, and which limits do not exist.
        """
        parts = []
        for name in ("states", "emissions"):
            values, spread = getattr(self.limit, name), getattr(self.limit, f"{name}_spread")
            if values.ndim == 1:
                values, spread = values[:, None], jax.tree.map(lambda leaf: leaf[:, None], spread)
            table = {"": (values, spread)}
            parts.append(response_table(table, rows_name=name, columns_name="of source", title=f"Effect on {name}"))
        unstable = [int(j) for j in np.flatnonzero(~np.atleast_1d(np.asarray(self.stable)))]
        note = [f"no limit for source {join_words(unstable)}: the other states run away"] if unstable else []
        return "\n\n".join(parts + note)


def total_effects(
    params: ParamsLGSSM, *, num_steps: int | None = None, value: Any = 1.0, parameters: Any = None, level: Any = 0.95
) -> SustainedEffect:
    r"""Effect of every state on every other while it is held, $E[y \mid do(x_j = v)] - E[y \mid do(x_j = 0)]$.

    All paths count, through other states too. In the limit this is the clamped resolvent $(I - M_j A)^{-1} e_j v$, where $M_j$
    is the identity without the row of j: the source cannot answer back. The limit exists if the spectral radius of $M_j A$ is
    below one; whether it does is reported for each source.

    Args:
        params: Model parameters, with constant dynamics and emission weights.
        num_steps: Number of steps after the first for which the effect is wanted too, at least 1. None: the limit alone.
        value: v, in the units of the states; one for effects per unit.
        parameters: What is known of the parameters, draws or a covariance, as for `causal_effect`. None: known exactly.
        level: Level of the intervals, above 0 and below 1.

    Returns:
        Effects with a last axis of sources: `states (state_dim, state_dim)`, `emissions (emission_dim, state_dim)`, entry
        (i, j) from state j to i; the diagonal of `states` is v.

    Raises:
        ValueError: If a weight varies in time, `num_steps` is below 1, or `parameters` are not those of a model like `params`.

    References:
        Pearl (2009), *Causality*, sec. 4.5.1 and 5.3 (total effects in linear systems).

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params(
        ...     [0.0, 0.0], [1.0, 1.0], [[0.5, 0.0], [1.0, 0.5]], [0.1, 0.1], [[1.0, 1.0]], [0.5])
        >>> effects = issm.total_effects(params, num_steps=2)
        >>> effects.states.tolist()
        [[1.0, 0.0], [2.0, 1.0]]
        >>> effects.per_step.states[:, 1, 0].tolist()
        [0.0, 1.0, 1.5]
    """
    check_constant(params)
    state_dim = params.state_dim
    return _checked_effects(
        params, jnp.arange(state_dim), jnp.eye(state_dim, dtype=bool), num_steps, value, parameters, level
    )


def controlled_direct_effect(
    params: ParamsLGSSM,
    *,
    source: int,
    mediators: Sequence[int],
    num_steps: int | None = None,
    value: Any = 1.0,
    parameters: Any = None,
    level: Any = 0.95,
) -> SustainedEffect:
    r"""Effect of holding one state while its mediators are held too, whatever they are held at.

    As `total_effects`, with the rows of the mediators clamped as well: paths through them do not count. In the limit the
    effect is $(I - M A)^{-1} e_j v$, where M is the identity without the rows of source and mediators. With all other states
    but i as mediators it is $A_{ij} v / (1 - A_{ii})$, and one step after the clamp $A_{ij} v$.

    Args:
        params: Model parameters, with constant dynamics and emission weights.
        source: Index j of the state whose effect is asked for.
        mediators: Indices of the states that are held. Empty: the total effect.
        num_steps: Number of steps after the first for which the effect is wanted too, at least 1. None: the limit alone.
        value: v, in the units of the source.
        parameters: What is known of the parameters, draws or a covariance, as for `causal_effect`. None: known exactly.
        level: Level of the intervals, above 0 and below 1.

    Returns:
        Effects `states (state_dim,)`, zero at the mediators and v at the source, and `emissions (emission_dim,)`.

    Raises:
        ValueError: If the source or a mediator is not a state of `params`, the source is among the mediators, a weight varies
            in time, `num_steps` is below 1, or `parameters` are not those of a model like `params`.

    References:
        Pearl (2009), *Causality*, sec. 4.5.3.

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params(
        ...     [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [[0.5, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.5]], [0.1, 0.1, 0.1],
        ...     [[0.0, 0.0, 1.0]], [0.5])
        >>> issm.total_effects(params).states[2, 0].item()
        2.0
        >>> issm.controlled_direct_effect(params, source=0, mediators=[1]).states.tolist()
        [1.0, 0.0, 1.0]
    """
    check_constant(params)
    check_state("source", source, params.state_dim)
    if isinstance(mediators, str) or not isinstance(mediators, Sequence):
        fail(
            "mediators",
            got=f"a {type(mediators).__name__}",
            expected="a list or tuple of state indices",
            remedy="Pass `[1]` for one mediator and `[]` for none.",
        )
    for mediator in mediators:
        check_state("mediators", mediator, params.state_dim)
    if source in mediators:
        fail(
            "mediators",
            got=f"state {source}, which is the source",
            expected="states other than the source",
            remedy="The source is held anyway.",
        )
    held = [state == source or state in mediators for state in range(params.state_dim)]
    return _checked_effects(params, to_device(source), to_device(held), num_steps, value, parameters, level)


def _checked_effects(
    params: ParamsLGSSM, sources: Array, held: Array, num_steps: Any, value: Any, parameters: Any, level: Any
) -> SustainedEffect:
    if num_steps is not None:
        check_num_steps(num_steps)
        num_steps = int(num_steps)
    dtype = params.initial.mean.dtype
    uncertain, z = as_uncertain_parameters(params, parameters), quantile_of_level(level, dtype)
    value = as_number("value", value, dtype)
    return _sustained_effects(params, num_steps, sources, held, value, uncertain, z, to_device(level, dtype))


@partial(jit_quickly, static_argnames="num_steps")
def _sustained_effects(
    params: ParamsLGSSM,
    num_steps: int | None,
    sources: Int[Array, "*sources"],
    held: Bool[Array, "*sources state_dim"],
    value: Float[Array, ""],
    uncertain: ParamsLGSSM | Directions | None,
    z: Float[Array, ""],
    level: Float[Array, ""],
) -> SustainedEffect:
    def radius_of(params: ParamsLGSSM) -> Float[Array, "*sources"]:
        radius = lambda held: _spectral_radius(params, held)  # noqa: E731
        return jax.vmap(radius)(held) if held.ndim == 2 else radius(held)

    def respond(params: ParamsLGSSM) -> tuple[Response, Response | None]:
        def one(source: Array, held: Array) -> tuple[Response, Response | None]:
            start = jnp.where(jnp.arange(params.state_dim) == source, value, 0.0)
            limit = _limit(params, start, held)
            return limit, None if num_steps is None else course(params, start, held, num_steps)

        return jax.vmap(one, out_axes=-1)(sources, held) if held.ndim == 2 else one(sources, held)

    limit, per_step = with_uncertainty(respond, params, uncertain, z)
    draws = isinstance(uncertain, ParamsLGSSM)
    spectral_radius = lax.map(radius_of, uncertain).max(axis=0) if draws else radius_of(params)
    return SustainedEffect(limit, per_step, spectral_radius < 1, spectral_radius, level)


def _limit(params: ParamsLGSSM, start: Float[Array, " state_dim"], held: Bool[Array, " state_dim"]) -> Response:
    r"""$(I - M A)^{-1} e_j v$, NaN without a limit."""
    stable = _spectral_radius(params, held) < 1
    free = jnp.where(held[:, None] | ~stable, 0.0, values_of(params.dynamics.weights))
    states = jnp.linalg.solve(jnp.eye(start.size, dtype=start.dtype) - free, start)
    states = jnp.where(held, start, states)  # exactly, not up to rounding
    emissions = values_of(params.emissions.weights) @ states
    return Response(jnp.where(stable, states, jnp.nan), jnp.where(stable, emissions, jnp.nan))


def _spectral_radius(params: ParamsLGSSM, held: Bool[Array, " state_dim"]) -> Float[Array, ""]:
    """Without a derivative: that of the eigenvalues does not exist where two of them meet."""
    free = jnp.where(held[:, None], 0.0, lax.stop_gradient(values_of(params.dynamics.weights)))
    return jnp.abs(jnp.linalg.eigvals(free)).max()
