r"""Nonlinear dynamics: one step of a path, and the linear dynamics around a path."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from issm._check import as_float_array, check_finite, check_shape, check_variances, common_float_dtype, fail
from issm._linalg import noise_factor, safe_sqrt
from issm._types import PRNGKey
from issm.interventions import Intervention
from issm.models.fields import as_matrix
from issm.models.lgssm import ParamsLGSSMInitial
from issm.models.transitions import Transitions, clamped_transitions


class NonlinearDynamics(eqx.Module):
    r"""Dynamics $x_t = f(x_{t-1}) + B u_t + w_t,\ w_t \sim N(0, \mathrm{diag}(q))$ with any smooth map f.

    A drift g in continuous time is the map $f(x) = x + g(x)\,dt$.

    Attributes:
        map: f, a callable pytree from `(state_dim,)` to `(state_dim,)`: an `MLP`, a `LinearMap` or any `equinox.Module`.
        cov: q, positive, `(state_dim,)`.
        input_weights: B, `(state_dim, input_dim)`; no inputs if not given.

    Raises:
        ValueError: If a size disagrees, a variance is not positive, or an entry is not finite.

    References:
        Särkkä & Svensson (2023), eq. 5.1; `docs/how-to/nonlinear-dynamics.md`.

    Examples:
        >>> import jax.numpy as jnp, issm
        >>> turn = issm.NonlinearDynamics(lambda x: x + 0.1 * jnp.array([x[1], (1 - x[0] ** 2) * x[1] - x[0]]), [0.01, 0.01])
        >>> turn.map(jnp.array([1.0, 0.0])).round(2).tolist(), turn.input_weights.shape
        ([1.0, -0.1], (2, 0))
    """

    map: Callable[[Float[Array, " state_dim"]], Float[Array, " state_dim"]]
    cov: Float[Array, " state_dim"]
    input_weights: Float[Array, "state_dim input_dim"]

    def __init__(self, map: Callable[[Array], Array], cov: Any, input_weights: Any = None):
        if not callable(map):
            fail(
                "map",
                got=f"a {type(map).__name__}",
                expected="a callable from (state_dim,) to (state_dim,)",
                remedy="For linear dynamics use `make_lgssm_params`.",
            )
        dtype = common_float_dtype(cov, input_weights)
        cov = as_float_array("cov", cov, dtype)
        if cov.ndim != 1:
            fail(
                "cov",
                got=f"shape {tuple(cov.shape)}",
                expected="(state_dim,)",
                remedy="Give one variance for each state; correlated noise is not supported here.",
            )
        check_variances("cov", cov, positive=True)
        state_dim = cov.shape[0]
        weights = jnp.zeros((state_dim, 0), dtype) if input_weights is None else input_weights
        weights = as_float_array("input_weights", weights, dtype)
        wanted = (state_dim, weights.shape[-1] if weights.ndim else 0)
        check_shape("input_weights", weights, wanted, ("state_dim", "input_dim"), "One row for each state.")
        check_finite("input_weights", weights)
        self.map = map
        self.cov = cov
        self.input_weights = weights


class Noise(eqx.Module):
    """The noise of one path, in the units of the states.

    Attributes:
        process: $w_t$, that of the initial distribution first, `(num_timesteps, state_dim)`.
        clamps: What clamps add to their values, `(num_timesteps, state_dim)`.
    """

    process: Float[Array, "num_timesteps state_dim"]
    clamps: Float[Array, "num_timesteps state_dim"]


def draw_noise(
    key: PRNGKey, initial: ParamsLGSSMInitial | None, dynamics: NonlinearDynamics, intervention: Intervention
) -> Noise:
    """The noise of one path; without an initial distribution its first step is like the others."""
    shape, dtype = intervention.mask.shape, dynamics.cov.dtype
    process_key, clamp_key = jax.random.split(key)
    white = jax.random.normal(process_key, shape, dtype)
    process = white * jnp.sqrt(dynamics.cov)[None]
    if initial is not None:
        process = process.at[0].set(noise_factor(initial.cov, diagonal=initial.cov.ndim == 1) @ white[0])
    return Noise(process, safe_sqrt(intervention.variance) * jax.random.normal(clamp_key, shape, dtype))


def no_noise(intervention: Intervention) -> Noise:
    """A path without any."""
    return Noise(jnp.zeros_like(intervention.value), jnp.zeros_like(intervention.value))


def follow(
    start: Float[Array, " state_dim"], dynamics: NonlinearDynamics,
    inputs: Float[Array, "num_timesteps input_dim"], intervention: Intervention, noise: Noise,
) -> Float[Array, "num_timesteps state_dim"]:  # fmt: skip
    r"""$x_t = (1-c_t) \odot (f(x_{t-1}) + B u_t + w_t) + c_t \odot (v_t + \sqrt{s}\,\varepsilon_t)$; `start` is $E[x_0]$ without clamps."""
    drive, held = noise.process + inputs @ dynamics.input_weights.T, intervention.value + noise.clamps

    def step(state: Array, at: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        drive, clamped, value = at
        state = jnp.where(clamped, value, dynamics.map(state) + drive)
        return state, state

    first = jnp.where(intervention.mask[0], held[0], start + noise.process[0])
    _, rest = lax.scan(step, first, (drive[1:], intervention.mask[1:], held[1:]))
    return jnp.concatenate([first[None], rest])


def transitions_around(
    states: Float[Array, "num_timesteps state_dim"], initial: ParamsLGSSMInitial, dynamics: NonlinearDynamics,
    inputs: Float[Array, "num_timesteps input_dim"], intervention: Intervention,
) -> Transitions:  # fmt: skip
    r"""The linear dynamics that touch f at a path: $A_t = f'(\hat x_{t-1})$, $a_t = f(\hat x_{t-1}) - A_t \hat x_{t-1} + B u_t$."""
    before = states[:-1]
    slopes = jax.vmap(jax.jacfwd(dynamics.map))(before)
    shift = jax.vmap(dynamics.map)(before) - jnp.einsum("tij,tj->ti", slopes, before)
    shift = shift + inputs[1:] @ dynamics.input_weights.T
    cov = jnp.broadcast_to(jnp.diag(dynamics.cov), (len(states), *slopes.shape[1:]))
    free = Transitions(
        weights=jnp.concatenate([jnp.zeros_like(cov[:1]), slopes]),
        shift=jnp.concatenate([initial.mean[None], shift]),
        cov=cov.at[0].set(as_matrix(initial.cov)),
    )
    return clamped_transitions(free, intervention)
