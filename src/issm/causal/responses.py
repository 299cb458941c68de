r"""How expected states and emissions respond to one state: to a pulse, $A^h e_j v$, and the machinery of all responses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from issm._check import as_float_array, check_finite, fail
from issm._compile import jit_quickly
from issm._host import to_device
from issm._linalg import safe_sqrt
from issm.causal.predict import quantile_of_level
from issm.causal.propagate import DRAWS_AT_ONCE
from issm.causal.summaries import response_table
from issm.causal.uncertainty import Directions, Spread, as_uncertain_parameters, empirical_spread, normal_spread
from issm.models.fields import TimeVarying, values_of
from issm.models.lgssm import ParamsLGSSM, check_params


class Response(eqx.Module):
    """Difference that one clamp makes to expected states and emissions; the same in every trial.

    Attributes:
        states: Of every state, in its units.
        emissions: Of every emission, in its units.
        states_spread: Uncertainty of `states` for want of knowledge of the parameters, all arrays of its shape; None where the
            parameters are taken as known.
        emissions_spread: The same for `emissions`.

    References:
        `docs/concepts.md`, "Effects".

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[2.0]], [0.5])
        >>> response = issm.impulse_response(params, 2, source=0).per_step
        >>> response.emissions.tolist(), response.emissions_spread is None
        ([[2.0], [1.0], [0.5]], True)
    """

    states: Float[Array, "*shape_of_states"]
    emissions: Float[Array, "*shape_of_emissions"]
    states_spread: Spread | None = None
    emissions_spread: Spread | None = None


class ImpulseResponse(eqx.Module):
    """Result of `impulse_response`. `states` and `emissions` are those of `per_step`.

    Attributes:
        per_step: h steps after the pulse, for h = 0 ... num_steps: states `(num_steps + 1, state_dim)`, emissions
            `(num_steps + 1, emission_dim)`.
        cumulative: Summed from the pulse up to every step, same shapes.
        level: Level of the intervals.

    References:
        `docs/concepts.md`, "Effects".

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[2.0]], [0.5])
        >>> issm.impulse_response(params, 2, source=0).cumulative.states[:, 0].tolist()
        [1.0, 1.5, 1.75]
    """

    per_step: Response
    cumulative: Response
    level: Float[Array, ""]

    @property
    def states(self) -> Float[Array, "num_steps_and_pulse state_dim"]:
        """Response of every state at every step."""
        return self.per_step.states

    @property
    def emissions(self) -> Float[Array, "num_steps_and_pulse emission_dim"]:
        """Response of every emission at every step."""
        return self.per_step.emissions

    def summary(self) -> str:
        """Responses at some steps after the pulse, with their standard deviations where parameters are uncertain.

        Returns:
            A table.
        """
        each = self.per_step
        parts = {"state": (each.states, each.states_spread), "emission": (each.emissions, each.emissions_spread)}
        return response_table(parts, rows_name="step", columns_name="", title="Response to a pulse")


def impulse_response(
    params: ParamsLGSSM, num_steps: int, *, source: int, value: Any = 1.0, parameters: Any = None, level: Any = 0.95
) -> ImpulseResponse:
    r"""Response to clamping one state for one step, $E[y_{t+h} \mid do(x_{t,j} = v)] - E[y_{t+h} \mid do(x_{t,j} = 0)]$.

    For the states this is $A^h e_j v$, for the emissions $C A^h e_j v$: the state is free again after the pulse, and nothing
    else moves in the step of the pulse itself. What went before, inputs and noise cancel.

    Args:
        params: Model parameters, with constant dynamics and emission weights; one step is one bin of the data they were fitted to.
        num_steps: Number of steps after the pulse, at least 1.
        source: Index j of the clamped state.
        value: v, in the units of the state.
        parameters: What is known of the parameters, draws or a covariance, as for `causal_effect`; with draws the response is
            the mean over the draws. None: known exactly.
        level: Level of the intervals, above 0 and below 1.

    Returns:
        States `(num_steps + 1, state_dim)` and emissions `(num_steps + 1, emission_dim)`, per step and cumulative.

    Raises:
        ValueError: If `source` is not a state of `params`, `num_steps` is below 1, a weight varies in time, or `parameters` are
            not those of a model like `params`.

    References:
        Nejatbakhsh & Wang (2025), sec. 2; Pearl (2009), *Causality*, sec. 3.2.

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params(
        ...     [0.0, 0.0], [1.0, 1.0], [[0.5, 0.0], [1.0, 0.5]], [0.1, 0.1], [[1.0, 1.0]], [0.5])
        >>> response = issm.impulse_response(params, 2, source=0, value=4.0)
        >>> response.states.tolist()
        [[4.0, 0.0], [2.0, 4.0], [1.0, 4.0]]
        >>> response.emissions[:, 0].tolist()
        [4.0, 6.0, 5.0]
    """
    check_constant(params)
    check_num_steps(num_steps)
    check_state("source", source, params.state_dim)
    dtype = params.initial.mean.dtype
    uncertain, z = as_uncertain_parameters(params, parameters), quantile_of_level(level, dtype)
    value = as_number("value", value, dtype)
    return _impulse_response(params, int(num_steps), to_device(source), value, uncertain, z, to_device(level, dtype))


@partial(jit_quickly, static_argnames="num_steps")
def _impulse_response(
    params: ParamsLGSSM,
    num_steps: int,
    source: Int[Array, ""],
    value: Float[Array, ""],
    uncertain: ParamsLGSSM | Directions | None,
    z: Float[Array, ""],
    level: Float[Array, ""],
) -> ImpulseResponse:
    pulse = jnp.where(jnp.arange(params.state_dim) == source, value, 0.0)

    def respond(params: ParamsLGSSM) -> tuple[Response, Response]:
        per_step = course(params, pulse, jnp.zeros(pulse.shape, bool), num_steps)
        return per_step, jax.tree.map(lambda path: jnp.cumsum(path, axis=0), per_step)

    per_step, cumulative = with_uncertainty(respond, params, uncertain, z)
    return ImpulseResponse(per_step, cumulative, level)


def course(
    params: ParamsLGSSM, start: Float[Array, " state_dim"], held: Bool[Array, " state_dim"], num_steps: int
) -> Response:
    """What becomes of a difference `start` between two worlds while the states in `held` keep theirs."""
    weights = values_of(params.dynamics.weights)  # constant: see check_constant

    def step(change: Array, _: None) -> tuple[Array, Array]:
        change = jnp.where(held, start, weights @ change)
        return change, change

    later = lax.scan(step, start, None, length=num_steps)[1]
    states = jnp.concatenate([start[None], later])
    return Response(states, states @ values_of(params.emissions.weights).T)


def with_uncertainty(
    respond: Callable[[ParamsLGSSM], Any], params: ParamsLGSSM, uncertain: ParamsLGSSM | Directions | None, z: Array
) -> Any:
    """The responses that `respond` returns for some parameters, with the spread that the uncertainty gives them.

    A response that does not exist, NaN, has a spread of NaN.
    """
    if uncertain is None:
        return respond(params)
    if isinstance(uncertain, Directions):
        known, derivative = jax.linearize(respond, params)
        others = jax.vmap(derivative)(uncertain.columns)
    else:
        others = lax.map(respond, uncertain, batch_size=DRAWS_AT_ONCE)
        known = jax.tree.map(lambda draws: draws.mean(axis=0), others)

    def spread(mean: Array, others: Array) -> Spread:
        if isinstance(uncertain, Directions):
            found = normal_spread(mean, safe_sqrt((others**2).sum(axis=0)), z)
        else:
            found = empirical_spread(others, z)
        return jax.tree.map(lambda leaf: jnp.where(jnp.isnan(mean), jnp.nan, leaf), found)

    def combine(known: Response, others: Response) -> Response:
        return Response(
            known.states,
            known.emissions,
            spread(known.states, others.states),
            spread(known.emissions, others.emissions),
        )

    return jax.tree.map(combine, known, others, is_leaf=lambda node: isinstance(node, Response))


def check_constant(params: ParamsLGSSM) -> None:
    """Refuse what is no model, and one whose weights vary in time: a response would depend on when it is asked for."""
    check_params(params)
    for block in ("dynamics", "emissions"):
        if isinstance(getattr(params, block).weights, TimeVarying):
            fail(
                f"params.{block}.weights",
                got="a TimeVarying",
                expected="weights that are constant in time",
                remedy="Ask `causal_effect` for the effect of a plan, whose steps say when it happens.",
            )


def check_num_steps(num_steps: Any) -> None:
    """Refuse what is no number of steps."""
    if not _is_integer(num_steps) or num_steps < 1:
        fail(
            "num_steps",
            got=repr(num_steps),
            expected="an integer of at least 1",
            remedy="Count the steps after the first, whose response is always returned.",
        )


def check_state(argument: str, state: Any, state_dim: int) -> None:
    """Refuse what is no state of the model."""
    if not _is_integer(state) or not 0 <= state < state_dim:
        fail(
            argument,
            got=f"state {state!r}",
            expected=f"an integer in 0 ... {state_dim - 1}",
            remedy="States are counted from 0.",
        )


def as_number(argument: str, value: Any, dtype: Any) -> Float[Array, ""]:
    """Check one finite number."""
    number = as_float_array(argument, value, dtype)
    if number.ndim:
        fail(
            argument,
            got=f"shape {tuple(number.shape)}",
            expected="one number",
            remedy="Responses are proportional to it: ask once, and scale.",
        )
    check_finite(argument, number)
    return number


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
