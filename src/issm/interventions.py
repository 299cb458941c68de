r"""Interventions: which states are clamped, when, and to what. The time convention of the library lives here.

Entry t of an `Intervention` (and of `inputs`) acts on the arrival in $x_t$. A clamp cuts everything that drove the
state, its noise included: $x_{t,i} = v_{t,i} + \sqrt{s}\,\varepsilon$. At t = 0 it replaces the initial distribution.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from issm._check import as_array, as_floats, check_finite, common_float_dtype, fail
from issm._host import is_concrete, on_host, to_device, with_equal_axes


class Intervention(eqx.Module):
    r"""Clamps $do(x_{t,i} = v_{t,i})$ on some states at some steps.

    A clamp to zero is a clamp: only the mask says where one holds, never the value. Values under a false mask are ignored.

    Attributes:
        mask: True where a state is clamped, `(num_timesteps, state_dim)`, or with a leading trial axis.
        value: What it is clamped to, in the units of the states, same shape.
        variance: Variance of the clamped value, same shape; zero is a perfect clamp.

    Raises:
        ValueError: If the mask is not Boolean, shapes differ, a value under a true mask is NaN or infinite, or a variance is
            negative.

    References:
        Nejatbakhsh & Wang (2025), sec. 2; Pearl (2009), *Causality*, sec. 3.2.

    Examples:
        >>> import numpy as np
        >>> from issm import Intervention
        >>> mask = np.zeros((5, 2), dtype=bool)
        >>> mask[1:3, 0] = True
        >>> clamp = Intervention(mask, np.where(mask, 1.5, 0.0))
        >>> clamp.num_timesteps, clamp.state_dim
        (5, 2)
    """

    mask: Bool[Array, "*trials num_timesteps state_dim"]
    value: Float[Array, "*trials num_timesteps state_dim"]
    variance: Float[Array, "*trials num_timesteps state_dim"]

    def __init__(self, mask: Any, value: Any, variance: Any = 0.0):
        mask = _as_mask("mask", mask)
        if mask.ndim not in (2, 3):
            fail(
                "mask",
                got=f"shape {tuple(mask.shape)}",
                expected="(num_timesteps, state_dim) or (num_trials, num_timesteps, state_dim)",
                remedy="Give every step and every state an entry; `do` builds a mask from a state index and a window.",
            )
        value = as_floats("value", value)
        if value.ndim and value.shape != mask.shape:
            fail(
                "value",
                got=f"shape {tuple(value.shape)}",
                expected=f"the mask's shape {tuple(mask.shape)}, or one number",
                remedy="Values under a false mask are ignored: pass any number there.",
            )
        variance = as_floats("variance", variance, value.dtype)
        if variance.ndim and variance.shape != mask.shape:
            fail(
                "variance",
                got=f"shape {tuple(variance.shape)}",
                expected=f"the mask's shape {tuple(mask.shape)}, or one number",
                remedy="One number makes all clamps equally noisy.",
            )
        xp, (mask, value, variance) = on_host(mask, value, variance)
        value, variance = xp.broadcast_to(value, mask.shape), xp.broadcast_to(variance, mask.shape)
        if is_concrete(mask) and is_concrete(value) and not np.isfinite(np.asarray(value)[np.asarray(mask)]).all():
            fail(
                "value",
                got="NaN or infinity under a true mask",
                expected="a finite number wherever the mask is true",
                remedy="Set the mask to False where the clamp is unknown, or fill in its value.",
            )
        if is_concrete(mask) and is_concrete(variance):
            clamped = np.asarray(variance)[np.asarray(mask)]
            if not (np.isfinite(clamped) & (clamped >= 0)).all():
                fail(
                    "variance",
                    got="a negative, infinite or NaN variance",
                    expected="finite variances of at least zero",
                    remedy="Zero is a perfect clamp; where a state is free, set the mask to False.",
                )
        self.mask = to_device(mask)
        self.value = to_device(xp.where(mask, value, 0.0), value.dtype)
        self.variance = to_device(xp.where(mask, variance, 0.0), value.dtype)

    @property
    def num_timesteps(self) -> int:
        """Number of steps T."""
        return self.mask.shape[-2]

    @property
    def state_dim(self) -> int:
        """Number of states D."""
        return self.mask.shape[-1]


def no_intervention(num_timesteps: int, state_dim: int) -> Intervention:
    """The plan that leaves every state free.

    Args:
        num_timesteps: Number of steps T, at least 1.
        state_dim: Number of states D, at least 1.

    Returns:
        An `Intervention` of shape `(num_timesteps, state_dim)` whose mask is false everywhere.

    Raises:
        ValueError: If a size is below 1.

    References:
        `docs/concepts.md`, "Interventions".

    Examples:
        >>> from issm import no_intervention
        >>> bool(no_intervention(10, 3).mask.any())
        False
    """
    _check_sizes(num_timesteps, state_dim)
    return Intervention(np.zeros((num_timesteps, state_dim), dtype=bool), 0.0)


def do(
    clamps: Mapping[int, Any],
    *,
    num_timesteps: int,
    state_dim: int,
    start: int = 0,
    stop: int | None = None,
    variance: float = 0.0,
) -> Intervention:
    r"""Clamp states over a window: $do(x_{t,i} = v_{t,i})$ for `start` $\le t <$ `stop`.

    Args:
        clamps: State index to value: one number, or an array with one entry for each step of the window.
        num_timesteps: Length T of the plan.
        state_dim: Number of states D.
        start: First clamped step, counted from 0.
        stop: One past the last clamped step; None for the end of the plan.
        variance: Variance of the clamped values; zero is a perfect clamp.

    Returns:
        An `Intervention` of shape `(num_timesteps, state_dim)`.

    Raises:
        ValueError: If a state index is not in `0 ... state_dim - 1`, the window is empty or leaves the plan, or a value has
            the wrong length or is not finite.

    References:
        Pearl (2009), *Causality*, sec. 3.2.1.

    Examples:
        >>> from issm import do
        >>> plan = do({0: 1.0, 2: [0.0, 0.5]}, num_timesteps=4, state_dim=3, start=1, stop=3)
        >>> plan.value.tolist()
        [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.0, 0.0]]
        >>> plan.mask[1].tolist()
        [True, False, True]
    """
    _check_sizes(num_timesteps, state_dim)
    stop = num_timesteps if stop is None else stop
    if not isinstance(clamps, Mapping):
        fail(
            "clamps", got=f"a {type(clamps).__name__}", expected="a dictionary", remedy="Map state to value: {0: 1.0}."
        )
    whole = all(isinstance(step, (int, np.integer)) for step in (start, stop))
    if not (whole and 0 <= start < stop <= num_timesteps):
        fail(
            "start, stop",
            got=f"the window [{start}, {stop})",
            expected=f"integers 0 <= start < stop <= num_timesteps = {num_timesteps}",
            remedy="Steps are counted from 0 and `stop` is not clamped.",
        )
    dtype = common_float_dtype(*clamps.values())
    mask = np.zeros((num_timesteps, state_dim), dtype=bool)
    values = {}
    for state, given in clamps.items():
        if isinstance(state, bool) or not isinstance(state, (int, np.integer)) or not 0 <= state < state_dim:
            fail(
                "clamps",
                got=f"state {state!r}",
                expected=f"an integer in 0 ... {state_dim - 1}",
                remedy="States are counted from 0.",
            )
        value = as_floats(f"clamps[{state}]", given, dtype)
        if value.shape not in ((), (stop - start,)):
            fail(
                f"clamps[{state}]",
                got=f"shape {tuple(value.shape)}",
                expected=f"one number, or {stop - start} numbers for the steps {start} ... {stop - 1}",
                remedy="Give one value for each clamped step.",
            )
        mask[start:stop, state] = True
        values[state] = value
    xp, columns = on_host(*(values.get(state, np.zeros((), dtype)) for state in range(state_dim)))
    window = xp.stack([xp.broadcast_to(column, (stop - start,)) for column in columns], axis=-1)
    return Intervention(mask, xp.pad(window, ((start, num_timesteps - stop), (0, 0))), variance)


def stimulate(amplitudes: Any, targets: Any, active: Any = None, *, variance: float = 0.0) -> Intervention:
    r"""Turn stimulation channels into clamps: channel m clamps the states that row m of `targets` names.

    While channel m is active, each state i with `targets[m, i] != 0` is clamped to $\sum_m$ `amplitudes[t, m] * targets[m, i]`,
    the sum running over the active channels that hit it.

    Args:
        amplitudes: Stimulus strength, `(num_timesteps, num_channels)` or with a leading trial axis.
        targets: Gain of each channel on each state, `(num_channels, state_dim)`; an exact zero is no target.
        active: Boolean, same shape as `amplitudes`: where a channel is on. None: where its amplitude is not zero. Pass it to
            clamp to zero.
        variance: Variance of the clamped values; zero is a perfect clamp.

    Returns:
        An `Intervention` of shape `(num_timesteps, state_dim)`, with the trial axis of `amplitudes` if it has one.

    Raises:
        ValueError: If shapes disagree, `active` is not Boolean, or a number is not finite.

    References:
        Nejatbakhsh & Wang (2025), sec. 3, where the clamped values are $B u_t$.

    Examples:
        >>> from issm import stimulate
        >>> plan = stimulate([[0.0], [2.0], [0.0]], targets=[[1.0, 0.5]], active=[[False], [True], [True]])
        >>> plan.value.tolist()
        [[0.0, 0.0], [2.0, 1.0], [0.0, 0.0]]
        >>> plan.mask.any(axis=1).tolist()
        [False, True, True]
    """
    dtype = common_float_dtype(amplitudes, targets)
    amplitudes = as_floats("amplitudes", amplitudes, dtype)
    targets = as_floats("targets", targets, dtype)
    if amplitudes.ndim not in (2, 3):
        fail(
            "amplitudes",
            got=f"shape {tuple(amplitudes.shape)}",
            expected="(num_timesteps, num_channels) or (num_trials, num_timesteps, num_channels)",
            remedy="Add the channel axis, even for one channel.",
        )
    if targets.ndim != 2 or targets.shape[0] != amplitudes.shape[-1]:
        fail(
            "targets",
            got=f"shape {tuple(targets.shape)}",
            expected=f"(num_channels, state_dim) = ({amplitudes.shape[-1]}, state_dim)",
            remedy="One row for each channel of `amplitudes`.",
        )
    active = amplitudes != 0 if active is None else _as_mask("active", active)
    if active.shape != amplitudes.shape:
        fail(
            "active",
            got=f"shape {tuple(active.shape)}",
            expected=f"the shape of `amplitudes`, {tuple(amplitudes.shape)}",
            remedy="Give one Boolean for each amplitude.",
        )
    xp, (active, amplitudes, targets) = on_host(active, amplitudes, targets)
    amplitudes = xp.where(active, amplitudes, xp.zeros((), dtype))
    check_finite("targets", targets)
    check_finite("amplitudes", amplitudes)
    mask = xp.einsum("...m,mi->...i", active, targets != 0)
    return Intervention(mask, amplitudes @ targets, variance)


def merge(a: Intervention, b: Intervention) -> Intervention:
    """Both plans at once.

    Args:
        a: One plan, `(num_timesteps, state_dim)` or with a leading trial axis.
        b: Another, of the same length and number of states; it may lack the trial axis that `a` has, or the other way round.

    Returns:
        An `Intervention` that clamps what either clamps.

    Raises:
        ValueError: If the shapes disagree, or both clamp one state at one step to different values or variances. (While JAX
            traces, values cannot be compared and the clamp of `a` wins.)

    References:
        `docs/concepts.md`, "Interventions".

    Examples:
        >>> from issm import do, merge
        >>> both = merge(do({0: 1.0}, num_timesteps=2, state_dim=2), do({1: 2.0}, num_timesteps=2, state_dim=2))
        >>> both.value.tolist()
        [[1.0, 2.0], [1.0, 2.0]]
    """
    for name, plan in (("a", a), ("b", b)):
        if not isinstance(plan, Intervention):
            fail(
                name,
                got=f"a {type(plan).__name__}",
                expected="an Intervention",
                remedy="Build one with `do`, `stimulate` or `Intervention(mask, value)`.",
            )
    if a.mask.shape[-2:] != b.mask.shape[-2:] or (
        a.mask.ndim == b.mask.ndim == 3 and a.mask.shape[0] != b.mask.shape[0]
    ):
        fail(
            "b",
            got=f"shape {tuple(b.mask.shape)}",
            expected=f"that of `a`, {tuple(a.mask.shape)}",
            remedy="Build both plans with the same num_timesteps, state_dim and number of trials.",
        )
    xp, arrays = on_host(a.mask, a.value, a.variance, b.mask, b.value, b.variance)
    in_a, value, variance, in_b, other_value, other_variance = with_equal_axes(*arrays)
    differ = in_a & in_b & ((value != other_value) | (variance != other_variance))
    if is_concrete(differ) and bool(differ.any()):
        *_, step, state = (int(i[0]) for i in np.nonzero(np.asarray(differ)))
        fail(
            "a, b",
            got=f"two different clamps of state {state} at step {step}",
            expected="plans that agree where both clamp",
            remedy="Remove one of the two clamps.",
        )
    return Intervention(
        in_a | in_b,
        xp.where(in_a, value, other_value.astype(value.dtype)),
        xp.where(in_a, variance, other_variance.astype(variance.dtype)),
    )


def _as_mask(argument: str, mask: Any) -> jax.Array | np.ndarray:
    mask = as_array(argument, mask)
    if mask.dtype != bool:
        fail(
            argument,
            got=f"dtype {mask.dtype}",
            expected="Boolean",
            remedy="Pass `x.astype(bool)`, or the comparison that says where a clamp holds.",
        )
    return mask


def _check_sizes(num_timesteps: int, state_dim: int) -> None:
    for name, size in (("num_timesteps", num_timesteps), ("state_dim", state_dim)):
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            fail(
                name,
                got=repr(size),
                expected="an integer of at least 1",
                remedy="Give the length of the plan and the number of states.",
            )
