"""Stimulation protocols: which states are clamped, when and to what, drawn at random."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from issm._check import fail
from issm._types import PRNGKey
from issm.interventions import Intervention, stimulate

Span = int | tuple[int, int]


def random_stimulation(
    key: PRNGKey,
    num_timesteps: int,
    targets: Any,
    *,
    num_trials: int | None = None,
    duration: Span = (10, 30),
    gap: Span = (10, 30),
    amplitude: float = 1.0,
    distribution: str = "normal",
    one_at_a_time: bool = False,
) -> Intervention:
    r"""Random piecewise-constant pulses on each stimulation channel, as clamps.

    Every channel of every trial alternates between a gap, during which it leaves its states free, and a pulse, during which it
    clamps them to $a$ `targets[m, i]`, with a new amplitude $a$ for every pulse.

    Args:
        key: JAX random key.
        num_timesteps: Number of steps T, at least 1.
        targets: Gain of each channel on each state, `(num_channels, state_dim)`; or the number of states, each then with a
            channel of its own and a gain of one.
        num_trials: Number of trials K, each with pulses of its own; None: one plan without a trial axis.
        duration: Steps of a pulse: one number, or the smallest and the largest, drawn uniformly.
        gap: Steps before each pulse, likewise; may be 0.
        amplitude: Scale of the amplitudes, in the units of the states.
        distribution: "normal" $N(0, \text{amplitude}^2)$, "uniform" between plus and minus `amplitude`, or "sign": plus or
            minus `amplitude`.
        one_at_a_time: Whether each pulse goes to one channel, drawn at random, so that two never overlap.

    Returns:
        An `Intervention` of shape `(num_timesteps, state_dim)`, or `(num_trials, num_timesteps, state_dim)`.

    Raises:
        ValueError: If a size is below 1, a span is empty or negative, or the distribution is unknown.

    References:
        Nejatbakhsh & Wang (2025), sec. 4.

    Examples:
        >>> import jax
        >>> from issm.simulate import random_stimulation
        >>> plan = random_stimulation(jax.random.key(0), 200, 2, num_trials=10, duration=20, gap=(10, 40))
        >>> plan.mask.shape
        (10, 200, 2)
    """
    gains = np.eye(_as_size("targets", targets)) if np.ndim(targets) == 0 else targets
    num_channels = np.shape(gains)[0]
    num_timesteps = _as_size("num_timesteps", num_timesteps)
    duration, gap = _as_span("duration", duration, smallest=1), _as_span("gap", gap, smallest=0)
    if distribution not in ("normal", "uniform", "sign"):
        fail(
            "distribution",
            got=repr(distribution),
            expected='"normal", "uniform" or "sign"',
            remedy="Choose how the amplitudes are drawn.",
        )

    protocol = (num_timesteps, num_channels, duration, gap, distribution, bool(one_at_a_time))
    if num_trials is None:
        height, active = _pulse_train(key, *protocol)
    else:
        height, active = _pulse_trains(jax.random.split(key, _as_size("num_trials", num_trials)), *protocol)
    return stimulate(amplitude * height, gains, active)


@partial(jax.jit, static_argnums=range(1, 7))
def _pulse_trains(keys: Array, *protocol: Any) -> tuple[Array, Array]:
    return jax.vmap(lambda key: _pulse_train(key, *protocol))(keys)


@partial(jax.jit, static_argnums=range(1, 7))
def _pulse_train(
    key: PRNGKey,
    num_timesteps: int,
    num_channels: int,
    duration: tuple[int, int],
    gap: tuple[int, int],
    distribution: str,
    one_at_a_time: bool,
) -> tuple[Array, Array]:
    """Heights of unit scale and Booleans, `(num_timesteps, num_channels)`."""
    num_trains = 1 if one_at_a_time else num_channels
    num_pulses = -(-num_timesteps // (duration[0] + gap[0])) + 1
    # One draw for everything: random bits are what takes long to compile.
    dtype = jnp.result_type(float)
    above_minus_one = np.nextafter(dtype.type(-1), dtype.type(0))
    drawn = jax.random.uniform(key, (4, num_trains, num_pulses), dtype, minval=above_minus_one, maxval=1.0)
    durations, gaps = _integers(drawn[0], *duration), _integers(drawn[1], *gap)
    stops = jnp.cumsum(gaps + durations, axis=1)
    steps = jnp.arange(num_timesteps)[:, None, None]
    on = (steps >= (stops - durations)[None]) & (steps < stops[None])  # step, train, pulse
    if distribution == "normal":
        heights = np.sqrt(2) * jax.lax.erf_inv(drawn[2])
    else:
        heights = drawn[2] if distribution == "uniform" else jnp.where(drawn[2] < 0, -1.0, 1.0)
    if one_at_a_time:
        chosen = _integers(drawn[3, 0], 0, num_channels - 1)
        on = on & (jnp.arange(num_channels)[:, None] == chosen[None, :])[None]
    return jnp.where(on, heights[None], 0.0).sum(axis=-1), on.any(axis=-1)


def _integers(drawn: Array, low: int, high: int) -> Array:
    """Numbers between -1 and 1 as integers from `low` to `high`, all equally probable."""
    count = high - low + 1
    return jnp.clip(jnp.floor((drawn + 1) / 2 * count), 0, count - 1).astype(int) + low


def _as_size(argument: str, size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        fail(argument, got=repr(size), expected="an integer of at least 1", remedy="Sizes are counts.")
    return int(size)


def _as_span(argument: str, span: Span, *, smallest: int) -> tuple[int, int]:
    low, high = (span, span) if isinstance(span, (int, np.integer)) else span
    if not smallest <= low <= high:
        fail(
            argument,
            got=f"{span}",
            expected=f"an integer of at least {smallest}, or the smallest and the largest of them",
            remedy="It is counted in steps.",
        )
    return int(low), int(high)
