"""Draws of states from a drift by Euler's method, under clamps."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from issm._check import as_float_array, check_finite, common_float_dtype, fail
from issm._host import is_concrete
from issm._linalg import safe_sqrt
from issm._types import PRNGKey
from issm.interventions import Intervention, no_intervention


def euler_sample(
    key: PRNGKey,
    drift: Callable[[Array], Array],
    num_timesteps: int,
    *,
    dt: float | Array,
    initial_state: Any,
    noise_scale: Any = 0.0,
    num_trials: int | None = None,
    interventions: Intervention | None = None,
) -> Float[Array, "*trials num_timesteps state_dim"]:
    r"""States of $\dot x = f(x)$ with process noise, stepped by Euler's method under $do(\cdot)$.

    $$x_t = (1-c_t) \odot \big(x_{t-1} + dt\,f(x_{t-1}) + \sqrt{dt}\,\sigma \odot \varepsilon_t\big) + c_t \odot (v_t + \sqrt{s}\,\eta_t)$$

    Args:
        key: JAX random key; every trial has noise of its own.
        drift: f, a function of one state `(state_dim,)`: one of this module's systems, or any function.
        num_timesteps: Number of steps T, at least 1; the first one is the initial state.
        dt: Duration of a step, in the unit of time that the drift has its rates in.
        initial_state: $x_0$, `(state_dim,)`, or `(num_trials, state_dim)`; what a clamp at step 0 leaves free.
        noise_scale: $\sigma$, per square root of the unit of time: one number, or one for each state.
        num_trials: Number of trials K. None: as many as `interventions` or `initial_state` have; without either, one
            sequence.
        interventions: Clamps, `(num_timesteps, state_dim)`, or with a leading trial axis. None: no clamps.

    Returns:
        States, `(num_timesteps, state_dim)`, or `(num_trials, num_timesteps, state_dim)`.

    Raises:
        ValueError: If shapes disagree, `dt` is not positive, `noise_scale` is negative, or a number is not finite.

    References:
        Kloeden & Platen (1992), sec. 9.1; Nejatbakhsh & Wang (2025), sec. 2.

    Examples:
        >>> import jax, issm
        >>> from issm.simulate import DynamicAttractor, euler_sample
        >>> hold = issm.do({0: 0.5}, num_timesteps=200, state_dim=2, start=50, stop=100)
        >>> states = euler_sample(
        ...     jax.random.key(0), DynamicAttractor(), 200, dt=0.05, initial_state=[0.0, 0.0], num_trials=3, interventions=hold
        ... )
        >>> states.shape, float(states[0, 60, 0])
        ((3, 200, 2), 0.5)
    """
    dtype = common_float_dtype(initial_state, noise_scale, dt)
    initial_state = as_float_array("initial_state", initial_state, dtype)
    if initial_state.ndim not in (1, 2) or 0 in initial_state.shape:
        fail(
            "initial_state",
            got=f"shape {tuple(initial_state.shape)}",
            expected="(state_dim,) or (num_trials, state_dim)",
            remedy="Give the first state of one sequence, or one for each trial.",
        )
    check_finite("initial_state", initial_state)
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, (int, np.integer)) or num_timesteps < 1:
        fail(
            "num_timesteps",
            got=repr(num_timesteps),
            expected="an integer of at least 1",
            remedy="Give the number of steps to draw.",
        )
    dt = as_float_array("dt", dt, dtype)
    if dt.ndim or (is_concrete(dt) and not 0 < float(dt) < np.inf):
        fail("dt", got=f"{dt}", expected="one positive number", remedy="It is the duration of one step.")
    state_dim = initial_state.shape[-1]
    noise_scale = _as_noise_scale(noise_scale, state_dim, dtype)
    clamps = no_intervention(num_timesteps, state_dim) if interventions is None else interventions
    clamps = Intervention(clamps.mask, clamps.value.astype(dtype), clamps.variance.astype(dtype))
    if clamps.mask.shape[-2:] != (num_timesteps, state_dim):
        fail(
            "interventions",
            got=f"{clamps.num_timesteps} steps of {clamps.state_dim} states",
            expected=f"{num_timesteps} steps of {state_dim} states",
            remedy="Build the plan with the same num_timesteps, and with one state for each entry of `initial_state`.",
        )
    num_trials = _num_trials(num_trials, initial_state, clamps)
    if num_trials is None:
        return _euler(key, drift, initial_state, dt, noise_scale, clamps)
    return _euler_trials(jax.random.split(key, num_trials), drift, initial_state, dt, noise_scale, clamps)


@eqx.filter_jit
def _euler_trials(
    keys: Array, drift: Callable, initial_state: Array, dt: Array, noise_scale: Array, clamps: Intervention
) -> Array:
    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim == 3 else None, clamps)
    one = lambda key, state, clamps: _euler(key, drift, state, dt, noise_scale, clamps)  # noqa: E731
    return jax.vmap(one, in_axes=(0, 0 if initial_state.ndim == 2 else None, axes))(keys, initial_state, clamps)


@eqx.filter_jit
def _euler(
    key: PRNGKey, drift: Callable, initial_state: Array, dt: Array, noise_scale: Array, intervention: Intervention
) -> Array:
    process_key, clamp_key = jax.random.split(key)
    shape, dtype = intervention.mask.shape, initial_state.dtype
    shocks = jnp.sqrt(dt) * noise_scale[None, :] * jax.random.normal(process_key, shape, dtype)
    held = intervention.value + safe_sqrt(intervention.variance) * jax.random.normal(clamp_key, shape, dtype)

    def step(state: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        shock, mask, value = inputs
        state = jnp.where(mask, value, state + dt * jnp.asarray(drift(state), dtype) + shock)
        return state, state

    first = jnp.where(intervention.mask[0], held[0], initial_state)
    _, rest = lax.scan(step, first, (shocks[1:], intervention.mask[1:], held[1:]))
    return jnp.concatenate([first[None], rest])


def _as_noise_scale(noise_scale: Any, state_dim: int, dtype: Any) -> Array:
    noise_scale = as_float_array("noise_scale", noise_scale, dtype)
    if noise_scale.shape not in ((), (state_dim,)):
        fail(
            "noise_scale",
            got=f"shape {tuple(noise_scale.shape)}",
            expected=f"one number, or ({state_dim},)",
            remedy="Give one scale for each state.",
        )
    check_finite("noise_scale", noise_scale)
    if is_concrete(noise_scale) and (np.asarray(noise_scale) < 0).any():
        fail(
            "noise_scale",
            got="a negative number",
            expected="scales of at least zero",
            remedy="Pass its absolute value.",
        )
    return jnp.broadcast_to(noise_scale, (state_dim,))


def _num_trials(num_trials: int | None, initial_state: Array, interventions: Intervention) -> int | None:
    found = {
        "num_trials": num_trials,
        "initial_state": initial_state.shape[0] if initial_state.ndim == 2 else None,
        "interventions": interventions.mask.shape[0] if interventions.mask.ndim == 3 else None,
    }
    sizes = {name: size for name, size in found.items() if size is not None}
    if len(set(sizes.values())) > 1:
        fail(
            ", ".join(sizes),
            got=f"{' and '.join(str(size) for size in sizes.values())} trials",
            expected="one number of trials",
            remedy="Leave the trial axis out of what all trials share.",
        )
    return next(iter(sizes.values()), None)
