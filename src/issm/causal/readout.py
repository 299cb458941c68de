"""What an effect is an effect on, and over which steps it is summed up."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from issm._check import as_array, as_float_array, check_finite, fail
from issm._host import is_concrete, on_host, to_device, with_equal_axes
from issm.causal.history import Scenario
from issm.models.fields import over_time
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import emission_offsets

QUANTITIES = ("emissions", "states")
WINDOWS = ("on", "off", "after")


class Readout(eqx.Module):
    r"""A linear read-out $W y_t$ of the emissions, or $W x_t$ of the states.

    Attributes:
        weights: W, `(num_outputs, emission_dim)` or `(num_outputs, state_dim)`.
        of: What W is applied to, "emissions" or "states".

    Raises:
        ValueError: If `weights` is no matrix of finite numbers, or `of` is neither.

    References:
        `docs/concepts.md`, "Effects".

    Examples:
        >>> import issm
        >>> mean_of_two = issm.Readout([[0.5, 0.5]])
        >>> mean_of_two.weights.shape, mean_of_two.of
        ((1, 2), 'emissions')
    """

    weights: Float[Array, "num_outputs dim"] | None
    of: str = eqx.field(static=True)

    def __init__(self, weights: Any, of: str = "emissions"):
        _check_quantity(of, "'emissions' or 'states'")
        if weights is not None:
            weights = as_float_array("weights", weights)
            if weights.ndim != 2:
                fail(
                    "weights",
                    got=f"shape {tuple(weights.shape)}",
                    expected="(num_outputs, dim)",
                    remedy="One row for each output; wrap a single row in a list.",
                )
            check_finite("weights", weights)
        self.weights = weights
        self.of = of

    def rows(self, params: ParamsLGSSM, num_timesteps: int) -> Float[Array, "num_timesteps num_outputs state_dim"]:
        """The matrices by which the outputs follow from the states."""
        if self.of == "states":
            eye = jnp.eye(params.state_dim, dtype=params.initial.mean.dtype)
            return over_time(eye if self.weights is None else self.weights, num_timesteps)
        rows = over_time(params.emissions.weights, num_timesteps)
        return rows if self.weights is None else over_time(self.weights, num_timesteps) @ rows

    def offsets(
        self, params: ParamsLGSSM, inputs: Float[Array, "num_timesteps input_dim"]
    ) -> Float[Array, "num_timesteps num_outputs"]:
        """What the outputs are where the states are zero."""
        if self.of == "states":
            num_outputs = params.state_dim if self.weights is None else self.weights.shape[0]
            return jnp.zeros((inputs.shape[0], num_outputs), params.initial.mean.dtype)
        offsets = emission_offsets(params, inputs)
        return offsets if self.weights is None else offsets @ self.weights.T


def as_readout(params: ParamsLGSSM, of: Any) -> Readout:
    """Check what the user wants the effect on."""
    if not isinstance(of, Readout):
        _check_quantity(of, "'emissions', 'states' or a Readout")
        return Readout(None, of)
    dim = params.state_dim if of.of == "states" else params.emission_dim
    if of.weights is not None and of.weights.shape[1] != dim:
        fail(
            "of",
            got=f"a read-out of {of.weights.shape[1]} {of.of}",
            expected=f"one of {dim} {of.of}, those of `params`",
            remedy="Give the weights one column for each, or say what they are applied to: `Readout(weights, of='states')`.",
        )
    return Readout(None if of.weights is None else of.weights.astype(params.initial.mean.dtype), of.of)


def read(
    readout: Readout, values: Float[Array, "*axes num_timesteps dim"]
) -> Float[Array, "*axes num_timesteps num_outputs"]:
    """The outputs of emissions or states that were drawn."""
    return values if readout.weights is None else jnp.einsum("mn,...tn->...tm", readout.weights, values)


def as_window(scenario: Scenario, window: Any) -> Bool[Array, "*trials num_timesteps 1"]:
    """The steps that averages and sums run over, as a column for each trial.

    Raises:
        ValueError: If the window is none, leaves the plan, or holds no step.
    """
    num_timesteps = scenario.plan.intervention.num_timesteps
    if window is None:
        return to_device(np.ones((num_timesteps, 1), bool))
    if isinstance(window, str):
        if window not in WINDOWS:
            _fail_window(window, num_timesteps)
        steps = _named_window(scenario, window)
    elif isinstance(window, tuple) and len(window) == 2 and all(_is_integer(end) for end in window):
        start, stop = window
        if not 0 <= start < stop <= num_timesteps:
            _fail_window(window, num_timesteps)
        steps = np.arange(num_timesteps)[:, None]
        steps = (steps >= start) & (steps < stop)
    else:
        given = as_array("window", window)
        if given.dtype != bool or given.shape != (num_timesteps,):
            _fail_window(f"dtype {given.dtype}, shape {given.shape}", num_timesteps)
        steps = given[:, None]
    if is_concrete(steps) and not np.asarray(steps).any(axis=-2).all():
        fail(
            "window",
            got=f"{window!r}, which holds no step of the plan",
            expected="at least one step in every trial",
            remedy="A plan that clamps up to its last step has no steps after: make it longer.",
        )
    return to_device(steps)


def _named_window(scenario: Scenario, window: str) -> Array | np.ndarray:
    plan, reference = scenario.plan.intervention, scenario.reference
    xp, arrays = on_host(plan.mask, plan.value, plan.variance, reference.mask, reference.value, reference.variance)
    mask, value, variance, other_mask, other_value, other_variance = with_equal_axes(*arrays)
    differs = (mask != other_mask) | (value != other_value) | (variance != other_variance)
    on = differs.any(axis=-1, keepdims=True)
    if window == "on":
        return on
    if window == "off":
        return ~on
    later = xp.flip(xp.cumsum(xp.flip(on, -2), -2), -2)
    return later == 0


def _check_quantity(of: Any, expected: str) -> None:
    if not isinstance(of, str) or of not in QUANTITIES:
        fail("of", got=repr(of), expected=expected, remedy="A matrix goes into `Readout(weights, of=...)`.")


def _fail_window(window: Any, num_timesteps: int) -> None:
    fail(
        "window",
        got=str(window),
        expected=f"'on', 'off', 'after', steps (start, stop) with 0 <= start < stop <= {num_timesteps},"
        f" or a Boolean array ({num_timesteps},)",
        remedy="Steps are counted from the start of the plan; None takes them all.",
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
